"""Optimizer state in host memory between steps."""

from typing import Any

import optax

from jaxpeft.core.memory import as_in, to_device, to_host


def offload(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer, whose state waits in host memory and is on the device for the update.

    While the model runs forwards and backwards, the room of the state is free for activations: what
    a "paged" optimizer is for, decided by the program instead of by page faults. The update itself
    moves all of it, and may need room for the old and the new state at once. Worth it where the
    state is large, as with `jaxpeft.full`, and activations are larger. On a TPU the state has to be
    of floats: XLA does not compile moves of the bytes of `adam8bit` there. Updates are the same to
    the bit. `update` gives the state back in the memory where it was, so that a step may move it by
    itself, as `make_step` does.

    Args:
      optimizer: any optax transformation.

    Returns:
      An optax transformation; its `init` puts all arrays but scalars into host memory.

    Raises:
      NoHostMemoryError: at `init`, if the devices have no host memory that their programs can read.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> state = offload(optax.adam(1e-3)).init({"w": jnp.ones((4, 4))})
      >>> state[0].mu["w"].sharding.memory_kind
      'pinned_host'

    Reference:
      Dettmers et al. 2023, arXiv:2305.14314, section 3 (paged optimizers).
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> Any:
        return to_host(inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        updates, after = inner.update(updates, to_device(state), params, **extra)
        return updates, as_in(after, state)

    return optax.GradientTransformationExtraArgs(init, update)
