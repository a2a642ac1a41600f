"""New leaves take the sharding of the weight that they sit on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def inherit(leaf: jax.Array, weight: Any, axes: Sequence[int | None]) -> jax.Array:
    """`leaf` placed like `weight`: its axis i is split as axis `axes[i]` of the weight is.

    Axes marked None (a rank) and axes that do not divide are replicated. Weights without a
    `NamedSharding` say nothing, and the leaf stays where it is.
    """
    sharding = getattr(weight, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return leaf
    names = [*sharding.spec, *[None] * (len(weight.shape) - len(sharding.spec))]
    spec = [None if axis is None else names[axis] for axis in axes]
    fits = [
        name if size % _ways(sharding, name) == 0 else None
        for name, size in zip(spec, leaf.shape, strict=True)
    ]
    return jax.device_put(leaf, NamedSharding(sharding.mesh, PartitionSpec(*fits)))


def _ways(sharding: NamedSharding, names: Any) -> int:
    """Over how many devices a partition entry (None, a name, or several) splits an axis."""
    several = names if isinstance(names, tuple) else () if names is None else (names,)
    ways = 1
    for name in several:
        ways *= sharding.mesh.shape[name]
    return ways
