"""Reads the shape-only primitives of a program as `View`s of the weight that they act on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxpeft.core.labels import View

Bind = Callable[[Any], Any]


def read(name: str, params: dict[str, Any], shape: tuple[int, ...], others: Sequence[Any]) -> Any:
    """`(kind, args)` of the view that primitive `name` takes of its first operand; None if none.

    `others` are the operands after the weight (the starts of a `dynamic_slice`).
    """
    reader = _READERS.get(name)
    return reader(params, shape, others) if reader else None


def _convert(params: dict[str, Any], shape: tuple[int, ...], others: Sequence[Any]) -> Any:
    floating = jnp.issubdtype(params["new_dtype"], jnp.floating)
    return ("convert", (params["new_dtype"],)) if floating else None


def _transpose(params: dict[str, Any], shape: tuple[int, ...], others: Sequence[Any]) -> Any:
    return "transpose", (tuple(params["permutation"]),)


def _squeeze(params: dict[str, Any], shape: tuple[int, ...], others: Sequence[Any]) -> Any:
    return "squeeze", (tuple(params["dimensions"]),)


def _reshape(params: dict[str, Any], shape: tuple[int, ...], others: Sequence[Any]) -> Any:
    return (
        None if params.get("dimensions") is not None else ("reshape", (tuple(params["new_sizes"]),))
    )


def _broadcast(params: dict[str, Any], shape: tuple[int, ...], others: Sequence[Any]) -> Any:
    if others:
        return None
    return "broadcast", (tuple(params["shape"]), tuple(params["broadcast_dimensions"]))


def _slice(params: dict[str, Any], shape: tuple[int, ...], others: Sequence[Any]) -> Any:
    starts, limits = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or (1,) * len(shape)
    sizes = tuple(
        -(-(stop - start) // stride)
        for start, stop, stride in zip(starts, limits, strides, strict=True)
    )
    return "slice", (tuple(starts), sizes, tuple(strides))


def _dynamic_slice(params: dict[str, Any], shape: tuple[int, ...], others: Sequence[Any]) -> Any:
    if len(others) != len(shape):
        return None
    return "slice", (tuple(others), tuple(params["slice_sizes"]), (1,) * len(shape))


def _keep(params: dict[str, Any], shape: tuple[int, ...], others: Sequence[Any]) -> Any:
    return None if others else ("keep", ())


def _place(params: dict[str, Any], shape: tuple[int, ...], others: Sequence[Any]) -> Any:
    sharding = params.get("sharding", params.get("dst_sharding"))
    return ("place", (sharding,)) if isinstance(sharding, NamedSharding) else ("keep", ())


_READERS: dict[str, Callable[[dict[str, Any], tuple[int, ...], Sequence[Any]], Any]] = {
    "convert_element_type": _convert,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "copy": _keep,
    "copy_p": _keep,
    "name": _keep,
    "sharding_constraint": _place,
    "reshard": _place,
    "mesh_cast": _keep,
    "layout_constraint": _keep,
}


def pieces(params: dict[str, Any], shape: tuple[int, ...]) -> list[View]:
    """The slices that a `split` takes, in order."""
    axis, start, views = params["axis"], 0, []
    for size in map(int, params["sizes"]):
        starts = tuple(start if i == axis else 0 for i in range(len(shape)))
        sizes = tuple(size if i == axis else n for i, n in enumerate(shape))
        views.append(View("slice", (starts, sizes, (1,) * len(shape)), _slicer(starts, sizes)))
        start += size
    return views


def _slicer(starts: tuple[int, ...], sizes: tuple[int, ...]) -> Bind:
    index = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
    return lambda array: array[index]
