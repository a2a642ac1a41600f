"""Marks what goes into and comes out of a module."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.tap import tap


def mark(values: Any, name: str) -> Any:
    """`values` with the first floating-point array in it tapped; masks and ids stay."""
    leaves, tree = jax.tree.flatten(values)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, jax.Array) and leaf.ndim and jnp.issubdtype(leaf.dtype, jnp.floating):
            leaves[i] = tap(leaf, name)
            break
    return jax.tree.unflatten(tree, leaves)
