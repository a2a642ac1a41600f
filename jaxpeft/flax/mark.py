"""Marks what goes into and comes out of a module, and points inside of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpeft.core.tap import tap


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


def mark_call(run: Callable[..., Any], path: str, args: Any, kwargs: Any) -> Any:
    """A module's call with its first floating-point input and output tapped; masks, ids stay."""
    args = _mark(args, f"{path}:in", {})
    found = _first(args)
    given = {} if found is None else {"input": found}
    return _mark(run(*args, **kwargs), f"{path}:out", given)


def mark_point(path: str, x: jax.Array, sources: dict[str, Any]) -> jax.Array:
    """The call of the `Point` at `path`."""
    parent, _, name = path.rpartition("/")
    return tap(x, f"{parent}:{name}", **{k: v() if callable(v) else v for k, v in sources.items()})


def _mark(values: Any, name: str, sources: dict[str, jax.Array]) -> Any:
    leaves, tree = jax.tree.flatten(values)
    for i, leaf in enumerate(leaves):
        if _is_activation(leaf):
            leaves[i] = tap(leaf, name, **sources)
            break
    return jax.tree.unflatten(tree, leaves)


def _first(values: Any) -> jax.Array | None:
    return next((leaf for leaf in jax.tree.leaves(values) if _is_activation(leaf)), None)


def _is_activation(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and leaf.ndim > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)
