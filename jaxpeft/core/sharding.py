"""Sharding: new leaves lie like the weight that they sit on, and products on explicit meshes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def inherit(leaf: jax.Array, weight: Any, axes: Sequence[int | None]) -> jax.Array:
    """`leaf` placed like `weight`: its axis i is split as axis `axes[i]` of the weight is.

    Axes marked None (a rank) and axes that do not divide are replicated. Weights without a
    `NamedSharding` say nothing, and the leaf stays where it is.
    """
    sharding = known(weight)
    if sharding is None:
        return leaf
    names = [*sharding.spec, *[None] * (len(weight.shape) - len(sharding.spec))]
    entries = [None if axis is None else names[axis] for axis in axes]
    return placed_as(leaf, fitting(sharding.mesh, entries, leaf.shape))


def _ways(mesh: Any, names: Any) -> int:
    """Over how many devices a partition entry (None, a name, or several) splits an axis."""
    several = names if isinstance(names, tuple) else () if names is None else (names,)
    ways = 1
    for name in several:
        ways *= mesh.shape[name]
    return ways


def explicit(x: jax.Array) -> NamedSharding | None:
    """The sharding in the type of `x`, where its mesh has explicit axes; else None.

    On auto meshes the compiler places results, and there is nothing to say.
    """
    sharding = jax.typeof(x).sharding
    kinds = getattr(getattr(sharding, "mesh", None), "axis_types", None) or ()
    return sharding if AxisType.Explicit in kinds else None


def spec_of(x: jax.Array) -> tuple[Any, ...]:
    """One partition entry an axis: mesh axis names, or None."""
    sharding = explicit(x)
    spec = tuple(sharding.spec) if sharding else ()
    return spec + (None,) * (x.ndim - len(spec))


def placed(mesh: Any, entries: Sequence[Any]) -> NamedSharding:
    """A sharding of these entries, in which no mesh axis splits more than one axis."""
    taken: set[str] = set()
    spec = []
    for entry in entries:
        several = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        spec.append(None if taken & set(several) else entry)
        taken |= set(several)
    return NamedSharding(mesh, PartitionSpec(*spec))


def like(x: jax.Array, other: jax.Array) -> jax.Array:
    """`x` resharded to the type of `other`, where the mesh is explicit."""
    wanted, now = explicit(other), explicit(x)
    if wanted is None or (now is not None and now.spec == wanted.spec):
        return x
    return jax.sharding.reshard(x, wanted)


def gathered(x: jax.Array) -> jax.Array:
    """`x` whole on each device, where the mesh is explicit."""
    sharding = explicit(x)
    return x if sharding is None else place(x, sharding, ())


def known(x: Any) -> NamedSharding | None:
    """The sharding of an array over a mesh, where it can be known: by type, or of a value."""
    sharding = getattr(x, "sharding", None)
    if isinstance(x, jax.core.Tracer):
        sharding = explicit(x)
    return sharding if isinstance(sharding, NamedSharding) else None


def fitting(mesh: Any, entries: Sequence[Any], shape: Sequence[int]) -> NamedSharding:
    """`placed(mesh, entries)` without those that do not divide their axis of `shape`."""
    split = zip(entries, shape, strict=False)
    return placed(mesh, [n if size % _ways(mesh, n) == 0 else None for n, size in split])


def spread(x: jax.Array, shape: Sequence[int]) -> NamedSharding | None:
    """The sharding of `x`, where it is known, for an array of `shape` with axes like those of `x`.

    Axes that do not divide, or that only one of the two has, are whole.
    """
    sharding = known(x)
    return sharding and fitting(sharding.mesh, (*sharding.spec, *[None] * len(shape)), shape)


def automatic(f: Callable[..., Any], out: Any, *args: Any) -> Any:
    """`f(*args)`, where the compiler places what lies between, on explicit meshes too.

    `out` are the shardings of the results there, of the structure of the results.
    """
    if not any(explicit(x) for x in jax.tree.leaves(args)):
        return f(*args)
    return jax.sharding.auto_axes(f, out_sharding=out)(*args)


def placed_as(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """`x` with this sharding, if it is known."""
    return x if sharding is None else place(x, sharding, tuple(sharding.spec))


def place(x: jax.Array, sharding: NamedSharding, entries: Sequence[Any]) -> jax.Array:
    """`x` with its axes split as `entries`, by the means that `sharding` asks for of a weight."""
    target = placed(sharding.mesh, entries)
    if AxisType.Explicit in (sharding.mesh.axis_types or ()):
        return jax.sharding.reshard(x, target)
    return jax.lax.with_sharding_constraint(x, target)


def manual(x: Any) -> Any:
    """What the type of `x` says of the axes of a `shard_map` around; None where it says nothing."""
    kind = getattr(jax.typeof(x), "manual_axis_type", None)
    return kind if getattr(kind, "varying", None) else None


def varying(x: Any) -> frozenset[str]:
    """The mesh axes of a `shard_map` around, over which `x` differs from device to device."""
    kind = manual(x)
    return kind.varying if kind else frozenset()


def vary(tree: Any, axes: Sequence[str]) -> Any:
    """Arrays that count as varying over these axes of a `shard_map`, as those beside them do."""

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(axis for axis in axes if axis not in varying(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)
