"""A packed matrix as fused kernels read it: codes, scales, and zero points where there are any.

    W'[i, j] = (value(code[i, j]) - zero[i / b, j]) * scale[i / b, j]

With 4-bit codes row `2i` of the weight is the low half of byte `i` and row `2i + 1` the high half.
Nothing is interleaved in a kernel: it multiplies the even columns of `x` by the low halves and the
odd columns by the high ones, which adds up to the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxpeft.quant.formats.codebook import Codebook, decode_scales
from jaxpeft.quant.formats.integer import Integer

Array = jax.Array


class Planes(NamedTuple):
    """A packed matrix of K inputs and N outputs.

    Attributes:
        codes: uint8 `(K / 2, N)`, or int8 or uint8 `(K, N)`.
        scales: float32 `(K / b, N)`: the scale, and the zero point if the format has one.
        table: sixteen values that codes stand for; None for codes that are numbers.
        middle: the code that stands for zero, where there is no zero point.
        halves: rows of the weight in a row of codes: 2 or 1.
    """

    codes: Array
    scales: tuple[Array, ...]
    table: tuple[float, ...] | None
    middle: int
    halves: int

    @property
    def shape(self) -> tuple[int, int]:
        """`(K, N)`."""
        return self.codes.shape[0] * self.halves, self.codes.shape[1]

    @property
    def block(self) -> int:
        """Rows of the weight that share a row of scales."""
        return self.shape[0] // self.scales[0].shape[0]


def planes(fmt: Any, packed: Any) -> Planes | None:
    """The planes of a packed matrix; None for a format that has no kernel."""
    if isinstance(fmt, Codebook):
        scale = decode_scales(packed) if fmt.double else packed["absmax"]
        return Planes(packed["codes"], (scale,), fmt.table, 0, 2)
    if not isinstance(fmt, Integer) or fmt.indexed:
        return None
    names = ("scale",) if fmt.symmetric else ("scale", "zero")
    scales = tuple(packed[name].astype(jnp.float32) for name in names)
    middle = 8 if fmt.symmetric and fmt.bits == 4 else 0
    return Planes(packed["codes"], scales, None, middle, 8 // fmt.bits)


def abstract(fmt: Any, packed: Any) -> Planes | None:
    """The planes' shapes."""
    found: list[Planes | None] = []

    def arrays(packed: Any) -> Any:
        found.append(planes(fmt, packed))
        return found[0] and found[0][:2]

    shapes = jax.eval_shape(arrays, dict(packed))
    return found[0] and found[0]._replace(codes=shapes[0], scales=shapes[1])


def unpacked(
    codes: Array, scales: Sequence[Array], weight: Planes, value: Callable[[Array], Array]
) -> list[Array]:
    """A tile's even and odd rows, or all of them, in float32; `value` looks codes up."""
    wide = codes.astype(jnp.int32)
    parts = [wide] if weight.halves == 1 else [wide & 15, wide >> 4]
    scale, *zero = (_repeated(x, codes.shape[0] // x.shape[0]) for x in scales)
    if weight.table is not None:
        return [value(part) * scale for part in parts]
    middle = zero[0] if zero else jnp.float32(weight.middle)
    return [(part.astype(jnp.float32) - middle) * scale for part in parts]


def _repeated(x: Array, times: int) -> Array:
    if x.shape[0] == 1:
        return x
    return jnp.broadcast_to(x[:, None, :], (x.shape[0], times, x.shape[1])).reshape(
        x.shape[0] * times, x.shape[1]
    )


def dot(a: Array, b: Array) -> Array:
    """`a b`, summed in float32."""
    numbers = (((1,), (0,)), ((), ()))
    return lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


def columns(x: Array, halves: int) -> list[Array]:
    """All columns of `x`; or the even ones and the odd ones."""
    return [x] if halves == 1 else [x[:, 0::2], x[:, 1::2]]


def padded(x: Array, rows: int) -> Array:
    """`x` with rows of zeros below, so that `rows` divides their number."""
    return jnp.pad(x, ((0, -x.shape[0] % rows), (0, 0)))


def rows_for(m: int, most: int) -> int:
    """Rows of a tile for `m` rows: a power of two, which products of tiles take from 16 on."""
    return min(most, max(16, pl.next_power_of_2(m)))


def transposed(
    dy: Any,
    codes: Any,
    scales_at: Callable[[Any], Sequence[Array]],
    outs: Sequence[Any],
    weight: Planes,
    value: Any,
    width: int,
) -> None:
    """What a kernel writes into `outs` for rows of `dy` and of codes: tiles of `width`, added up.

    `scales_at(columns)` are the scales there; the others are refs, and `value` as for `unpacked`.
    """

    def step(j: Any, totals: Any) -> Any:
        at = pl.ds(j * width, width)
        parts = unpacked(codes[:, at], scales_at(at), weight, value)
        return [
            total + dot(dy[:, at], part.astype(dy.dtype).T)
            for total, part in zip(totals, parts, strict=True)
        ]

    start = [jnp.zeros(out.shape, jnp.float32) for out in outs]
    totals = lax.fori_loop(0, codes.shape[1] // width, step, start)
    for out, total in zip(outs, totals, strict=True):
        out[...] = total.astype(out.dtype)
