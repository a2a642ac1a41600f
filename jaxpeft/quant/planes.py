"""A packed matrix as products read it that leave it packed: codes, scales and shifts.

    W'[i, j] = value(code[i, j]) * scale[i / b, j] + shift[i / b, j]

With 4-bit codes each byte has two rows of the weight, `apart` rows from one another. They are not
interleaved: the columns of `x` that belong to the low halves multiply these, the other columns the
high ones, which adds up to the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxpeft.quant.formats.codebook import Codebook, decode_scales
from jaxpeft.quant.formats.ggml import GGUF
from jaxpeft.quant.formats.integer import Integer
from jaxpeft.quant.formats.micro import E2M1_SIGNED, MXFP4, NVFP4

Array = jax.Array


class Planes(NamedTuple):
    """A packed matrix of K inputs and N outputs.

    Attributes:
        codes: uint8 `(K / 2, N)`, or int8 or uint8 `(K, N)`.
        scales: float32 `(K / b, N)`: the scale, and the shift if the format has one.
        table: sixteen values that codes stand for; None for codes that are numbers.
        middle: the code that stands for zero, without a table.
        halves: rows of the weight in a row of codes: 2 or 1.
        apart: rows of the weight from the low halves of a row of codes to the high ones.
    """

    codes: Array
    scales: tuple[Array, ...]
    table: tuple[float, ...] | None = None
    middle: int = 0
    halves: int = 2
    apart: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """`(K, N)`."""
        return self.codes.shape[0] * self.halves, self.codes.shape[1]

    @property
    def block(self) -> int:
        """Rows of the weight that share a row of scales."""
        return self.shape[0] // self.scales[0].shape[0]


def planes(fmt: Any, packed: Any) -> Planes | None:
    """The planes of a packed matrix; None for a format that is read in another way."""
    if isinstance(fmt, Codebook):
        scale = decode_scales(packed) if fmt.double else packed["absmax"]
        return Planes(packed["codes"], (scale,), fmt.table)
    if isinstance(fmt, MXFP4 | NVFP4):
        return Planes(packed["codes"], (fmt.scales(packed),), E2M1_SIGNED)
    if isinstance(fmt, Integer) and not fmt.indexed:
        return _integers(fmt, packed)
    if isinstance(fmt, GGUF) and fmt.kind in ("q4_0", "q4_1", "q8_0"):
        return _blocks_of_32(fmt, packed)
    return None


def _integers(fmt: Integer, packed: Any) -> Planes:
    scale, halves = packed["scale"].astype(jnp.float32), 8 // fmt.bits
    if fmt.symmetric:
        return Planes(packed["codes"], (scale,), middle=8 * (halves - 1), halves=halves)
    shift = -packed["zero"].astype(jnp.float32) * scale
    return Planes(packed["codes"], (scale, shift), halves=halves)


def _blocks_of_32(fmt: GGUF, packed: Any) -> Planes:
    scales = tuple(packed[name].astype(jnp.float32) for name in ("d", "m") if name in packed)
    if fmt.kind == "q8_0":
        return Planes(packed["q"], scales, halves=1)
    return Planes(packed["qs"], scales, middle=8 if fmt.kind == "q4_0" else 0, apart=16)


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
    """A tile's rows of each half, or all of them, in float32; `value` looks codes up."""
    scale, *shift = (_repeated(x, codes.shape[0] // x.shape[0]) for x in scales)
    scaled = [part * scale for part in values(codes, weight, value)]
    return [part + shift[0] for part in scaled] if shift else scaled


def values(codes: Array, weight: Planes, value: Callable[[Array], Array]) -> list[Array]:
    """What the codes of each half stand for, or all of them, in float32 and without a scale."""
    wide = codes.astype(jnp.int32)
    parts = [wide] if weight.halves == 1 else [wide & 15, wide >> 4]
    if weight.table is not None:
        return [value(part) for part in parts]
    return [(part - weight.middle).astype(jnp.float32) for part in parts]


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


def columns(x: Array, weight: Planes) -> list[Array]:
    """All columns of `x`; or those of the low halves of codes and those of the high ones."""
    if weight.halves == 1:
        return [x]
    split = x.reshape(x.shape[0], -1, 2, weight.apart)
    return [split[:, :, half].reshape(x.shape[0], -1) for half in (0, 1)]


def joined(parts: Sequence[Array], weight: Planes) -> Array:
    """The inverse of `columns`."""
    split = [part.reshape(part.shape[0], -1, weight.apart) for part in parts]
    return jnp.stack(split, axis=2).reshape(parts[0].shape[0], -1)


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
