"""What a training step takes of a device's memory, before anything is loaded or run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxpeft.train.step import State


class StepMemory(NamedTuple):
    """Bytes of one step.

    Attributes:
      params: the frozen weights, packed where they are quantized.
      adapter: the adapter, fixed leaves included.
      optimizer: its state.
      batch: one batch.
      temporaries: all that is alive for the length of the step alone: activations, gradients,
        unpacked weights. None where the compiler does not tell.
    """

    params: int
    adapter: int
    optimizer: int
    batch: int
    temporaries: int | None

    @property
    def total(self) -> int:
        """All of it; without the temporaries where these are not known."""
        return sum(size or 0 for size in self)


def step_memory(step: Callable[..., Any], state: State, params: Any, batch: Any) -> StepMemory:
    """Compiles a training step from shapes alone and reads what it needs.

    The step is compiled for the backend at hand. What it finds depends on that backend: a CPU
    computes bfloat16 products in float32, for instance.

    Args:
      step: from `make_step`.
      state: from `init_state`; arrays or `jax.ShapeDtypeStruct`s, like the others.
      params: the frozen params.
      batch: one batch.

    Returns:
      The bytes of each part.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxpeft.train import init_state, make_step
      >>> def loss_fn(adapter, params, batch, dropout_key):
      ...     return jnp.sum((batch @ params * adapter["g"]) ** 2), jnp.float32(batch.shape[0])
      >>> optimizer = optax.adam(1e-3)
      >>> state = init_state({"g": jnp.ones(8)}, optimizer, jax.random.key(0))
      >>> found = step_memory(make_step(loss_fn, optimizer), state, jnp.ones((4, 8)),
      ...                     jnp.ones((2, 4)))
      >>> found.params, found.adapter, found.optimizer, found.batch
      (128, 32, 68, 32)
    """
    lower: Any = getattr(step, "lower")  # noqa: B009  `Step` is a callable to the type checker
    found = lower(state, params, batch).compile().memory_analysis()
    temporaries = None if found is None else int(found.temp_size_in_bytes)
    kept = (params, state.adapter, state.opt_state, batch)
    return StepMemory._make([*map(tree_bytes, kept), temporaries])


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays; of a quantized weight's, the packed ones."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
