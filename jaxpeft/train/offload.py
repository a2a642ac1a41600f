"""Optimizer state in host memory between steps."""

from typing import Any

import jax
import optax

from jaxpeft.core.memory import to_host
from jaxpeft.train.adam8bit import Moment
from jaxpeft.train.paging import paged


def offload(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer, whose state is in host memory, and on the device a chunk at a time.

    While the model runs forwards and backwards, the room of the state is free for activations. The
    update fetches a chunk of at most 2^21 elements of each array, works on it and puts it back:
    what a "paged" optimizer is for, decided by the program instead of by page faults. Updates are
    the same.

    That holds of what an optimizer does element by element with arrays of at least two axes, as in
    `optax.adamw`, `lion`, `sgd` or `lamb`, with clipping in front, and of `adam8bit`. Where it
    looks at all of a state's array, it gets all of it: right, but not paged. So it is with
    `optax.MultiSteps`; and around it, not in it, is the place of `offload`. Arrays whose rows are
    not whole tiles of 8 (16 or 32 where they are narrower than float32), such as tables with an odd
    number of rows, come whole, a few at a time.

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
        return jax.tree.map(_to_host, inner.init(params), is_leaf=_is_moment)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        def call(updates: Any, state: Any) -> Any:
            return inner.update(updates, state, params, **extra)

        return paged(call, updates, state, into=(updates, state), kept=_moments(state))

    return optax.GradientTransformationExtraArgs(init, update)


def _is_moment(x: Any) -> bool:
    return isinstance(x, Moment)


def _to_host(x: Any) -> Any:
    # The scales are small, and of shapes of which a TPU may take no part from the host.
    return x._replace(codes=to_host(x.codes)) if _is_moment(x) else to_host(x)


def _moments(state: Any) -> list[Any]:
    """The codes in a state, which `adam8bit` takes from the host by itself."""
    return [x.codes for x in jax.tree.leaves(state, is_leaf=_is_moment) if _is_moment(x)]
