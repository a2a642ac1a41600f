r"""The block formats of GGUF files (llama.cpp), kept packed; the numbers of the `gguf` package.

    q4_0, q5_0     W' = d (q - 8), d (q - 16)     q4_1, q5_1   W' = d q + m       blocks of 32
    q8_0           W' = d q                                                       blocks of 32
    q4_k, q5_k     W' = (d s) q - (dmin t)        s, t: 6 bits for each 32        blocks of 256
    q6_k           W' = (d s) (q - 32)            s: int8 for each 16             blocks of 256

`d`, `m` and `dmin` are float16. A file has the fields of a block side by side, block after block of
a row (out, in). Here each field is an array of its own with blocks along `in`; the bytes of a field
are those of the file.

Reference:
    https://github.com/ggml-org/llama.cpp, ggml-quants.c and gguf-py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.quant.formats import blocks
from jaxpeft.quant.formats.base import (
    Format,
    Layout,
    Packed,
    Quantized,
    Shape,
    check,
    check_rounding,
    spec,
    split,
)

Array = jax.Array


class Field(NamedTuple):
    """A part of a block: `length` values of `dtype`, next to the other parts in a file."""

    name: str
    length: int
    dtype: Any


def _fields(**counts: int) -> tuple[Field, ...]:
    kinds = {"d": np.float16, "m": np.float16, "dmin": np.float16, "q": np.int8, "scales8": np.int8}
    return tuple(Field(n, count, np.dtype(kinds.get(n, np.uint8))) for n, count in counts.items())


# In the order of a file.
FIELDS = {
    "q4_0": _fields(d=1, qs=16),
    "q4_1": _fields(d=1, m=1, qs=16),
    "q5_0": _fields(d=1, qh=4, qs=16),
    "q5_1": _fields(d=1, m=1, qh=4, qs=16),
    "q8_0": _fields(d=1, q=32),
    "q4_k": _fields(d=1, dmin=1, scales=12, qs=128),
    "q5_k": _fields(d=1, dmin=1, scales=12, qh=32, qs=128),
    "q6_k": _fields(ql=128, qh=64, scales8=16, d=1),
}


@dataclasses.dataclass(frozen=True)
class GGUF(Format):
    """A block format by its name in files, in lower case."""

    kind: str

    name = "gguf"

    def __post_init__(self) -> None:
        if self.kind not in FIELDS:
            raise ValueError(
                f"gguf({self.kind!r}): use one of {', '.join(FIELDS)}. Load a weight of another "
                "kind dense, with gguf.dequantize."
            )

    @property
    def block(self) -> int:
        return 256 if self.kind.endswith("k") else 32

    def layout(self, shape: Shape) -> Layout:
        stack, rows, columns = split(shape, self.block)
        count = rows // self.block
        return {
            field.name: spec((*stack, count * field.length, columns), field.dtype)
            for field in FIELDS[self.kind]
        }

    def encode(self, weight: Array, key: Array | None) -> Packed:
        check_rounding(self, key)
        if self.block == 256:
            raise ValueError(
                f"gguf({self.kind!r}) weights are only read: finding their scales is llama.cpp's "
                "work. Quantize to q4_0, q4_1, q5_0, q5_1 or q8_0."
            )
        fields = _encode(self.kind, blocks.blocked(weight, 32))
        kinds = {field.name: field.dtype for field in FIELDS[self.kind]}
        return {name: blocks.unblocked(x).astype(kinds[name]) for name, x in fields.items()}

    def decode(self, packed: Mapping[str, Array]) -> Array:
        parts = {
            field.name: blocks.blocked(packed[field.name], field.length)
            for field in FIELDS[self.kind]
        }
        wide = {name: x.astype(jnp.float32) for name, x in parts.items() if _is_scale(x)}
        values = _decode_k if self.block == 256 else _decode
        return blocks.unblocked(values(self.kind, parts | wide))


def gguf(kind: str) -> GGUF:
    """A block format of GGUF files.

    Args:
        kind: q4_0, q4_1, q5_0, q5_1, q8_0, or (to read only) q4_k, q5_k, q6_k.

    Returns:
        The format: 4.5, 5, 5.5, 6, 8.5, 4.5, 5.5, 6.5625 bits a weight.

    Raises:
        ValueError: for another kind.

    Example:
        >>> {name: a.shape for name, a in gguf("q4_1").layout((64, 3)).items()}
        {'d': (2, 3), 'm': (2, 3), 'qs': (32, 3)}
    """
    return GGUF(kind)


def from_gguf(data: Any, kind: str) -> Quantized:
    """A weight from the bytes of a GGUF tensor.

    Args:
        data: uint8 `(*stack, out, bytes)`, as `gguf.GGUFReader` has it.
        kind: name of its type, such as "Q4_K".

    Returns:
        `Quantized(packed, format, shape)` of the kernel (*stack, in, out), numpy arrays.

    Raises:
        ValueError: another dtype, a row that does not end with a block, or scales not finite.

    Example:
        >>> from_gguf(np.zeros((3, 36), np.uint8), "Q4_0").shape
        (64, 3)
    """
    fmt, data = GGUF(kind.lower()), np.asarray(data)
    size = sum(field.length * field.dtype.itemsize for field in FIELDS[fmt.kind])
    if data.dtype != np.uint8 or data.ndim < 2 or not data.shape[-1] or data.shape[-1] % size:
        raise ValueError(
            f"GGUF data {data.dtype}{data.shape} is not uint8 (..., out, bytes) with rows of whole "
            f"blocks of {size} bytes ({kind}). Check the kind, or download the file again."
        )
    *stack, out, row = data.shape
    raw = data.reshape(*stack, out, row // size, size)
    packed, start = {}, 0
    for field in FIELDS[fmt.kind]:
        end = start + field.length * field.dtype.itemsize
        part = np.ascontiguousarray(raw[..., start:end]).view(field.dtype)
        packed[field.name] = np.swapaxes(part.reshape(*stack, out, -1), -1, -2)
        start = end
    shape = (*stack, row // size * fmt.block, out)
    check(packed, fmt, shape)
    return Quantized(packed, fmt, shape)


def to_gguf(weight: Quantized) -> np.ndarray:
    """The bytes of a GGUF tensor: the inverse of `from_gguf`.

    Raises:
        ValueError: another format, or arrays that do not fit it.
    """
    packed, fmt, shape = weight
    if not isinstance(fmt, GGUF):
        raise ValueError(f"{fmt} is no gguf format. Dequantize and quantize the weight to one.")
    check(packed, fmt, shape)
    *stack, rows, out = shape
    parts = []
    for field in FIELDS[fmt.kind]:
        by_row = np.ascontiguousarray(np.swapaxes(np.asarray(packed[field.name]), -1, -2))
        part = by_row.reshape(*stack, out, rows // fmt.block, field.length)
        parts.append(part.view(np.uint8))
    return np.concatenate(parts, axis=-1).reshape(*stack, out, -1)


def _is_scale(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _decode(kind: str, parts: Mapping[str, Array]) -> Array:
    """The weights of blocks of 32: (..., in / 32, 32, out)."""
    if kind == "q8_0":
        return parts["q"].astype(jnp.float32) * parts["d"]
    q = blocks.bit_fields(parts["qs"], 16, (0, 4), 15)
    if kind.startswith("q5"):
        q = q | (blocks.bit_fields(parts["qh"], 1, range(8), 1) << 4)
    q = q.astype(jnp.float32)
    if kind.endswith("_1"):
        return blocks.rounded(parts["d"] * q) + parts["m"]
    return parts["d"] * (q - (8 if kind == "q4_0" else 16))


def _decode_k(kind: str, parts: Mapping[str, Array]) -> Array:
    """The weights of blocks of 256: (..., in / 256, 256, out)."""
    if kind == "q6_k":
        q = blocks.bit_fields(parts["ql"], 64, (0, 4), 15)
        q = q | (blocks.bit_fields(parts["qh"], 32, (0, 2, 4, 6), 3) << 4)
        return blocks.scaled(q.astype(jnp.float32) - 32, parts["d"] * parts["scales8"])
    q = blocks.bit_fields(parts["qs"], 32, (0, 4), 15)
    if kind == "q5_k":
        q = q | (blocks.bit_fields(parts["qh"], 32, range(8), 1) << 4)
    scale, least = _six_bits(parts["scales"])
    product = blocks.rounded(blocks.scaled(q.astype(jnp.float32), parts["d"] * scale))
    least = blocks.rounded(parts["dmin"] * least)
    return product - jnp.repeat(least, q.shape[-2] // least.shape[-2], axis=-2)


def _six_bits(scales: Array) -> tuple[Array, Array]:
    """Eight scales and eight minima of 6 bits from 12 bytes (..., 12, out), as float32.

    The first four of each have a byte; the last four have half a byte and the others' two high
    bits.
    """
    d, m, both = jnp.split(scales, 3, axis=-2)
    scale = jnp.concatenate([d & 63, (both & 15) | ((d >> 2) & 48)], axis=-2)
    least = jnp.concatenate([m & 63, (both >> 4) | ((m >> 2) & 48)], axis=-2)
    return scale.astype(jnp.float32), least.astype(jnp.float32)


def _encode(kind: str, x: Array) -> dict[str, Array]:
    """Fields (..., in / 32, count, out) of blocks (..., in / 32, 32, out)."""
    if kind == "q8_0":
        d = blocks.divided(jnp.max(jnp.abs(x), axis=-2, keepdims=True), 127)
        return {"d": d, "q": _round_away(x * _inverse(d))}
    most = 15 if kind.startswith("q4") else 31
    if kind.endswith("_1"):
        low = jnp.min(x, axis=-2, keepdims=True)
        d = blocks.divided(jnp.max(x, axis=-2, keepdims=True) - low, most)
        steps, scales = (x - low) * _inverse(d), {"d": d, "m": low}
    else:
        # The first of the largest magnitudes, with its sign, becomes the lowest code.
        first = jnp.argmax(jnp.abs(x), axis=-2, keepdims=True)
        d = jnp.take_along_axis(x, first, axis=-2) / -((most + 1) // 2)
        steps, scales = x * _inverse(d), {"d": d}
    middle = 0 if kind.endswith("_1") else (most + 1) // 2
    q = jnp.clip(jnp.floor(blocks.rounded(steps) + (middle + 0.5)), 0, most).astype(jnp.uint8)
    fields = scales | {"qs": (q[..., :16, :] & 15) | (q[..., 16:, :] << 4)}
    return fields | ({"qh": _pack_bits(q >> 4)} if most == 31 else {})


def _inverse(d: Array) -> Array:
    return jnp.where(d == 0, 0, 1 / blocks.nonzero(d))


def _round_away(x: Array) -> Array:
    """To the nearest integer, ties away from zero."""
    size = jnp.abs(x)
    whole = jnp.floor(size)
    return jnp.sign(x) * (whole + jnp.floor(2 * (size - whole)))


def _pack_bits(bits: Array) -> Array:
    """Eight rows of bits (..., 32, out) in a byte, the first in the lowest bit."""
    eights = bits.reshape(*bits.shape[:-2], -1, 8, bits.shape[-1])
    return jnp.sum(eights << jnp.arange(8, dtype=jnp.uint8)[:, None], axis=-2, dtype=jnp.uint8)
