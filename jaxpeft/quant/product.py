"""Products with a quantized weight, whose backward pass keeps packed arrays alone.

    y = x W',   dx = dy W'^T,   W' = decode(packed), unpacked once for each of them

The gradient to `x` needs no residual but the packed weight; there is none to the weight.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpeft.core.structured import Contraction
from jaxpeft.quant.weight import QuantizedWeight

Array = jax.Array

# Larger matrices are unpacked a tile of outputs at a time: bytes of a dense tile.
TILE = 16 * 2**20


def product(weight: QuantizedWeight, op: Contraction) -> Array | None:
    """The result of a product, of any kind, with the weight on either side."""
    if op.kind == "gather":
        return op.bind(weight.materialize())
    tiles = _tiles(weight, op)
    if tiles:
        return _tiled(weight, op, *tiles)
    return _linear(weight, op)


def _linear(weight: QuantizedWeight, op: Contraction) -> Array:
    """The program's own operation on the unpacked weight, linear in its floating operands."""
    floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in op.others]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in op.others]

    def run(packed: Any, xs: Any, rest: Any) -> Array:
        return op.bind(weight.unpack(packed), *_woven(floating, xs, rest))

    @jax.custom_vjp
    def call(packed: Any, xs: Any, rest: Any) -> Array:
        return run(packed, xs, rest)

    def forward(packed: Any, xs: Any, rest: Any) -> Any:
        return call(packed, xs, rest), (packed, rest)

    def backward(kept: Any, dy: Array) -> Any:
        packed, rest = kept
        inputs = [shape for shape, is_float in zip(shapes, floating, strict=True) if is_float]
        (dxs,) = jax.linear_transpose(lambda xs: run(packed, xs, rest), inputs)(dy)
        return None, dxs, None

    call.defvjp(forward, backward)
    xs = [x for x, is_float in zip(op.others, floating, strict=True) if is_float]
    rest = [x for x, is_float in zip(op.others, floating, strict=True) if not is_float]
    return call(weight.packed, xs, rest)


def _woven(floating: Any, xs: Any, rest: Any) -> list[Any]:
    xs, rest = iter(xs), iter(rest)
    return [next(xs) if is_float else next(rest) for is_float in floating]


def _tiles(weight: QuantizedWeight, op: Contraction) -> tuple[int, str] | None:
    """How many tiles of outputs to take, and what they are to the product; None for one tile.

    "kept": `x W`, whose result's last axis is the outputs; "met": `g W^T`, which sums over them.
    """
    if op.kind != "dot_general" or weight.tail or len(op.others) != 1:
        return None
    stack, ins, outs = weight.groups
    (contracting, batch) = op.params["dimension_numbers"]
    plain = not stack and not any(batch) and len(weight.layout.axes) == 2
    if not plain or weight.format.name == "gguf":
        return None
    axis = contracting[op.side]
    role = {ins: "kept", outs: "met"}.get(weight.layout.axes[axis[0]]) if len(axis) == 1 else None
    count = _count(weight)
    return (count, role) if role and count > 1 else None


def _count(weight: QuantizedWeight) -> int:
    """The least number of equal tiles whose dense arrays are no larger than `TILE`."""
    *_, ins, outs = weight.packed_shape
    least = math.ceil(ins * outs * jnp.dtype(weight.dtype).itemsize / TILE)
    return next((n for n in range(least, min(outs, 4 * least) + 1) if outs % n == 0), 1)


def _tiled(weight: QuantizedWeight, op: Contraction, count: int, role: str) -> Array:
    """A scan over tiles of the outputs; each is unpacked, multiplied and forgotten."""
    packed = {name: _piled(array, count) for name, array in weight.packed.items()}
    width = weight.packed_shape[-1] // count
    layout = weight.layout.resized(weight.groups[2][0], width)
    tile = dataclasses.replace(weight, layout=layout)
    ((contracting, _), dtype) = op.params["dimension_numbers"], op.out.dtype
    (axis,) = contracting[1 - op.side]
    x = op.others[0]

    def part(packed: Any, x: Array) -> Array:
        piece = dataclasses.replace(tile, packed=packed)
        return _linear(piece, op._replace(others=(x,), bind=functools.partial(_dot, op)))

    if role == "kept":
        _, ys = lax.scan(lambda _, packed: (None, part(packed, x)), None, packed)
        last = op.side == 1
        return _joined(ys, op.out.shape, x.ndim - 1 if last else 0)
    xs = jnp.moveaxis(x.reshape(*x.shape[:axis], count, width, *x.shape[axis + 1 :]), axis, 0)
    wide = jnp.promote_types(dtype, jnp.float32)
    start = jnp.zeros(op.out.shape, wide)
    total, _ = lax.scan(
        lambda sum_, tile: (sum_ + part(*tile).astype(wide), None), start, (packed, xs)
    )
    return total.astype(dtype)


def _dot(op: Contraction, array: Array, x: Array) -> Array:
    """The program's own product of a tile."""
    operands = (array, x) if op.side == 0 else (x, array)
    numbers = op.params["dimension_numbers"]
    return lax.dot_general(
        *operands, numbers, op.params["precision"], op.params["preferred_element_type"]
    )


def _piled(array: Array, count: int) -> Array:
    """Tiles of the last axis, stacked in front; what is the same for all outputs is repeated."""
    if array.shape[-1] == 1:
        return jnp.broadcast_to(array, (count, *array.shape))
    split = array.reshape(*array.shape[:-1], count, array.shape[-1] // count)
    return jnp.moveaxis(split, -2, 0)


def _joined(ys: Array, shape: tuple[int, ...], axis: int) -> Array:
    return jnp.moveaxis(ys, 0, axis).reshape(shape)
