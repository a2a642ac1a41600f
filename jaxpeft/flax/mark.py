"""Marks what goes into and comes out of a module, and points inside of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpeft.core.rules import compile_pattern
from jaxpeft.core.tap import tap


class Marks(NamedTuple):
    """What to mark in a model beside the inputs and outputs of its modules.

    Attributes:
        grows: `(glob, count)`: modules inside of which sequences have `count` more rows at the end.
        attention: whether the attentions are marked too.
        beside: `(path, x) -> rows` to put in front of the keys or values `x` of an attention.
    """

    grows: tuple[tuple[str, int], ...] = ()
    attention: bool = False
    beside: Callable[[str, jax.Array], int] | None = None

    def rows(self, path: str) -> int:
        """Rows that sequences are longer inside the module at `path` than around it."""
        return sum(count for glob, count in self.grows if compile_pattern(glob)(path, None))


class Point(nnx.Module):
    """A place inside a module where methods may work: the identity, called on activations.

    As the attribute `key` of a module at "layers/attn" it marks "layers/attn:key". Keyword
    arguments are further activations that a method may read there, or functions that compute
    them, which are called only where the model is tuned at its boundaries.

    Example:
        >>> point = Point()
        >>> point(jnp.ones(3), double=lambda: 2 * jnp.ones(3)).shape
        (3,)
    """

    def __call__(self, x: jax.Array, **sources: jax.Array | Callable[[], jax.Array]) -> jax.Array:
        return x


def mark_call(run: Callable[..., Any], path: str, args: Any, kwargs: Any, marks: Marks) -> Any:
    """A module's call with its first floating-point input and output tapped; masks, ids stay."""
    rows = marks.rows(path)
    args = _first(args, lambda x: tap(_grown(x, rows), f"{path}:in"))
    found = next((leaf for leaf in jax.tree.leaves(args) if _is_activation(leaf)), None)
    given = {} if found is None else {"input": found}
    return _first(run(*args, **kwargs), lambda x: _cut(tap(x, f"{path}:out", **given), rows))


def mark_point(path: str, x: jax.Array, sources: dict[str, Any], marks: Marks) -> jax.Array:
    """The call of the `Point` at `path`."""
    parent, _, name = path.rpartition("/")
    path = f"{parent}:{name}"
    if marks.beside and name in ("key", "value"):
        rows = marks.beside(path, x)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(rows, 0), (0, 0), (0, 0)])
    return tap(x, path, **{k: v() if callable(v) else v for k, v in sources.items()})


def _first(values: Any, f: Callable[[jax.Array], jax.Array]) -> Any:
    """`values` with `f` of the first activations among them."""
    leaves, tree = jax.tree.flatten(values)
    for i, leaf in enumerate(leaves):
        if _is_activation(leaf):
            leaves[i] = f(leaf)
            break
    return jax.tree.unflatten(tree, leaves)


def _grown(x: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, rows), (0, 0)]) if rows else x


def _cut(x: jax.Array, rows: int) -> jax.Array:
    return x[..., :-rows, :] if rows else x


def _is_activation(leaf: Any) -> bool:
    return (
        isinstance(leaf, jax.Array) and leaf.ndim > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)
    )
