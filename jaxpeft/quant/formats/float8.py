r"""8-bit floats with a float32 scale for the tensor, for each output, or for each tile.

    W' = scale * code            scale = max|W| / max(kind)

`e4m3fn` has four bits of exponent and three of fraction (largest 448), `e5m2` five and two
(largest 57344). A scale of a tile is stored once for each column, so that columns can be sliced.

Reference:
    Micikevicius et al. 2022, arXiv:2209.05433.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

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
from jaxpeft.quant.formats.words import named, whole_blocks

Array = jax.Array
KINDS = {"e4m3fn": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
SCALES = ("tensor", "channel", "block")


@dataclasses.dataclass(frozen=True)
class Float8(Format):
    """8-bit floats; `tile` (inputs, outputs) share a scale if `scale` is "block"."""

    kind: str = "e4m3fn"
    scale: str = "channel"
    tile: tuple[int, int] = (128, 128)

    name = "fp8"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tile", tuple(self.tile))
        if self.kind not in KINDS or self.scale not in SCALES:
            raise ValueError(
                f"fp8({self.kind!r}, {self.scale!r}): use one of {', '.join(KINDS)}, and one of "
                f"{', '.join(SCALES)}."
            )
        if len(self.tile) != 2 or min(self.tile) < 1:
            raise ValueError(f"fp8(tile={self.tile}): use two positive sizes, such as (128, 128).")

    @property
    def dtype(self) -> Any:
        """Of the codes."""
        return np.dtype(KINDS[self.kind])

    def layout(self, shape: Shape) -> Layout:
        tile = self.tile[0] if self.scale == "block" else 1
        stack, rows, columns = split(shape, tile, choices=(128, 64, 32))
        scales = (rows // tile if self.scale == "block" else 1, columns)
        if self.scale == "tensor":
            scales = (1, 1)
        return {
            "codes": spec((*stack, rows, columns), self.dtype),
            "scale": spec((*stack, *scales), np.float32),
        }

    def encode(self, weight: Array, key: Array | None) -> Packed:
        check_rounding(self, key)
        most = float(jnp.finfo(self.dtype).max)
        scale = blocks.divided(self._absmax(weight), most)
        steps = self._over_rows(weight, blocks.nonzero(scale), blocks.divided)
        # A cast of what lies beyond the largest value is infinite, or not a number.
        return {"codes": jnp.clip(steps, -most, most).astype(self.dtype), "scale": scale}

    def decode(self, packed: Mapping[str, Array]) -> Array:
        codes = packed["codes"].astype(jnp.float32)
        return self._over_rows(codes, packed["scale"], jnp.multiply)

    def _absmax(self, weight: Array) -> Array:
        largest = jnp.abs(weight)
        if self.scale == "tensor":
            return jnp.max(largest, axis=(-2, -1), keepdims=True)
        if self.scale == "channel":
            return jnp.max(largest, axis=-2, keepdims=True)
        rows, columns = self.tile
        largest = jnp.max(blocks.blocked(largest, rows), axis=-2)
        pad = [(0, 0)] * (largest.ndim - 1) + [(0, -largest.shape[-1] % columns)]
        tiles = jnp.pad(largest, pad).reshape(*largest.shape[:-1], -1, columns)
        return jnp.repeat(jnp.max(tiles, axis=-1), columns, axis=-1)[..., : largest.shape[-1]]

    def _over_rows(self, x: Array, scale: Array, operation: Any) -> Array:
        """`operation(x, scale)`, a row of scales for each block of rows."""
        block = x.shape[-2] // scale.shape[-2]
        return blocks.unblocked(operation(blocks.blocked(x, block), scale[..., :, None, :]))


def fp8(
    kind: str = "e4m3fn", scale: str = "channel", *, tile: tuple[int, int] = (128, 128)
) -> Float8:
    """8-bit floats.

    Args:
        kind: "e4m3fn" or "e5m2".
        scale: what shares a scale: the "tensor", a "channel" (an output), or a "block".
        tile: inputs and outputs of a block; a last one of fewer outputs is as good.

    Returns:
        The format.

    Raises:
        ValueError: for another kind or scale.

    Example:
        >>> fp8(scale="block", tile=(32, 2)).layout((64, 3))["scale"].shape
        (2, 3)

    Reference:
        Micikevicius et al. 2022, arXiv:2209.05433.
    """
    return Float8(kind, scale, tile)


_FILE_SCALES = ("weight_scale", "weight_scale_inv")


def from_fp8(arrays: Mapping[str, Any], *, tile: tuple[int, int] | None = None) -> Quantized:
    """A weight from the 8-bit floats of a Hugging Face file.

    Args:
        arrays: `"weight"` of a float8 dtype (out, in), and `"weight_scale"` or (DeepSeek's name
            for the same factor) `"weight_scale_inv"`: a number, (out, 1), or (out / b, in / a).
        tile: (a, b) for the last of these; None for the others. Where `a` does not divide `in`,
            the result has smaller tiles of the same values.

    Returns:
        `Quantized(packed, format, shape)` of the kernel (in, out), numpy arrays.

    Raises:
        ValueError: an array is missing, of another shape or dtype, or not finite.

    Example:
        >>> codes = np.ones((3, 8), jnp.float8_e4m3fn)
        >>> from_fp8({"weight": codes, "weight_scale": np.ones((3, 1), np.float32)}).format
        Float8(kind='e4m3fn', scale='channel', tile=(128, 128))
    """
    found = [name for name in _FILE_SCALES if name in arrays] or ["weight_scale"]
    codes, scale = named(arrays, "weight", found[0])
    kinds = {np.dtype(dtype): kind for kind, dtype in KINDS.items()}
    if codes.dtype not in kinds or codes.ndim != 2:
        raise ValueError(
            f"'weight' is {codes.dtype}{codes.shape}; use float8_e4m3fn or float8_e5m2 (out, in)."
        )
    shape, scale = codes.shape[::-1], _as_float32(scale)
    if tile is not None:
        check_tiles(scale, shape, tile)
        block, scale = whole_blocks(tile[0], shape[0], scale[np.arange(shape[1]) // tile[1]].T)
        fmt = Float8(kinds[codes.dtype], "block", (block, tile[1]))
    else:
        fmt = Float8(kinds[codes.dtype], "tensor" if scale.size == 1 else "channel")
        scale = scale.reshape(1, -1)
    packed = {"codes": codes.T, "scale": scale}
    check(packed, fmt, shape)
    return Quantized(packed, fmt, shape)


def _as_float32(scale: np.ndarray) -> np.ndarray:
    """Scales of a file; bytes are the biased exponents of MXFP8 (E8M0)."""
    exponents = scale.view(jnp.float8_e8m0fnu) if scale.dtype == np.uint8 else scale
    return exponents.astype(np.float32)


def to_fp8(weight: Quantized) -> dict[str, np.ndarray]:
    """The tensors of a file: the inverse of `from_fp8`, scales in float32.

    Args:
        weight: packed arrays of one matrix in `fp8`.

    Returns:
        `"weight"` and `"weight_scale"`; blocks have `"weight_scale_inv"`, as their readers expect.

    Raises:
        ValueError: another format, a stack of weights, or columns that were cut inside a tile.
    """
    packed, fmt, shape = weight
    if not isinstance(fmt, Float8) or len(shape) != 2:
        raise ValueError(f"{fmt} of shape {shape} is no fp8 matrix. Give one layer's.")
    check(packed, fmt, shape)
    codes, scale = np.asarray(packed["codes"]), np.asarray(packed["scale"])
    arrays = {"weight": np.ascontiguousarray(codes.T)}
    if fmt.scale == "tensor":
        return arrays | {"weight_scale": scale.reshape(1)}
    if fmt.scale == "channel":
        return arrays | {"weight_scale": np.ascontiguousarray(scale.T)}
    tiles = np.ascontiguousarray(scale.T[:: fmt.tile[1]])
    if not np.array_equal(np.repeat(tiles, fmt.tile[1], axis=0)[: shape[1]], scale.T):
        raise ValueError("these columns start inside a tile. Write the whole weight.")
    return arrays | {"weight_scale_inv": tiles}


def check_tiles(scale: np.ndarray, shape: Shape, tile: tuple[int, int]) -> None:
    """Refuses scales (out / b, in / a) that are not one for each tile (a, b) of a weight (in, out).

    Raises:
        ValueError: as said there.
    """
    want = (-(-shape[1] // tile[1]), -(-shape[0] // tile[0])) if min(tile) > 0 else None
    if scale.shape != want:
        raise ValueError(
            f"scales {scale.shape} do not meet a weight {shape[::-1]} (out, in) in tiles of "
            f"{tile[1]} x {tile[0]}, which has {want}. Check weight_block_size or block_structure."
        )
