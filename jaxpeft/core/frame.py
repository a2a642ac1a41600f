"""Pytrees taken apart into what is traced and what is passed through as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxpeft.core.structured import Structured, Sum
from jaxpeft.core.tree import leaves_with_paths


@dataclasses.dataclass(frozen=True)
class Frame:
    """A pytree without its arrays: its structure, and the leaves that are not traced."""

    structure: Any
    static: tuple[tuple[int, Any], ...]

    def fill(self, arrays: Sequence[Any]) -> Any:
        leaves, fixed = iter(arrays), dict(self.static)
        count = self.structure.num_leaves
        return self.structure.unflatten(
            [fixed[i] if i in fixed else next(leaves) for i in range(count)]
        )


def frame(tree: Any) -> tuple[list[Any], Frame]:
    """The leaves to trace (arrays and structured weights), and the frame that takes them back."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, Structured))
    kinds = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, Structured)
    static = tuple((i, leaf) for i, leaf in enumerate(leaves) if not isinstance(leaf, kinds))
    return [leaf for leaf in leaves if isinstance(leaf, kinds)], Frame(structure, static)


def named(tree: Any) -> Any:
    """The tree, in which structured weights without a name have that of their path, for reports."""

    def name(path: str, leaf: Any) -> Any:
        return Sum((leaf,), path) if isinstance(leaf, Structured) and not leaf.name else leaf

    pairs, structure = leaves_with_paths(tree, is_leaf=lambda x: isinstance(x, Structured))
    return structure.unflatten([name(path, leaf) for path, leaf in pairs])
