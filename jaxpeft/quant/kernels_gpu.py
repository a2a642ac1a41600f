"""The fused kernels for GPUs, by Pallas' Triton backend.

A tile of inputs never crosses a block, so that it has one row of scales. Codes are looked up in a
table that stays in the nearest cache: sixteen neighbouring words, one load a weight, where a tree
of selections takes twenty instructions. A product with few rows streams the packed bytes once:
programs share out the outputs and the inputs, and their sums are added up.

The Triton backend is on its way out of JAX (deprecated in 0.11), and nobody has measured these
kernels yet: they run where `compute="pallas"` asks for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxpeft.quant.planes import (
    Planes,
    columns,
    dot,
    joined,
    padded,
    rows_for,
    transposed,
    unpacked,
)

Array = jax.Array

# A product of so many rows or fewer multiplies row by row; more go through tensor cores.
FEW = 8
ROWS = 128
# Programs of a product with few rows: several for each of a hundred processors.
PROGRAMS = 1024


class Tiles(NamedTuple):
    """Sizes of tiles: rows, inputs and outputs; `splits`, parts of the inputs, with few rows."""

    rows: int
    inputs: int
    columns: int
    splits: int


def tiles(m: int, weight: Planes) -> Tiles | None:
    """Tiles for `x (m, K)` and the weight; None if none fit."""
    k, n = weight.shape
    inputs = next((i for i in (64, 32) if k % i == 0 and weight.block % i == 0), None)
    wide = next((c for c in (128, 64, 32, 16) if n % c == 0), None)
    if inputs is None or wide is None:
        return None
    splits, most = 1, max(1, PROGRAMS * wide // n)
    while m <= FEW and 2 * splits <= most and k // inputs % (2 * splits) == 0:
        splits *= 2
    return Tiles(rows_for(m, ROWS), inputs, wide, splits)


def multiply(x: Array, weight: Planes, tile: Tiles, *, interpret: bool = False) -> Array:
    """`x (M, K)` times the weight: `(M, N)` in the dtype of `x`."""
    m, n = x.shape[0], weight.codes.shape[1]
    if m <= FEW:
        return _multiply_few(x, weight, tile, interpret=interpret)
    x = padded(x, tile.rows)
    parts = columns(x, weight)
    whole = [pl.BlockSpec((tile.rows, part.shape[1]), lambda i, j: (i, 0)) for part in parts]
    y = _call(
        functools.partial(_multiply, weight=weight, tile=tile),
        weight,
        interpret,
        grid=(x.shape[0] // tile.rows, n // tile.columns),
        xs=list(zip(parts, whole, strict=True)),
        codes=pl.BlockSpec((weight.codes.shape[0], tile.columns), lambda i, j: (0, j)),
        scales=pl.BlockSpec((weight.scales[0].shape[0], tile.columns), lambda i, j: (0, j)),
        out_specs=pl.BlockSpec((tile.rows, tile.columns), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], n), x.dtype),
    )
    return y[:m]


def _multiply(*refs: Any, weight: Planes, tile: Tiles) -> None:
    xs, codes, scales, value, (y,) = _named(refs, weight, weight.halves)
    rows, apart = tile.inputs // weight.halves, weight.block // tile.inputs

    def step(k: Any, total: Array) -> Array:
        at, scale = pl.ds(k * rows, rows), pl.ds(k // apart, 1)
        parts = unpacked(codes[at, :], [s[scale, :] for s in scales], weight, value)
        for x, part in zip(xs, parts, strict=True):
            total += dot(x[:, at], part.astype(x.dtype))
        return total

    start = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    total = lax.fori_loop(0, codes.shape[0] // rows, step, start)
    y[...] = total.astype(y.dtype)


def _multiply_few(x: Array, weight: Planes, tile: Tiles, *, interpret: bool) -> Array:
    """As `multiply`: sums over parts of the inputs, `(splits, M, N)`, which are added up."""
    (m, k), n, splits = x.shape, weight.codes.shape[1], tile.splits
    parts = columns(x, weight)
    share = k // weight.halves // splits
    each = [pl.BlockSpec((m, share), lambda j, s: (0, s)) for _ in parts]
    sums = _call(
        functools.partial(_multiply_rows, weight=weight, tile=tile),
        weight,
        interpret,
        grid=(n // tile.columns, splits),
        xs=list(zip(parts, each, strict=True)),
        codes=pl.BlockSpec((share, tile.columns), lambda j, s: (s, j)),
        scales=pl.BlockSpec((weight.scales[0].shape[0], tile.columns), lambda j, s: (0, j)),
        out_specs=pl.BlockSpec((None, m, tile.columns), lambda j, s: (s, 0, j)),
        out_shape=jax.ShapeDtypeStruct((splits, m, n), jnp.float32),
    )
    return sums.sum(axis=0).astype(x.dtype)


def _multiply_rows(*refs: Any, weight: Planes, tile: Tiles) -> None:
    xs, codes, scales, value, (y,) = _named(refs, weight, weight.halves)
    rows, apart = tile.inputs // weight.halves, weight.block // tile.inputs
    m, steps = xs[0].shape[0], codes.shape[0] // rows
    first = pl.program_id(1) * steps

    def step(k: Any, totals: Any) -> Any:
        at, scale = pl.ds(k * rows, rows), pl.ds((first + k) // apart, 1)
        parts = unpacked(codes[at, :], [s[scale, :] for s in scales], weight, value)
        pairs = list(zip(xs, parts, strict=True))
        return [
            total + sum(x[i, at].astype(jnp.float32)[:, None] * part for x, part in pairs)
            for i, total in enumerate(totals)
        ]

    # Sums of a tile's rows are left apart until the end: adding them up takes other threads.
    start = [jnp.zeros((rows, tile.columns), jnp.float32)] * m
    for i, total in enumerate(lax.fori_loop(0, steps, step, start)):
        y[i, :] = jnp.sum(total, axis=0)


def multiply_transposed(
    dy: Array, weight: Planes, tile: Tiles, *, interpret: bool = False
) -> Array:
    """`dy (M, N)` times the weight's transpose: `(M, K)` in the dtype of `dy`."""
    m, rows, apart = dy.shape[0], tile.inputs // weight.halves, weight.block // tile.inputs
    dy = padded(dy, tile.rows)
    outs = [jax.ShapeDtypeStruct((dy.shape[0], weight.codes.shape[0]), dy.dtype)] * weight.halves
    parts = _call(
        functools.partial(_multiply_transposed, weight=weight, tile=tile),
        weight,
        interpret,
        grid=(dy.shape[0] // tile.rows, weight.codes.shape[0] // rows),
        xs=[(dy, pl.BlockSpec((tile.rows, dy.shape[1]), lambda i, k: (i, 0)))],
        codes=pl.BlockSpec((rows, weight.codes.shape[1]), lambda i, k: (k, 0)),
        scales=pl.BlockSpec((1, weight.codes.shape[1]), lambda i, k: (k // apart, 0)),
        out_specs=[pl.BlockSpec((tile.rows, rows), lambda i, k: (i, k))] * weight.halves,
        out_shape=outs,
    )
    return joined(parts, weight)[:m]


def _multiply_transposed(*refs: Any, weight: Planes, tile: Tiles) -> None:
    (dy,), codes, scales, value, outs = _named(refs, weight, 1)

    def scales_at(at: Any) -> list[Array]:
        return [s[:, at] for s in scales]

    transposed(dy, codes, scales_at, outs, weight, value, tile.columns)


def _call(
    kernel: Callable[..., None],
    weight: Planes,
    interpret: bool,
    *,
    grid: tuple[int, int],
    xs: list[tuple[Array, pl.BlockSpec]],
    codes: pl.BlockSpec,
    scales: pl.BlockSpec,
    **out: Any,
) -> Any:
    """The kernel of refs `(*xs, codes, *scales, table if any, *outs)`."""
    tables = [] if weight.table is None else [jnp.asarray(weight.table, jnp.float32)]
    specs = [pl.BlockSpec((16,), lambda *_: (0,)) for _ in tables]
    arrays, whole = zip(*xs, strict=True)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[*whole, codes, *[scales] * len(weight.scales), *specs],
        interpret=interpret,
        compiler_params=None if interpret else _parameters(),
        **out,
    )(*arrays, weight.codes, *weight.scales, *tables)


def _parameters() -> Any:
    from jax.experimental.pallas import triton

    return triton.CompilerParams(num_warps=8, num_stages=3)


def _named(refs: Any, weight: Planes, count: int) -> tuple[Any, Any, Any, Any, Any]:
    """The refs of a kernel with `count` arrays in front: xs, codes, scales, lookup, outs."""
    xs, codes, rest = refs[:count], refs[count], refs[count + 1 :]
    scales, rest = rest[: len(weight.scales)], rest[len(weight.scales) :]
    if weight.table is None:
        return xs, codes, scales, None, rest
    return xs, codes, scales, lambda codes: rest[0][codes], rest[1:]
