"""What a training step takes of a device's memory, before anything is loaded or run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxpeft.core.memory import KIND, on_host
from jaxpeft.train.step import State


class StepMemory(NamedTuple):
    """Bytes of one step.

    The first five are of the device's memory.

    Attributes:
      params: the frozen weights, packed where they are quantized.
      adapter: the adapter, fixed leaves included.
      optimizer: its state.
      batch: one batch.
      temporaries: all that is alive for the length of the step alone: activations, gradients,
        unpacked weights. None where the compiler does not tell.
      host: what is in host memory, of weights and of the optimizer's state.
    """

    params: int
    adapter: int
    optimizer: int
    batch: int
    temporaries: int | None
    host: int = 0

    @property
    def total(self) -> int:
        """All on the device; without the temporaries where these are not known."""
        return sum(size or 0 for size in self) - self.host


def placed_shapes(make: Callable[..., Any], *args: Any) -> Any:
    """What a function would return, as shapes that are where its arrays would be.

    `jax.eval_shape` forgets which of them `jaxpeft.offload` puts into host memory.

    Args:
      make: a function of trees.
      *args: its arguments; arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      A tree of `jax.ShapeDtypeStruct`s, for `step_memory`.

    Example:
      >>> import jaxpeft as jp, jax.numpy as jnp
      >>> shapes = placed_shapes(jp.offload, {"w": jax.ShapeDtypeStruct((4, 3), jnp.float32)})
      >>> shapes["w"].packed["values"].sharding.memory_kind
      'pinned_host'
    """
    marks: list[bool] = []

    def marked(*args: Any) -> Any:
        made = make(*args)
        marks.extend(on_host(leaf) for leaf in jax.tree.leaves(made))
        return made

    shapes = jax.eval_shape(marked, *args)
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("device",))
    there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(), memory_kind=KIND)
    moved = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)  # noqa: E731
    leaves, tree = jax.tree.flatten(shapes)
    placed = [moved(x) if mark else x for x, mark in zip(leaves, marks, strict=True)]
    return jax.tree.unflatten(tree, placed)


def step_memory(step: Callable[..., Any], state: State, params: Any, batch: Any) -> StepMemory:
    """Compiles a training step from shapes alone and reads what it needs.

    The step is compiled for the backend at hand. What it finds depends on that backend: a CPU
    computes bfloat16 products in float32, for instance. For shapes that are in host memory see
    `placed_shapes`.

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
    sizes = [_bytes(tree, host=False) for tree in kept]
    return StepMemory._make([*sizes, temporaries, sum(_bytes(tree, host=True) for tree in kept)])


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays; of a quantized weight's, the packed ones."""
    return _bytes(tree, host=False) + _bytes(tree, host=True)


def _bytes(tree: Any, *, host: bool) -> int:
    """Bytes of the arrays that are in host memory, or of those that are not."""
    there = [leaf for leaf in jax.tree.leaves(tree) if on_host(leaf) == host]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in there)
