r"""Integers of 8 and 4 bits with a scale for each block of inputs and each output.

    symmetric     W' = scale * code                  int8: -127..127, int4: -8..7
    asymmetric    W' = scale * (code - zero)         int8: 0..255, int4: 0..15

    int8 scale = max|W| / 127    int4 scale = max|W| / 7.5    asymmetric (max W - min W) / (2^b - 1)

4-bit codes are stored as 0..15 either way, with an implied zero of 8 when symmetric. Rows of the
weight belong to blocks in order, or by a list of indices (GPTQ's activation order). Zero points
are codes in files; float32 ones come of adding to a block what is the same for all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.quant.formats import blocks
from jaxpeft.quant.formats.base import Format, Layout, Packed, Shape, spec, split

Array = jax.Array
BLOCKS = (16, 32, 64, 128, 256, 512, 1024)
SCALES = ("float32", "float16", "bfloat16")
ZEROS = ("uint8", "float32")


@dataclasses.dataclass(frozen=True)
class Integer(Format):
    """Integers, a scale for each block, and a zero point for each block unless symmetric.

    `block` None is one scale for each output. `indexed` adds a row of block indices; weights that
    are quantized here are never indexed, those of a file may be. `zero` is the dtype of zero
    points, see `shifted`.
    """

    block: int | None
    symmetric: bool
    scale: str = "float32"
    indexed: bool = False
    zero: str = "uint8"

    bits: ClassVar[int]

    def __post_init__(self) -> None:
        if self.block is not None and (self.block < 2 or self.block % 2):
            raise ValueError(
                f"{self.name}(block={self.block!r}): use an even number, such as 128, or None for "
                "one scale for each output."
            )
        if self.scale not in SCALES:
            raise ValueError(f"{self.name}(scale={self.scale!r}): use one of {', '.join(SCALES)}.")
        if self.zero not in ZEROS:
            raise ValueError(f"{self.name}(zero={self.zero!r}): use one of {', '.join(ZEROS)}.")

    def layout(self, shape: Shape) -> Layout:
        stack, rows, columns = split(shape, self.block or 8 // self.bits, choices=BLOCKS)
        per_scale = (*stack, rows // (self.block or rows), columns)
        kind = np.int8 if self.bits == 8 and self.symmetric else np.uint8
        arrays = {
            "codes": spec((*stack, rows * self.bits // 8, columns), kind),
            "scale": spec(per_scale, jnp.dtype(self.scale)),
        }
        if not self.symmetric:
            arrays["zero"] = spec(per_scale, self.zero)
        if self.indexed:
            arrays["index"] = spec((*stack, rows, 1), np.int32)
        return arrays

    def encode(self, weight: Array, key: Array | None) -> Packed:
        if self.indexed:
            raise ValueError(
                f"{self} has the block indices of a file. Quantize with indexed=False."
            )
        block = self.block or weight.shape[-2]
        if self.symmetric:
            scale, zero = self._scale(blocks.absmax(weight, block)), None
            low, high = (-127, 127) if self.bits == 8 else (-8, 7)
        else:
            scale, zero = self._range(blocks.blocked(weight, block))
            low, high = 0, 2**self.bits - 1
        units = blocks.nonzero(scale)[..., :, None, :]
        steps = blocks.unblocked(blocks.divided(blocks.blocked(weight, block), units))
        codes = blocks.round_to_int(steps, key)
        if zero is not None:
            codes = blocks.unblocked(blocks.blocked(codes, block) + zero[..., :, None, :])
        packed = {"codes": self._store(jnp.clip(codes, low, high)), "scale": scale}
        packed["scale"] = scale.astype(self.scale)
        return packed if zero is None else packed | {"zero": zero.astype(self.zero)}

    def decode(self, packed: Mapping[str, Array]) -> Array:
        codes, scale = self._load(packed["codes"]), packed["scale"].astype(jnp.float32)
        rows = self._rows(packed, codes.shape[-2])
        if not self.symmetric:
            codes = codes - rows(packed["zero"].astype(jnp.float32))
        return codes * rows(scale)

    def _scale(self, absmax: Array) -> Array:
        return self._rounded(blocks.divided(absmax, 127 if self.bits == 8 else 7.5))

    def _range(self, weight: Array) -> tuple[Array, Array]:
        """Scale and zero point of blocks (..., in / block, block, out); 0 is always a value."""
        low = jnp.minimum(jnp.min(weight, axis=-2), 0)
        high = jnp.maximum(jnp.max(weight, axis=-2), 0)
        most = 2**self.bits - 1
        scale = self._rounded(blocks.divided(high - low, most))
        return scale, jnp.clip(jnp.round(blocks.divided(-low, blocks.nonzero(scale))), 0, most)

    def _rounded(self, scale: Array) -> Array:
        """The scale as it will be stored, so that codes are nearest with that one."""
        return scale.astype(self.scale).astype(jnp.float32)

    def _store(self, codes: Array) -> Array:
        if self.bits == 8:
            return codes.astype(jnp.int8 if self.symmetric else jnp.uint8)
        unsigned = codes + 8 if self.symmetric else codes
        return blocks.pack_nibbles(unsigned.astype(jnp.uint8))

    def _load(self, codes: Array) -> Array:
        if self.bits == 8:
            return codes.astype(jnp.float32)
        wide = blocks.unpack_nibbles(codes).astype(jnp.float32)
        return wide - 8 if self.symmetric else wide

    def _rows(self, packed: Mapping[str, Array], rows: int):
        """A function from (..., in / block, out) to the value of each row's block."""
        if self.indexed:
            return lambda x: jnp.take_along_axis(x, packed["index"], axis=-2)
        return lambda x: jnp.repeat(x, rows // x.shape[-2], axis=-2)


def shifted(packed: Mapping[str, Array], fmt: Integer, by: Array) -> tuple[Packed, Integer]:
    """`W' + by` for a `by` that is the same all over each block: only zero points change.

        scale * (code - zero) + by = scale * (code - (zero - by / scale))

    Args:
        packed: arrays of `fmt`, which is not indexed.
        fmt: their format; a symmetric one gets zero points. Values of codes stay, and so do their
            bits but for 8 symmetric ones, which become unsigned.
        by: `(*stack, in / block, out)`, float32.

    Returns:
        The arrays, and their format with zero points in float32. A block of scale 0, all of whose
        codes are the zero point, gets a small one.

    Example:
        >>> from jaxpeft.quant.formats import dequantize, int8, quantize
        >>> packed, fmt = shifted(quantize(jnp.ones((2, 1)), int8(2)), int8(2), jnp.ones((1, 1)))
        >>> dequantize(packed, fmt, (2, 1)).round(4).tolist(), fmt.zero
        ([[2.0], [2.0]], 'float32')
    """
    codes, scale = packed["codes"], packed["scale"]
    middle = jnp.float32(2 ** (fmt.bits - 1))
    zero = middle if fmt.symmetric else packed["zero"].astype(jnp.float32)
    if fmt.symmetric and fmt.bits == 8:
        codes = codes.astype(jnp.uint8) ^ 128
    scale = jnp.where(scale == 0, 2.0**-14, scale)  # float16 holds it, as others do
    moved = zero - by / scale.astype(jnp.float32)
    arrays = {"codes": codes, "scale": scale, "zero": moved}
    return arrays, dataclasses.replace(fmt, symmetric=False, zero="float32")


def check_codes(fmt: Integer) -> None:
    """Refuses zero points that are no codes, for files that can hold none.

    Raises:
        ValueError: as said there.
    """
    if not fmt.symmetric and fmt.zero != "uint8":
        raise ValueError(
            f"{fmt} has zero points between codes, which files of integers cannot hold. Merge with "
            "rounding instead: jp.quant.merge(tuned, adapter, params, fmt)."
        )


def stored(codes: np.ndarray, fmt: Integer) -> np.ndarray:
    """Codes 0 .. 2^bits - 1 of a file (in, out) as packed arrays have them."""
    if fmt.bits == 4:
        return blocks.pack_nibbles(codes)
    return (codes ^ np.uint8(128)).view(np.int8) if fmt.symmetric else codes


def unsigned(codes: np.ndarray, fmt: Integer) -> np.ndarray:
    """The inverse of `stored`."""
    if fmt.bits == 4:
        halves = np.stack([codes & 15, codes >> 4], axis=1)
        return halves.reshape(2 * codes.shape[0], codes.shape[1])
    return codes.view(np.uint8) ^ np.uint8(128) if fmt.symmetric else codes


def block_index(name: str, index: Any, rows: int, fmt: Integer) -> np.ndarray:
    """The block of each row, int32 `(rows,)`, from a file's tensor of this name.

    Raises:
        ValueError: it is of another shape or dtype, or names a block that is not there.
    """
    index, last = np.asarray(index), (rows - 1) // (fmt.block or rows)
    whole = index.shape == (rows,) and index.dtype.kind in "iu"
    if not whole or index.min() < 0 or index.max() > last:
        reach = f" from {index.min()} to {index.max()}" if index.size else ""
        raise ValueError(
            f"{name!r} is {index.dtype}{index.shape}{reach}; {rows} rows need {rows} numbers from "
            f"0 to {last}. Check group_size."
        )
    return index.astype(np.int32)


class Int8(Integer):
    name = "int8"
    bits = 8


class Int4(Integer):
    name = "int4"
    bits = 4


KINDS: dict[int, type[Integer]] = {4: Int4, 8: Int8}


def int8(block: int | None = None, *, symmetric: bool = True, scale: str = "float32") -> Int8:
    """8-bit integers; one scale for each output by default.

    Args:
        block: inputs that share a scale; None for all.
        symmetric: without a zero point.
        scale: dtype of the scales: float32, float16 or bfloat16.

    Returns:
        The format. `quantize(..., key=...)` rounds stochastically.

    Raises:
        ValueError: for an odd block or another dtype.

    Example:
        >>> int8().layout((64, 3))["scale"].shape
        (1, 3)
    """
    return Int8(block, symmetric, scale)


def int4(block: int | None = 128, *, symmetric: bool = True, scale: str = "float32") -> Int4:
    """4-bit integers in groups of 128 inputs; else as `int8`. GPTQ and AWQ files hold these.

    Example:
        >>> int4(64, symmetric=False).layout((128, 3))["zero"].shape
        (2, 3)
    """
    return Int4(block, symmetric, scale)
