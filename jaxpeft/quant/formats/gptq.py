r"""GPTQ's and AWQ's tensors, to and from packed arrays: the same numbers in another order.

    W'[i, j] = scales[g(i), j] * (q[i, j] - z[g(i), j])

Codes of 4 or 8 bits lie in an int32. GPTQ packs `q` (in, out) along `in` and `z` along `out`. In
files of its version 1 each word of `z` is less by a 1 in each code, with a borrow where `z` is 0.
AWQ's version "gemm" packs both along `out`, in the order 0 2 4 6 1 3 5 7; its version "gemv" holds
(out, in) and packs both along `in`.

Reference:
    Frantar et al. 2022, arXiv:2210.17323; Lin et al. 2023, arXiv:2306.00978.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpeft.quant.formats.base import Quantized, check
from jaxpeft.quant.formats.integer import (
    KINDS,
    Int4,
    Integer,
    block_index,
    check_codes,
    stored,
    unsigned,
)
from jaxpeft.quant.formats.words import (
    matrix,
    named,
    pack_words,
    unpack_words,
    whole_blocks,
    words_of,
)

Arrays = dict[str, np.ndarray]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# A 1 in each code of a word.
_ONES = {4: np.uint32(0x11111111), 8: np.uint32(0x01010101)}
_SCALES = ("float16", "bfloat16")


def from_gptq(
    arrays: Mapping[str, Any],
    *,
    block: int | None = 128,
    bits: int = 4,
    symmetric: bool = True,
    indexed: bool = False,
    version: int = 1,
) -> Quantized:
    """A weight from a GPTQ file. The options are those of its configuration.

    Args:
        arrays: `"qweight"` (in * bits / 32, out), `"qzeros"` (groups, out * bits / 32), `"scales"`
            (groups, out) and, where rows are not in the order of their groups, `"g_idx"` (in).
        block: `group_size`; None for -1. Where it does not divide `in`, so that the last group of
            the file is short, the result has smaller blocks of the same values.
        bits: 4 or 8.
        symmetric: `sym`; the zero points are then all in the middle and need not be kept.
        indexed: `desc_act`; `g_idx` is then kept.
        version: 1 for `checkpoint_format` "gptq", 2 for "gptq_v2".

    Returns:
        `Quantized(packed, format, shape)` of the kernel (in, out), numpy arrays.

    Raises:
        ValueError: an array is missing, of another shape or dtype, or contradicts an option.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxpeft.quant.formats import int4, quantize
        >>> fmt = int4(scale="float16")
        >>> weight = Quantized(quantize(jnp.ones((128, 8)), fmt), fmt, (128, 8))
        >>> from_gptq(to_gptq(weight)).shape
        (128, 8)
    """
    qweight, qzeros, scales = _matrices(arrays)
    if bits not in KINDS:
        raise ValueError(f"bits={bits!r}: 4 and 8 are supported. Load the weight dense.")
    groups, out = scales.shape
    rows = 32 // bits * qweight.shape[0]
    words_of(qweight, "qweight", (rows * bits // 32, out), bits)
    words_of(qzeros, "qzeros", (groups, -(-out * bits // 32)), bits)
    zero = _zero_points(qzeros, bits, version)[:, :out]
    codes, index = unpack_words(qweight, axis=0, bits=bits), arrays.get("g_idx")
    if block and rows % block:
        _, zero = whole_blocks(block, rows, zero)
        part, scales = whole_blocks(block, rows, scales)
        index, block = _finer(index, rows, block, groups), part
    fmt = KINDS[bits](block, symmetric, str(scales.dtype), indexed)
    packed = {"codes": stored(codes, fmt), "scale": scales}
    packed |= _zeros(zero, fmt) | _index(index, rows, fmt)
    check(packed, fmt, (rows, out))
    return Quantized(packed, fmt, (rows, out))


def to_gptq(weight: Quantized, *, version: int = 1) -> Arrays:
    """The tensors of a GPTQ file: the inverse of `from_gptq`.

    Args:
        weight: packed arrays of one matrix in `int4` or `int8`, with scales in float16 or bfloat16,
            the only ones that readers of these files keep.
        version: of the file, see `from_gptq`.

    Returns:
        `"qweight"`, `"qzeros"`, `"scales"`, `"g_idx"`.

    Raises:
        ValueError: another format, a stack of weights, scales of another dtype, or sides that do
            not fill words.
    """
    fmt, codes, zero, scales, index = _parts(weight)
    qzeros = pack_words(zero, axis=1, bits=fmt.bits)
    if _version(version) == 1:
        qzeros = (qzeros.view(np.uint32) - _ONES[fmt.bits]).view(np.int32)
    return {
        "qweight": pack_words(codes, axis=0, bits=fmt.bits),
        "qzeros": qzeros,
        "scales": scales,
        "g_idx": index,
    }


def from_awq(
    arrays: Mapping[str, Any],
    *,
    block: int | None = 128,
    symmetric: bool = False,
    version: str = "gemm",
) -> Quantized:
    """A 4-bit weight from an AWQ file.

    Args:
        arrays: `"qweight"` (in, out / 8), `"qzeros"` (groups, out / 8), `"scales"` (groups, out);
            for version "gemv" (out, in / 8), (out, n) and (out, 8 n), where `8 n >= groups`.
        block: the configuration's group size; None for -1.
        symmetric: whether the configuration says `zero_point: false`.
        version: "gemm" or "gemv".

    Returns:
        As `from_gptq`.

    Raises:
        ValueError: as `from_gptq`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxpeft.quant.formats import int4, quantize
        >>> fmt = int4(64, symmetric=False, scale="float16")
        >>> weight = Quantized(quantize(jnp.ones((128, 8)), fmt), fmt, (128, 8))
        >>> from_awq(to_awq(weight), block=64).shape
        (128, 8)
    """
    if version not in ("gemm", "gemv"):
        raise ValueError(f"version={version!r} is neither 'gemm' nor 'gemv'.")
    read = _gemm if version == "gemm" else _gemv
    codes, zero, scales = read(_matrices(arrays), block)
    fmt = Int4(block, symmetric, str(scales.dtype))
    packed = {"codes": stored(codes, fmt), "scale": scales} | _zeros(zero, fmt)
    check(packed, fmt, codes.shape)
    return Quantized(packed, fmt, codes.shape)


def to_awq(weight: Quantized) -> Arrays:
    """The tensors of an AWQ file (version "gemm"): the inverse of `from_awq`.

    Raises:
        ValueError: another format, a stack of weights, scales other than float16 or bfloat16,
            outputs that are no multiple of 8, or rows that are not in the order of their groups.
    """
    if not isinstance(weight.format, Int4):
        raise ValueError(f"{weight.format} is not int4, which AWQ files hold. Quantize to int4.")
    if weight.format.indexed:
        raise ValueError("AWQ files have no g_idx. Write this weight with to_gptq.")
    _, codes, zero, scales, _ = _parts(weight)
    return {
        "qweight": pack_words(codes, 1, AWQ_ORDER),
        "qzeros": pack_words(zero, 1, AWQ_ORDER),
        "scales": scales,
    }


def _matrices(arrays: Mapping[str, Any]) -> list[np.ndarray]:
    names = ("qweight", "qzeros", "scales")
    return [matrix(a, name) for name, a in zip(names, named(arrays, *names), strict=True)]


def _gemm(matrices: Sequence[np.ndarray], block: int | None) -> Sequence[np.ndarray]:
    qweight, qzeros, scales = matrices
    groups, out = scales.shape
    words_of(qweight, "qweight", (qweight.shape[0], out // 8))
    words_of(qzeros, "qzeros", (groups, out // 8))
    return unpack_words(qweight, 1, AWQ_ORDER), unpack_words(qzeros, 1, AWQ_ORDER), scales


def _gemv(matrices: Sequence[np.ndarray], block: int | None) -> Sequence[np.ndarray]:
    """Scales and zero points of the groups that there are; files fill up their rows."""
    qweight, qzeros, scales = matrices
    out, rows = qweight.shape[0], 8 * qweight.shape[1]
    words_of(qweight, "qweight", (out, rows // 8))
    words_of(qzeros, "qzeros", (out, scales.shape[1] // 8))
    groups = rows // (block or rows or 1)
    zero = unpack_words(qzeros, 1)[:, :groups]
    return unpack_words(qweight, 1).T, zero.T, scales[:, :groups].T


def _version(version: int) -> int:
    if version not in (1, 2):
        raise ValueError(f"version={version!r}: 1 is 'gptq', 2 is 'gptq_v2' (checkpoint_format).")
    return version


def _zero_points(qzeros: np.ndarray, bits: int, version: int) -> np.ndarray:
    words = qzeros.view(np.uint32)
    if _version(version) == 1:
        words = words + _ONES[bits]
    return unpack_words(words.view(np.int32), axis=1, bits=bits)


def _zeros(zero: np.ndarray, fmt: Integer) -> Arrays:
    if not fmt.symmetric:
        return {"zero": zero}
    middle = 2 ** (fmt.bits - 1)
    if (zero != middle).any():
        raise ValueError(
            f"the zero points are not all {middle} but {np.unique(zero).tolist()}: the file is "
            "asymmetric, or of the other version. Pass symmetric=False, or version=1 or 2."
        )
    return {}


def _finer(index: Any, rows: int, block: int, groups: int) -> np.ndarray | None:
    """The block of each row, where groups become several blocks each; None for rows in order."""
    if index is None or np.array_equal(index, np.arange(rows) // block):
        return None
    index = np.asarray(index)
    if (
        index.shape != (rows,)
        or index.dtype.kind not in "iu"
        or not ((0 <= index) & (index < groups)).all()
    ):
        raise ValueError(
            f"'g_idx' is {index.dtype}{index.shape}, but {rows} rows need {rows} numbers below "
            f"{groups}. Check group_size."
        )
    return index * (block // math.gcd(block, rows))


def _index(index: Any, rows: int, fmt: Integer) -> Arrays:
    """The block of each row, where it has to be kept."""
    in_order = np.arange(rows, dtype=np.int32) // (fmt.block or rows)
    index = in_order if index is None else block_index("g_idx", index, rows, fmt)
    if fmt.indexed:
        return {"index": index[:, None]}
    if not np.array_equal(index, in_order):
        raise ValueError("'g_idx' is not in the order of groups. Pass indexed=True (desc_act).")
    return {}


def _parts(
    weight: Quantized,
) -> tuple[Integer, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The format, codes (in, out), zero points and scales (groups, out), the group of each row."""
    packed, fmt, shape = weight
    if not isinstance(fmt, Integer) or len(shape) != 2:
        raise ValueError(f"{fmt} of shape {shape} is no int4 or int8 matrix. Give one layer's.")
    check(packed, fmt, shape)
    check_codes(fmt)
    if fmt.scale not in _SCALES:
        raise ValueError(
            f"readers of GPTQ and AWQ files round scales to {' or '.join(_SCALES)}, but these are "
            f"{fmt.scale}. Quantize with {fmt.name}(scale='float16')."
        )
    codes, scales = unsigned(np.asarray(packed["codes"]), fmt), np.asarray(packed["scale"])
    zero = np.full(scales.shape, 2 ** (fmt.bits - 1), np.uint8)
    in_order = np.arange(shape[0], dtype=np.int32) // (fmt.block or shape[0])
    index = np.asarray(packed["index"])[:, 0] if fmt.indexed else in_order
    return fmt, codes, zero if fmt.symmetric else np.asarray(packed["zero"]), scales, index
