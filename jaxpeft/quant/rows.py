"""A product with few rows, as of a decoding step: packed bytes are read once, no matrix is made.

    y[m, j] = sum_b (scale[b, j] sum_i x[m, i] value(code[i, j]) + shift[b, j] sum_i x[m, i])

with `i` over the inputs of block `b`. Inputs are taken in groups: a step takes one row of codes of
every group, multiplies, and adds to sums as wide as the outputs; scales come last, once a block. On
a CPU the steps are a loop of vector instructions over sums in a near cache. For a GPU they are
written out, so that one kernel has many independent loads on their way and sums in registers.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxpeft.core.sharding import vary, varying
from jaxpeft.quant.formats import blocks
from jaxpeft.quant.planes import Planes, abstract, columns, planes, values

Array = jax.Array

# More rows are multiplied by the dense matrix: here codes are unpacked for each row anew.
FEW = 4
# Rows of codes in a group, at most: steps that a GPU's kernel is written out for.
STEPS = 32


def applies(fmt: Any, packed: Any, m: int) -> bool:
    """Whether a packed matrix has a product with `m` rows here."""
    return m <= FEW and abstract(fmt, packed) is not None


# Jitted, so that a model traces it once for all matrices of a shape.
@functools.partial(jax.jit, static_argnames=("fmt", "dtype", "unroll"))
def multiply(fmt: Any, packed: Any, x: Array, dtype: DTypeLike, *, unroll: bool) -> Array:
    """`x (M, K)` times a packed matrix: `(M, N)` of this dtype, summed in float32."""
    weight = planes(fmt, packed)
    assert weight is not None
    scale, *shift = weight.scales
    x = x.astype(jnp.float32)
    parts = [total * scale for total in _totals(weight, x, unroll)]
    if shift:
        sums = x.reshape(len(x), len(scale), -1).sum(-1)
        parts = [y + row[:, None] * shift[0] for y, row in zip(parts, sums, strict=True)]
    # Row by row: one sum of all would transpose them first.
    return jnp.stack([part.sum(0) for part in parts]).astype(dtype)


def _totals(weight: Planes, x: Array, unroll: bool) -> list[Array]:
    """For each row of `x`, sums over the inputs of each block, without its scale: `(K / b, N)`."""
    rows, n = weight.codes.shape
    steps = _steps(weight.block // weight.halves)
    codes = weight.codes.reshape(-1, steps, n)
    xs = [part.reshape(len(x), -1, steps) for part in columns(x, weight)]
    value = functools.partial(blocks.lookup, weight.table or ())

    def step(i: Any, totals: list[Array]) -> list[Array]:
        parts = values(codes[:, i], weight, value)
        return [
            total + sum(x[m, :, i, None] * part for x, part in zip(xs, parts, strict=True))
            for m, total in enumerate(totals)
        ]

    zero = jnp.zeros((rows // steps, n), jnp.float32)
    start = [vary(zero, tuple(varying(x) | varying(codes)))] * len(x)
    totals = lax.fori_loop(0, steps, step, start, unroll=steps if unroll else 1)
    return [total.reshape(len(weight.scales[0]), -1, n).sum(1) for total in totals]


def _steps(rows: int) -> int:
    """The largest divisor of the rows of codes in a block that is no more than `STEPS`."""
    return next(count for count in range(min(rows, STEPS), 0, -1) if rows % count == 0)
