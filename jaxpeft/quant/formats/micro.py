r"""MXFP4 and NVFP4: four-bit floats (E2M1) with an 8-bit scale for each small block.

    MXFP4   W' = value[code] * 2^(scale - 127)             blocks of 32, scale a biased exponent
    NVFP4   W' = value[code] * (scale * tensor_scale)      blocks of 16, scale a float8_e4m3fn

The sixteen values are 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; ties go to the even code.
MXFP4's exponent is that of the largest magnitude, less 2, so that magnitudes above 6 times the
scale saturate. NVFP4's tensor scale takes the largest block to the largest scale: max|W| / 2688.

Reference:
    OCP Microscaling Formats (MX) v1.0, 2023; Rouhani et al. 2023, arXiv:2310.10537;
    NVIDIA 2025, arXiv:2509.25149 (NVFP4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpeft.quant.formats import blocks
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
E2M1_TABLE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_SIGNED = (*E2M1_TABLE, *(-value for value in E2M1_TABLE))
_SCALE_MAX = 448.0
# Middles of neighbours, and whether the middle itself goes up, to the even code.
_MIDDLES = tuple(
    ((a + b) / 2, code % 2 == 1)
    for code, (a, b) in enumerate(zip(E2M1_TABLE, E2M1_TABLE[1:], strict=False))
)


@dataclasses.dataclass(frozen=True)
class MXFP4(Format):
    """Blocks of 32 and a power of two each."""

    name = "mxfp4"

    def layout(self, shape: Shape) -> Layout:
        return _layout(shape, 32, np.uint8)

    def encode(self, weight: Array, key: Array | None) -> Packed:
        check_rounding(self, key)
        largest = blocks.absmax(weight, 32)
        exponent = (lax.bitcast_convert_type(largest, jnp.uint32) >> 23).astype(jnp.int32) - 2
        scale = jnp.clip(exponent, 1, 254).astype(jnp.uint8)
        return {"codes": _codes(weight, power_of_two(scale)), "scale": scale}

    def decode(self, packed: Mapping[str, Array]) -> Array:
        return blocks.scaled(_values(packed["codes"]), self.scales(packed))

    def scales(self, packed: Mapping[str, Array]) -> Array:
        """float32 scales (..., in / 32, out)."""
        return power_of_two(packed["scale"])


@dataclasses.dataclass(frozen=True)
class NVFP4(Format):
    """Blocks of 16; with `inverse` the tensor's factor is a divisor: `scale / tensor_scale`."""

    inverse: bool = False

    name = "nvfp4"

    def layout(self, shape: Shape) -> Layout:
        arrays = _layout(shape, 16, jnp.float8_e4m3fn)
        return arrays | {"tensor_scale": spec((*shape[:-2], 1, 1), np.float32)}

    def encode(self, weight: Array, key: Array | None) -> Packed:
        check_rounding(self, key)
        largest = blocks.absmax(weight, 16)
        whole = jnp.max(largest, axis=(-2, -1), keepdims=True)
        most = 6 * _SCALE_MAX
        if self.inverse:
            tensor = most / jnp.maximum(whole, blocks.SMALLEST)
            scale = tensor * blocks.divided(largest, 6)
        else:
            tensor = blocks.divided(whole, most)
            scale = blocks.divided(blocks.divided(largest, 6), blocks.nonzero(tensor))
        scale = jnp.clip(scale, 0, _SCALE_MAX).astype(jnp.float8_e4m3fn)
        return {
            "codes": _codes(weight, self._scale(scale, tensor)),
            "scale": scale,
            "tensor_scale": tensor,
        }

    def decode(self, packed: Mapping[str, Array]) -> Array:
        return blocks.scaled(_values(packed["codes"]), self.scales(packed))

    def scales(self, packed: Mapping[str, Array]) -> Array:
        """float32 scales (..., in / 16, out)."""
        return self._scale(packed["scale"], packed["tensor_scale"])

    def _scale(self, scale: Array, tensor: Array) -> Array:
        wide = scale.astype(jnp.float32)
        return blocks.divided(wide, tensor) if self.inverse else wide * tensor


def mxfp4() -> MXFP4:
    """The OCP microscaling format: 4.25 bits a weight.

    Returns:
        The format.

    Example:
        >>> from jaxpeft.quant.formats import dequantize, quantize
        >>> w = jnp.array([0.5, -3.0, 6.0, 2.4])[:, None] * jnp.ones((8, 4, 1))
        >>> dequantize(quantize(w.reshape(32, 1), mxfp4()), mxfp4(), (32, 1))[:4, 0]
        Array([ 0.5, -3. ,  6. ,  2. ], dtype=float32)

    Reference:
        Rouhani et al. 2023, arXiv:2310.10537.
    """
    return MXFP4()


def nvfp4(*, inverse: bool = False) -> NVFP4:
    """NVIDIA's 4-bit floats: 4.5 bits a weight.

    Args:
        inverse: keep the tensor's factor as a divisor, as compressed-tensors files do (ModelOpt
            files keep a factor).

    Returns:
        The format.

    Example:
        >>> nvfp4().layout((64, 3))["tensor_scale"].shape
        (1, 1)

    Reference:
        NVIDIA 2025, arXiv:2509.25149.
    """
    return NVFP4(inverse)


def power_of_two(exponent: Array) -> Array:
    """`2^(exponent - 127)` in float32 for a uint8 (E8M0); 0 for 2^-127, which XLA would flush."""
    return lax.bitcast_convert_type(exponent.astype(jnp.uint32) << 23, jnp.float32)


def _layout(shape: Shape, block: int, scale: type) -> Layout:
    stack, rows, columns = split(shape, block)
    return {
        "codes": spec((*stack, rows // 2, columns), np.uint8),
        "scale": spec((*stack, rows // block, columns), scale),
    }


def _codes(weight: Array, scale: Array) -> Array:
    """The nearest values in units of the block's scale, a sign in the highest bit."""
    block = weight.shape[-2] // scale.shape[-2]
    units = blocks.nonzero(scale)[..., :, None, :]
    steps = blocks.unblocked(blocks.divided(blocks.blocked(weight, block), units))
    size = jnp.abs(steps)
    code = jnp.zeros(size.shape, jnp.uint8)
    for middle, up in _MIDDLES:
        code += size >= middle if up else size > middle
    return blocks.pack_nibbles(code | (jnp.signbit(steps).astype(jnp.uint8) << 3))


def _values(codes: Array) -> Array:
    return blocks.lookup(E2M1_SIGNED, blocks.unpack_nibbles(codes))
