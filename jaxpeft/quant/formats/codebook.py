r"""NF4 and FP4: sixteen values between -1 and 1, scaled by the largest magnitude of each block.

    W'[i, j] = table[code[i, j]] * absmax[i / block, j]

With double quantization the scales are bytes too, in blocks of 256 that run over the matrix in
bitsandbytes' order (all blocks of column 0, then of column 1, ...):

    absmax = dynamic[byte] * nested_absmax + offset        offset = mean(absmax)

`nested_absmax` lists, for each column, the blocks of 256 that the column reaches into, and
`nested_phase` says where in the first of them it begins, so that a slice of columns stays readable.

Reference:
    Dettmers et al. 2023, arXiv:2305.14314 (QLoRA), section 3 and appendix E.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.quant.formats import blocks, dynamic
from jaxpeft.quant.formats.base import (
    Format,
    Layout,
    Packed,
    Shape,
    check_rounding,
    spec,
    split,
)

Array = jax.Array
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# Quantiles of the normal distribution, scaled to [-1, 1], with an exact zero.
NF4_TABLE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# A sign, two bits of exponent and one of fraction, in units of 1/12.
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4_TABLE = tuple(
    float(np.float32(sign * value) / np.float32(12)) for sign in (1, -1) for value in _FP4_TWELFTHS
)


@dataclasses.dataclass(frozen=True)
class Codebook(Format):
    """Sixteen values and a scale for each block: `nf4` and `fp4` say which values."""

    block: int = 64
    double: bool = True

    table: ClassVar[tuple[float, ...]]

    @property
    def values(self) -> np.ndarray:
        """The table as a float32 array."""
        return np.asarray(self.table, np.float32)

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise ValueError(
                f"{self.name}(block={self.block!r}): use one of {', '.join(map(str, BLOCKS))}."
            )

    def layout(self, shape: Shape) -> Layout:
        stack, rows, columns = split(shape, self.block, choices=BLOCKS)
        count = rows // self.block
        kind = np.uint8 if self.double else np.float32
        arrays = {
            "codes": spec((*stack, rows // 2, columns), np.uint8),
            "absmax": spec((*stack, count, columns), kind),
        }
        if not self.double:
            return arrays
        return arrays | {
            "nested_absmax": spec((*stack, reach(count), columns), np.float32),
            "nested_phase": spec((*stack, 1, columns), np.uint8),
            "offset": spec((*stack, 1, 1), np.float32),
        }

    def encode(self, weight: Array, key: Array | None) -> Packed:
        check_rounding(self, key)
        absmax = blocks.absmax(weight, self.block)
        inverse = 1 / jnp.maximum(absmax, blocks.SMALLEST)
        scaled = blocks.blocked(weight, self.block) * inverse[..., :, None, :]
        order = np.argsort(self.values, kind="stable")
        codes = blocks.nearest(jnp.clip(scaled, -1, 1), self.values[order])
        if list(order) != list(range(16)):
            codes = blocks.lookup(order.tolist(), codes).astype(jnp.uint8)
        packed = {"codes": blocks.pack_nibbles(blocks.unblocked(codes))}
        return packed | (encode_scales(absmax) if self.double else {"absmax": absmax})

    def decode(self, packed: Mapping[str, Array]) -> Array:
        absmax = decode_scales(packed) if self.double else packed["absmax"]
        values = blocks.lookup(self.table, blocks.unpack_nibbles(packed["codes"]))
        return blocks.scaled(values, absmax)


class NF4(Codebook):
    name = "nf4"
    table = NF4_TABLE


class FP4(Codebook):
    name = "fp4"
    table = FP4_TABLE


def nf4(block: int = 64, *, double: bool = True) -> NF4:
    """NormalFloat4: quantiles of the normal distribution.

    4 bits a weight and the scales: 32 / block bits more, or about 8 / block with `double`.

    Args:
        block: weights that share a scale: 32, 64, ..., 4096.
        double: whether the scales are bytes, too.

    Returns:
        The format. Codes and scales equal those of bitsandbytes.

    Raises:
        ValueError: for another block.

    Example:
        >>> nf4(block=128)
        NF4(block=128, double=True)

    Reference:
        Dettmers et al. 2023, arXiv:2305.14314.
    """
    return NF4(block, double)


def fp4(block: int = 64, *, double: bool = True) -> FP4:
    """4-bit floats, 0.0052 to 1, as bitsandbytes has them (not the E2M1 of `mxfp4`); else `nf4`.

    Example:
        >>> fp4().table[:4]
        (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0)
    """
    return FP4(block, double)


def reach(count: int) -> int:
    """Most blocks of 256 that `count` consecutive scales reach into, where columns may begin."""
    latest = dynamic.BLOCK - math.gcd(count, dynamic.BLOCK)
    return (latest + count - 1) // dynamic.BLOCK + 1


def phases(count: int, columns: int) -> np.ndarray:
    """Where in its first block of 256 each column begins: uint8 (1, out)."""
    return (np.arange(columns)[None] * count % dynamic.BLOCK).astype(np.uint8)


def reached(count: int, columns: int) -> np.ndarray:
    """The blocks of 256 that each column reaches into: indices (reach, out)."""
    first = np.arange(columns) * count // dynamic.BLOCK
    last = -(-count * columns // dynamic.BLOCK) - 1
    return np.minimum(first + np.arange(reach(count))[:, None], last)


def encode_scales(absmax: Array, offset: Array | None = None) -> Packed:
    """Scales (..., in / block, out) as bytes; `offset` is their mean unless it is given."""
    *stack, count, columns = absmax.shape
    if offset is None:
        offset = jnp.mean(absmax, axis=(-2, -1), keepdims=True)
    flat = jnp.swapaxes(absmax - offset, -1, -2).reshape(*stack, count * columns)
    pad = -flat.shape[-1] % dynamic.BLOCK
    padded = jnp.pad(flat, [(0, 0)] * len(stack) + [(0, pad)])
    codes, nested = dynamic.encode_dynamic(padded.reshape(*stack, -1, dynamic.BLOCK))
    codes = codes.reshape(*stack, -1)[..., : count * columns].reshape(*stack, columns, count)
    return {
        "absmax": jnp.swapaxes(codes, -1, -2),
        "nested_absmax": nested[..., reached(count, columns)],
        "nested_phase": jnp.broadcast_to(phases(count, columns), (*stack, 1, columns)),
        "offset": offset,
    }


def decode_scales(packed: Mapping[str, Array]) -> Array:
    """float32 scales (..., in / block, out) of doubly quantized arrays."""
    codes, nested = packed["absmax"], packed["nested_absmax"]
    if nested.shape[-2] > 1:
        index = jnp.arange(codes.shape[-2])[:, None] + packed["nested_phase"].astype(jnp.int32)
        nested = jnp.take_along_axis(nested, index // dynamic.BLOCK, axis=-2)
    return dynamic.decode_dynamic(codes, nested) + packed["offset"]
