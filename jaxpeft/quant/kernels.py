"""Fused kernels: a tile of the packed weight is unpacked in registers, next to its product.

    y = x W',   dx = dy W'^T,   W'[i, j] = (value(code[i, j]) - zero[i / b, j]) * scale[i / b, j]

With 4-bit codes row `2i` of the weight is the low half of byte `i` and row `2i + 1` the high half.
Nothing is interleaved in a kernel: it multiplies the even columns of `x` by the low halves and the
odd columns by the high ones, which adds up to the same. Letters: M rows of x, K inputs, N outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxpeft.quant.formats import blocks
from jaxpeft.quant.formats.codebook import Codebook, decode_scales
from jaxpeft.quant.formats.integer import Integer

Array = jax.Array

# A tile of x and dy has at most so many rows, one of the weight so many columns.
ROWS, COLUMNS, INPUTS = 128, 512, 512

# Bytes that a tile of x, dy or codes, over all inputs or outputs, takes of a core's memory.
MEMORY = 3 * 2**20


class Planes(NamedTuple):
    """A packed matrix as kernels read it.

    Attributes:
        codes: uint8 `(K / 2, N)`, or int8 `(K, N)`.
        scale: float32 `(K / b, N)`.
        zero: float32 of the same shape.
        value: from int32 codes to float32.
        halves: rows of the weight in a row of codes: 2 or 1.
    """

    codes: Array
    scale: Array
    zero: Array
    value: Callable[[Array], Array]
    halves: int


def planes(fmt: Any, packed: Any) -> Planes | None:
    """The planes of a packed matrix; None for a format that has no kernel."""
    if isinstance(fmt, Codebook):
        scale = decode_scales(packed) if fmt.double else packed["absmax"]
        value = functools.partial(blocks.lookup, fmt.table)
        return Planes(packed["codes"], scale, jnp.zeros_like(scale), value, 2)
    if not isinstance(fmt, Integer) or fmt.indexed:
        return None
    scale = packed["scale"].astype(jnp.float32)
    middle = jnp.full_like(scale, 8 if fmt.bits == 4 else 0)
    zero = middle if fmt.symmetric else packed["zero"].astype(jnp.float32)
    return Planes(packed["codes"], scale, zero, _as_float, 8 // fmt.bits)


def _as_float(codes: Array) -> Array:
    return codes.astype(jnp.float32)


class Tiles(NamedTuple):
    """Sizes of the tiles of a product: rows, inputs and outputs."""

    rows: int
    inputs: int
    columns: int


def tiles(m: int, weight: Planes) -> Tiles | None:
    """Tiles for `x (m, K)` and the weight; None if none fit."""
    (rows, n), block = weight.codes.shape, _block(weight)
    k = rows * weight.halves
    fits = (c for c in (COLUMNS, 256, 128) if n % c == 0 and rows * c <= MEMORY)
    columns = next(fits, None)
    whole = (i for i in (INPUTS, 256) if k % i == 0 and (i % block == 0 or block % i == 0))
    inputs = next(whole, None)
    most = next((r for r in (ROWS, 64, 32, 16) if 2 * r * max(k, n) <= MEMORY), None)
    if columns is None or inputs is None or most is None:
        return None
    return Tiles(min(most, max(16, pl.next_power_of_2(m))), inputs, columns)


def plan(fmt: Any, packed: Any, m: int) -> Tiles | None:
    """Tiles for `m` rows of x and a packed matrix; None where no kernel applies."""
    found: list[Planes | None] = []

    def arrays(packed: Any) -> Any:
        found.append(planes(fmt, packed))
        return found[0] and found[0][:3]

    shapes = jax.eval_shape(arrays, dict(packed))
    if found[0] is None:
        return None
    return tiles(m, found[0]._replace(codes=shapes[0], scale=shapes[1], zero=shapes[2]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def product(fmt: Any, tile: Tiles, interpret: bool, packed: Any, x: Array) -> Array:
    """`x (M, K)` times a packed matrix; its backward pass keeps the packed arrays alone."""
    return multiply(x, _planes(fmt, packed), tile, interpret=interpret)


def _forward(fmt: Any, tile: Tiles, interpret: bool, packed: Any, x: Array) -> Any:
    return product(fmt, tile, interpret, packed, x), packed


def _backward(fmt: Any, tile: Tiles, interpret: bool, packed: Any, dy: Array) -> Any:
    return None, multiply_transposed(dy, _planes(fmt, packed), tile, interpret=interpret)


product.defvjp(_forward, _backward)


def _planes(fmt: Any, packed: Any) -> Planes:
    found = planes(fmt, packed)
    assert found is not None
    return found


def _block(weight: Planes) -> int:
    """Rows of the weight that share a row of scales."""
    return weight.codes.shape[0] * weight.halves // weight.scale.shape[0]


def multiply(x: Array, weight: Planes, tile: Tiles, *, interpret: bool = False) -> Array:
    """`x (M, K)` times the weight: `(M, N)` in the dtype of `x`."""
    m, n = x.shape[0], weight.codes.shape[1]
    x = _padded(x, tile.rows)
    parts = _halves(x, weight.halves)
    scales = [_by_tile(a, weight, tile) for a in (weight.scale, weight.zero)]
    kernel = functools.partial(_multiply, weight=weight, tile=tile)
    per_column = pl.BlockSpec((*scales[0].shape[:2], tile.columns), lambda i, j: (0, 0, j))
    codes = pl.BlockSpec((weight.codes.shape[0], tile.columns), lambda i, j: (0, j))
    whole = [pl.BlockSpec((tile.rows, part.shape[1]), lambda i, j: (i, 0)) for part in parts]
    y = pl.pallas_call(
        kernel,
        grid=(x.shape[0] // tile.rows, n // tile.columns),
        in_specs=[*whole, codes, per_column, per_column],
        out_specs=pl.BlockSpec((tile.rows, tile.columns), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], n), x.dtype),
        interpret=interpret,
    )(*parts, weight.codes, *scales)
    return y[:m]


def _multiply(*refs: Any, weight: Planes, tile: Tiles) -> None:
    *xs, codes, scale, zero, y = refs
    rows, apart = tile.inputs // weight.halves, _apart(weight, tile)

    def step(k: Any, total: Array) -> Array:
        at = pl.ds(k * rows, rows)
        parts = _unpacked(codes[at, :], scale[k // apart], zero[k // apart], weight)
        for x, part in zip(xs, parts, strict=True):
            total += _dot(x[:, at], part.astype(x.dtype), ((1,), (0,)))
        return total

    start = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    total = lax.fori_loop(0, codes.shape[0] // rows, step, start)
    y[...] = total.astype(y.dtype)


def multiply_transposed(
    dy: Array, weight: Planes, tile: Tiles, *, interpret: bool = False
) -> Array:
    """`dy (M, N)` times the weight's transpose: `(M, K)` in the dtype of `dy`."""
    m, rows = dy.shape[0], tile.inputs // weight.halves
    dy = _padded(dy, tile.rows)
    count, apart = weight.codes.shape[0] // rows, _apart(weight, tile)
    arrays = [_by_tile(a, weight, tile) for a in (weight.scale, weight.zero)]
    codes = pl.BlockSpec((rows, weight.codes.shape[1]), lambda i, k: (k, 0))
    scales = pl.BlockSpec((1, *arrays[0].shape[1:]), lambda i, k: (k // apart, 0, 0))
    outs = [jax.ShapeDtypeStruct((dy.shape[0], weight.codes.shape[0]), dy.dtype)] * weight.halves
    parts = pl.pallas_call(
        functools.partial(_multiply_transposed, weight=weight, tile=tile),
        grid=(dy.shape[0] // tile.rows, count),
        in_specs=[
            pl.BlockSpec((tile.rows, dy.shape[1]), lambda i, k: (i, 0)),
            codes,
            scales,
            scales,
        ],
        out_specs=[pl.BlockSpec((tile.rows, rows), lambda i, k: (i, k))] * weight.halves,
        out_shape=outs,
        interpret=interpret,
    )(dy, weight.codes, *arrays)
    return jnp.stack(parts, axis=-1).reshape(dy.shape[0], -1)[:m]


def _multiply_transposed(*refs: Any, weight: Planes, tile: Tiles) -> None:
    dy, codes, scale, zero, *outs = refs

    def step(j: Any, totals: Any) -> Any:
        at = pl.ds(j * tile.columns, tile.columns)
        parts = _unpacked(codes[:, at], scale[0, :, at], zero[0, :, at], weight)
        return [
            total + _dot(dy[:, at], part.astype(dy.dtype).T, ((1,), (0,)))
            for total, part in zip(totals, parts, strict=True)
        ]

    start = [jnp.zeros(out.shape, jnp.float32) for out in outs]
    totals = lax.fori_loop(0, codes.shape[1] // tile.columns, step, start)
    for out, total in zip(outs, totals, strict=True):
        out[...] = total.astype(out.dtype)


def _unpacked(codes: Array, scale: Array, zero: Array, weight: Planes) -> list[Array]:
    """A tile's even and odd rows, or all of them, in float32."""
    wide = codes.astype(jnp.int32)
    parts = [wide] if weight.halves == 1 else [wide & 15, wide >> 4]
    s, z = (_repeated(x, codes.shape[0] // x.shape[0]) for x in (scale, zero))
    return [(weight.value(part) - z) * s for part in parts]


def _apart(weight: Planes, tile: Tiles) -> int:
    """Tiles of inputs that share a row of scales."""
    return max(1, _block(weight) // tile.inputs)


def _by_tile(scale: Array, weight: Planes, tile: Tiles) -> Array:
    """Rows of scales `(tiles of inputs, rows a tile, N)`; whole axes need no alignment."""
    count = weight.codes.shape[0] * weight.halves // tile.inputs // _apart(weight, tile)
    return scale.reshape(count, -1, scale.shape[1])


def _repeated(x: Array, times: int) -> Array:
    if x.shape[0] == 1:
        return x
    return jnp.broadcast_to(x[:, None, :], (x.shape[0], times, x.shape[1])).reshape(
        x.shape[0] * times, x.shape[1]
    )


def _dot(a: Array, b: Array, contracting: Any) -> Array:
    return lax.dot_general(a, b, (contracting, ((), ())), preferred_element_type=jnp.float32)


def _halves(x: Array, halves: int) -> list[Array]:
    return [x] if halves == 1 else [x[:, 0::2], x[:, 1::2]]


def _padded(x: Array, rows: int) -> Array:
    return jnp.pad(x, ((0, -x.shape[0] % rows), (0, 0)))
