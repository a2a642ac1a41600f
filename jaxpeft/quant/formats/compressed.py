r"""compressed-tensors' files (llm-compressor, vLLM), to and from packed arrays.

A file's configuration gives each layer a `format` and a dict of options for `weights`. Read here
are the formats pack-quantized (int4 and int8 in int32 words), int-quantized, float-quantized,
naive-quantized and mxfp8-quantized (bytes), mxfp4-pack-quantized and nvfp4-pack-quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxpeft.quant.formats.base import Quantized, Shape, check
from jaxpeft.quant.formats.float8 import Float8, check_tiles, from_fp8, to_fp8
from jaxpeft.quant.formats.fp4_files import from_mxfp4, from_nvfp4, to_fp4
from jaxpeft.quant.formats.integer import (
    KINDS,
    Integer,
    block_index,
    check_codes,
    stored,
    unsigned,
)
from jaxpeft.quant.formats.micro import MXFP4, NVFP4
from jaxpeft.quant.formats.words import (
    matrix,
    named,
    pack_words,
    unpack_words,
    whole_blocks,
    words_of,
)

Arrays = dict[str, np.ndarray]
BYTES = ("int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized")
FORMATS = ("pack-quantized", *BYTES, "mxfp4-pack-quantized", "nvfp4-pack-quantized")


class Compressed(NamedTuple):
    """A layer of a compressed-tensors file: its tensors, and what its configuration says."""

    arrays: Arrays
    weights: dict[str, Any]
    format: str


def from_compressed_tensors(
    arrays: Mapping[str, Any], weights: Mapping[str, Any], format: str
) -> Quantized:
    """A weight from the tensors of a compressed-tensors file.

    Args:
        arrays: by their names in the layer: `"weight_packed"` or `"weight"`, `"weight_scale"`, and
            what else there is of `"weight_zero_point"`, `"weight_shape"`, `"weight_g_idx"`,
            `"weight_global_scale"`.
        weights: the configuration's `config_groups[...]["weights"]`: `num_bits`, `type`,
            `strategy`, `group_size`, `symmetric`, `block_structure`.
        format: the configuration's `format`.

    Returns:
        `Quantized(packed, format, shape)` of the kernel (in, out), numpy arrays.

    Raises:
        ValueError: a format, type, number of bits or strategy that is not known; or arrays that
            are missing, of another shape or dtype, or not finite.

    Example:
        >>> arrays = {"weight": np.ones((3, 8), np.int8), "weight_scale": np.ones((3, 1), "f")}
        >>> weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
        >>> from_compressed_tensors(arrays, weights, "int-quantized").format
        Int8(block=None, symmetric=True, scale='float32', indexed=False, zero='uint8')
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not known. Use one of: {', '.join(FORMATS)}.")
    if format == "mxfp4-pack-quantized":
        return from_mxfp4(*named(arrays, "weight_packed", "weight_scale"))
    if format == "nvfp4-pack-quantized":
        names = ("weight_packed", "weight_scale", "weight_global_scale")
        return from_nvfp4(*named(arrays, *names), inverse=True)
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    if kind == "float" and bits == 8 and format in BYTES:
        return from_fp8(arrays, tile=_float_tile(weights))
    if kind != "int" or bits not in KINDS:
        raise ValueError(
            f"type={kind!r} with num_bits={bits!r} in {format!r} is not known. Load this weight "
            "dense, with compressed-tensors."
        )
    return _from_integers(arrays, weights, format, bits)


def to_compressed_tensors(weight: Quantized) -> Compressed:
    """The tensors and options of a file for a weight: the inverse of `from_compressed_tensors`.

    Args:
        weight: packed arrays of one matrix in `int4`, `int8`, `fp8`, `mxfp4` or `nvfp4` with
            `inverse=True`.

    Returns:
        `Compressed(arrays, weights, format)`.

    Raises:
        ValueError: another format, or a stack of weights.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxpeft.quant.formats import int8, quantize
        >>> weight = Quantized(quantize(jnp.ones((64, 3)), int8()), int8(), (64, 3))
        >>> to_compressed_tensors(weight).format
        'int-quantized'
    """
    fmt = weight.format
    if len(weight.shape) != 2:
        raise ValueError(f"a stack of weights {weight.shape} is no layer. Give one at a time.")
    if isinstance(fmt, Integer):
        return _to_integers(weight, fmt)
    if isinstance(fmt, Float8):
        return _to_floats(weight, fmt)
    if isinstance(fmt, MXFP4) or (isinstance(fmt, NVFP4) and fmt.inverse):
        return _to_fp4(weight)
    raise ValueError(
        f"compressed-tensors has no {fmt}. Dequantize, and quantize to int4, int8, fp8, mxfp4 or "
        "nvfp4(inverse=True)."
    )


def _from_integers(
    arrays: Mapping[str, Any], weights: Mapping[str, Any], format: str, bits: int
) -> Quantized:
    words, symmetric = format == "pack-quantized", bool(weights.get("symmetric", True))
    codes = _from_words(arrays, bits) if words else _from_bytes(arrays, bits)
    shape = codes.shape[::-1]
    scale = _for_outputs(named(arrays, "weight_scale")[0], weights, shape).T
    zero = None if symmetric else _zero_points(arrays, weights, shape, bits, words).T
    block, strategy = None, _strategy(weights)
    if strategy in ("group", "block"):
        given = int(weights["group_size"]) if strategy == "group" else _tile(weights)[0]
        block, scale = whole_blocks(given, shape[0], scale)
        zero = None if zero is None else whole_blocks(given, shape[0], zero)[1]
    index = _row_blocks(arrays)
    fmt = KINDS[bits](block, symmetric, str(scale.dtype), index is not None)
    packed: dict[str, Any] = {"codes": stored(codes.T, fmt), "scale": scale}
    packed |= {} if zero is None else {"zero": zero}
    if index is not None:
        packed["index"] = block_index("weight_g_idx", index, shape[0], fmt)[:, None]
    check(packed, fmt, shape)
    return Quantized(packed, fmt, shape)


def _strategy(weights: Mapping[str, Any]) -> str:
    """What shares a scale; a file that does not say it has groups, channels or one scale."""
    size = weights.get("group_size")
    implied = "tensor" if size is None else "channel" if size == -1 else "group"
    return weights.get("strategy") or implied


def _from_words(arrays: Mapping[str, Any], bits: int) -> np.ndarray:
    """Unsigned codes (out, in) from words along `in`."""
    words, sides = named(arrays, "weight_packed", "weight_shape")
    out, rows = (int(n) for n in sides)
    words_of(words, "weight_packed", (out, -(-rows * bits // 32)), bits)
    return unpack_words(words, 1, bits=bits)[:, :rows]


def _from_bytes(arrays: Mapping[str, Any], bits: int) -> np.ndarray:
    """Unsigned codes (out, in) from signed ones, a byte each."""
    (codes,) = named(arrays, "weight")
    most = 2 ** (bits - 1)
    if codes.dtype != np.int8 or codes.ndim != 2:
        raise ValueError(
            f"'weight' is {codes.dtype}{codes.shape}, but integers are int8 (out, in). Check "
            "format and type in the configuration."
        )
    if bits < 8 and (codes.min(initial=0) < -most or codes.max(initial=0) >= most):
        raise ValueError(
            f"'weight' has integers from {codes.min()} to {codes.max()}, but {bits} bits reach "
            f"from {-most} to {most - 1}. Check num_bits in the configuration."
        )
    return _shifted(codes, bits)


def _shifted(signed: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes from signed ones."""
    return (signed.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)


def _zero_points(
    arrays: Mapping[str, Any], weights: Mapping[str, Any], shape: Shape, bits: int, words: bool
) -> np.ndarray:
    """Unsigned zero points (out, groups); files of words pack them along `out`."""
    (zero,) = named(arrays, "weight_zero_point")
    if not words or _strategy(weights) not in ("group", "channel"):
        return _for_outputs(_shifted(zero, bits), weights, shape)
    matrix(zero, "weight_zero_point")
    words_of(zero, "weight_zero_point", (-(-shape[1] * bits // 32), zero.shape[1]), bits)
    return unpack_words(zero, 0, bits=bits)[: shape[1]]


def _for_outputs(array: np.ndarray, weights: Mapping[str, Any], shape: Shape) -> np.ndarray:
    """Scales or zero points (out, groups), also where several outputs share them."""
    if _strategy(weights) == "tensor":
        return np.broadcast_to(array.reshape(1, 1), (shape[1], 1))
    if _strategy(weights) == "block":
        check_tiles(array, shape, _tile(weights))
        return array[np.arange(shape[1]) // _tile(weights)[1]]
    return matrix(array, "weight_scale or weight_zero_point")


def _row_blocks(arrays: Mapping[str, Any]) -> np.ndarray | None:
    """The group of each row, where the file has one; -1 throughout stands for none."""
    index = arrays.get("weight_g_idx")
    return None if index is None or (np.asarray(index) == -1).all() else np.asarray(index)


def _to_integers(weight: Quantized, fmt: Integer) -> Compressed:
    packed, _, shape = weight
    check(packed, fmt, shape)
    check_codes(fmt)
    scale = np.ascontiguousarray(np.asarray(packed["scale"]).T)
    arrays: Arrays = {"weight_scale": scale}
    codes = unsigned(np.asarray(packed["codes"]), fmt).T
    if fmt.bits == 4:
        arrays["weight_packed"] = _words(codes)
        arrays["weight_shape"] = np.array(shape[::-1], np.int64)
    else:
        arrays["weight"] = np.ascontiguousarray((codes ^ np.uint8(128)).view(np.int8))
    if not fmt.symmetric:
        zero = np.asarray(packed["zero"]).T
        signed = (zero ^ np.uint8(128)).view(np.int8)
        arrays["weight_zero_point"] = _words(zero.T).T.copy() if fmt.bits == 4 else signed
    if fmt.indexed:
        arrays["weight_g_idx"] = np.asarray(packed["index"])[:, 0]
    weights = {"num_bits": fmt.bits, "type": "int", "symmetric": fmt.symmetric}
    weights |= {"strategy": "group" if fmt.block else "channel", "group_size": fmt.block}
    if fmt.indexed:
        weights["actorder"] = "group"
    return Compressed(arrays, weights, "pack-quantized" if fmt.bits == 4 else "int-quantized")


def _words(codes: np.ndarray) -> np.ndarray:
    """Words of eight codes along the last axis, the last one filled up with zeros."""
    return pack_words(np.pad(codes, [(0, 0), (0, -codes.shape[-1] % 8)]), axis=1)


def _tile(weights: Mapping[str, Any]) -> tuple[int, int]:
    """(inputs, outputs) that share a scale, from `block_structure` (outputs, inputs)."""
    outputs, inputs = weights["block_structure"]
    return int(inputs), int(outputs)


def _float_tile(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    if _strategy(weights) == "block":
        return _tile(weights)
    return (int(weights["group_size"]), 1) if _strategy(weights) == "group" else None


def _to_floats(weight: Quantized, fmt: Float8) -> Compressed:
    arrays = to_fp8(weight)
    scale = arrays.pop("weight_scale_inv", None)
    arrays |= {} if scale is None else {"weight_scale": scale}
    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
    weights["strategy"] = fmt.scale
    if fmt.scale == "block":
        weights["block_structure"] = list(fmt.tile[::-1])
    return Compressed(arrays, weights, "float-quantized")


def _to_fp4(weight: Quantized) -> Compressed:
    names = {
        "codes": "weight_packed",
        "scales": "weight_scale",
        "tensor_scale": "weight_global_scale",
    }
    arrays = {names[name]: np.atleast_1d(array) for name, array in to_fp4(weight).items()}
    mx = isinstance(weight.format, MXFP4)
    weights = {"num_bits": 4, "type": "float", "symmetric": True}
    weights |= {"strategy": "group" if mx else "tensor_group", "group_size": 32 if mx else 16}
    return Compressed(arrays, weights, f"{weight.format.name}-pack-quantized")
