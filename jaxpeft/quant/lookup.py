"""Rows of a packed table: the columns of the packed arrays that are looked up, and no others."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxpeft.core.sharding import explicit
from jaxpeft.core.structured import Contraction
from jaxpeft.quant.weight import QuantizedWeight

Mode = lax.GatherScatterMode


def lookup(weight: QuantizedWeight, op: Contraction) -> Any:
    """What a `gather` along the weight's outputs gives; None if it is another one.

    A table of a file `(vocabulary, features)` is packed along its features, which makes the
    vocabulary its outputs: any of them can be taken from packed arrays as from a dense one.
    """
    axis, (indices,) = _indexed(weight, op), op.others
    if axis is None or op.params.get("mode") == Mode.ONE_HOT:
        return None
    ids, size = indices[..., 0].reshape(-1), weight.shape[axis]
    packed = {
        name: array if array.shape[-1] == 1 else jnp.take(array, ids, axis=-1, mode="clip")
        for name, array in weight.packed.items()
    }
    layout = weight.layout.resized(weight.groups[2][0], ids.size)
    rows = dataclasses.replace(weight, packed=packed, layout=layout).materialize()
    rows = jnp.moveaxis(rows, axis, 0)
    if op.params.get("mode") in (Mode.FILL_OR_DROP, None):
        fill = op.params.get("fill_value")
        there = ((ids >= 0) & (ids < size)).reshape(-1, *[1] * (rows.ndim - 1))
        rows = jnp.where(there, rows, jnp.nan if fill is None else fill)
    return _placed(rows.reshape(*indices.shape[:-1], *rows.shape[1:]), op).astype(op.out.dtype)


def _indexed(weight: QuantizedWeight, op: Contraction) -> int | None:
    """The axis that is indexed, where it is the outputs' and all others are taken whole."""
    dims, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
    stack, _, outs = weight.groups
    matrix = not weight.tail and not stack and len(outs) == 1 and op.side == 0
    if not matrix or len(dims.start_index_map) != 1 or dims.operand_batching_dims:
        return None
    (axis,) = dims.start_index_map
    whole = math.prod(weight.shape[:axis] + weight.shape[axis + 1 :]) == math.prod(sizes)
    if dims.collapsed_slice_dims != (axis,) or not whole or weight.layout.axes[axis] != outs:
        return None
    return None if any(explicit(x) for x in weight.packed.values()) else axis


def _placed(rows: Any, op: Contraction) -> Any:
    """The result with its axes as the operation has them, from the indices' axes in front."""
    offsets = op.params["dimension_numbers"].offset_dims
    front = rows.ndim - len(offsets)
    order = iter(range(front)), iter(range(front, rows.ndim))
    return rows.transpose([next(order[axis in offsets]) for axis in range(rows.ndim)])
