"""Fused kernels: a tile of the packed weight is unpacked in registers, next to its product.

    y = x W',   dx = dy W'^T

Here are those for TPUs, and what chooses among kernels; those for GPUs are in `kernels_gpu.py`.
Letters: M rows of x, K inputs, N outputs.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxpeft.quant import kernels_gpu
from jaxpeft.quant.formats import blocks
from jaxpeft.quant.planes import (
    Planes,
    abstract,
    columns,
    dot,
    joined,
    padded,
    planes,
    rows_for,
    transposed,
    unpacked,
)

Array = jax.Array

# A tile of x and dy has at most so many rows, one of the weight so many columns.
ROWS, COLUMNS, INPUTS = 128, 512, 512

# Bytes that a tile of x, dy or codes, over all inputs or outputs, takes of a core's memory.
MEMORY = 3 * 2**20


class Tiles(NamedTuple):
    """Sizes of the tiles of a product: rows, inputs and outputs."""

    rows: int
    inputs: int
    columns: int


def tiles(m: int, weight: Planes) -> Tiles | None:
    """Tiles for `x (m, K)` and the weight; None if none fit."""
    (k, n), block = weight.shape, weight.block
    fits = (c for c in (COLUMNS, 256, 128) if n % c == 0 and weight.codes.shape[0] * c <= MEMORY)
    wide = next(fits, None)
    whole = (i for i in (INPUTS, 256) if k % i == 0 and (i % block == 0 or block % i == 0))
    inputs = next(whole, None)
    most = next((r for r in (ROWS, 64, 32, 16) if 2 * r * max(k, n) <= MEMORY), None)
    if wide is None or inputs is None or most is None:
        return None
    return Tiles(rows_for(m, most), inputs, wide)


def plans(fmt: Any, packed: Any, m: int) -> dict[str, Any]:
    """Tiles for `m` rows of x and a packed matrix, by platform; those that have a kernel for it."""
    weight = abstract(fmt, packed)
    if weight is None:
        return {}
    found = {"tpu": tiles(m, weight), "cuda": kernels_gpu.tiles(m, weight)}
    return {platform: tile for platform, tile in found.items() if tile is not None}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def product(fmt: Any, tile: Any, interpret: bool, packed: Any, x: Array) -> Array:
    """`x (M, K)` times a packed matrix; its backward pass keeps the packed arrays alone."""
    run = multiply if isinstance(tile, Tiles) else kernels_gpu.multiply
    return run(x, _planes(fmt, packed), tile, interpret=interpret)


def _forward(fmt: Any, tile: Any, interpret: bool, packed: Any, x: Array) -> Any:
    return product(fmt, tile, interpret, packed, x), packed


def _backward(fmt: Any, tile: Any, interpret: bool, packed: Any, dy: Array) -> Any:
    gpu = kernels_gpu.multiply_transposed
    run = multiply_transposed if isinstance(tile, Tiles) else gpu
    return None, run(dy, _planes(fmt, packed), tile, interpret=interpret)


product.defvjp(_forward, _backward)


def _planes(fmt: Any, packed: Any) -> Planes:
    found = planes(fmt, packed)
    assert found is not None
    return found


def multiply(x: Array, weight: Planes, tile: Tiles, *, interpret: bool = False) -> Array:
    """`x (M, K)` times the weight: `(M, N)` in the dtype of `x`."""
    m, n = x.shape[0], weight.codes.shape[1]
    x = padded(x, tile.rows)
    parts = columns(x, weight)
    scales = [_by_tile(a, weight, tile) for a in weight.scales]
    kernel = functools.partial(_multiply, weight=weight, tile=tile)
    per_column = pl.BlockSpec((*scales[0].shape[:2], tile.columns), lambda i, j: (0, 0, j))
    codes = pl.BlockSpec((weight.codes.shape[0], tile.columns), lambda i, j: (0, j))
    whole = [pl.BlockSpec((tile.rows, part.shape[1]), lambda i, j: (i, 0)) for part in parts]
    y = pl.pallas_call(
        kernel,
        grid=(x.shape[0] // tile.rows, n // tile.columns),
        in_specs=[*whole, codes, *[per_column] * len(scales)],
        out_specs=pl.BlockSpec((tile.rows, tile.columns), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], n), x.dtype),
        interpret=interpret,
    )(*parts, weight.codes, *scales)
    return y[:m]


def _multiply(*refs: Any, weight: Planes, tile: Tiles) -> None:
    xs, (codes, *scales, y) = refs[: weight.halves], refs[weight.halves :]
    rows, apart = tile.inputs // weight.halves, _apart(weight, tile)
    value = functools.partial(_value, weight)

    def step(k: Any, total: Array) -> Array:
        at = pl.ds(k * rows, rows)
        parts = unpacked(codes[at, :], [s[k // apart] for s in scales], weight, value)
        for x, part in zip(xs, parts, strict=True):
            total += dot(x[:, at], part.astype(x.dtype))
        return total

    start = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    total = lax.fori_loop(0, codes.shape[0] // rows, step, start)
    y[...] = total.astype(y.dtype)


def multiply_transposed(
    dy: Array, weight: Planes, tile: Tiles, *, interpret: bool = False
) -> Array:
    """`dy (M, N)` times the weight's transpose: `(M, K)` in the dtype of `dy`."""
    m, rows = dy.shape[0], tile.inputs // weight.halves
    dy = padded(dy, tile.rows)
    count, apart = weight.codes.shape[0] // rows, _apart(weight, tile)
    arrays = [_by_tile(a, weight, tile) for a in weight.scales]
    codes = pl.BlockSpec((rows, weight.codes.shape[1]), lambda i, k: (k, 0))
    scales = pl.BlockSpec((1, *arrays[0].shape[1:]), lambda i, k: (k // apart, 0, 0))
    outs = [jax.ShapeDtypeStruct((dy.shape[0], weight.codes.shape[0]), dy.dtype)] * weight.halves
    whole = pl.BlockSpec((tile.rows, dy.shape[1]), lambda i, k: (i, 0))
    parts = pl.pallas_call(
        functools.partial(_multiply_transposed, weight=weight, tile=tile),
        grid=(dy.shape[0] // tile.rows, count),
        in_specs=[whole, codes, *[scales] * len(arrays)],
        out_specs=[pl.BlockSpec((tile.rows, rows), lambda i, k: (i, k))] * weight.halves,
        out_shape=outs,
        interpret=interpret,
    )(dy, weight.codes, *arrays)
    return joined(parts, weight)[:m]


def _multiply_transposed(*refs: Any, weight: Planes, tile: Tiles) -> None:
    (dy, codes, *scales), outs = refs[: -weight.halves], refs[-weight.halves :]
    value = functools.partial(_value, weight)

    def scales_at(at: Any) -> list[Array]:
        return [s[0, :, at] for s in scales]

    transposed(dy, codes, scales_at, outs, weight, value, tile.columns)


def _value(weight: Planes, codes: Array) -> Array:
    assert weight.table is not None
    return blocks.selected(weight.table, codes)


def _apart(weight: Planes, tile: Tiles) -> int:
    """Tiles of inputs that share a row of scales."""
    return max(1, weight.block // tile.inputs)


def _by_tile(scale: Array, weight: Planes, tile: Tiles) -> Array:
    """Rows of scales `(tiles of inputs, rows a tile, N)`; whole axes need no alignment."""
    count = weight.shape[0] // tile.inputs // _apart(weight, tile)
    return scale.reshape(count, -1, scale.shape[1])
