r"""GPTQ's and AWQ's 4-bit tensors, to and from packed arrays: the same numbers in another order.

    W'[i, j] = scales[g(i), j] * (q[i, j] - z[g(i), j])

Both keep (in, out) matrices with eight codes in an int32. GPTQ packs `q` along `in` and `z` along
`out`; version 1 files hold `z - 1`. AWQ packs both along `out`, in the order 0 2 4 6 1 3 5 7.

Reference:
    Frantar et al. 2022, arXiv:2210.17323; Lin et al. 2023, arXiv:2306.00978.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpeft.quant.formats.base import Quantized, check
from jaxpeft.quant.formats.blocks import pack_nibbles
from jaxpeft.quant.formats.integer import Int4, block_index, check_codes
from jaxpeft.quant.formats.words import named, pack_words, unpack_words, words_of

Arrays = dict[str, np.ndarray]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_MIDDLE = 8


def from_gptq(
    arrays: Mapping[str, Any],
    *,
    block: int | None = 128,
    symmetric: bool = True,
    indexed: bool = False,
    version: int = 1,
) -> Quantized:
    """A 4-bit weight from a GPTQ file. The options are those of its configuration.

    Args:
        arrays: `"qweight"` (in / 8, out), `"qzeros"` (groups, out / 8), `"scales"` (groups, out)
            and, where rows are not in the order of their groups, `"g_idx"` (in).
        block: `group_size`; None for -1.
        symmetric: `sym`; the zero points are then all 8 and need not be kept.
        indexed: `desc_act`; `g_idx` is then kept.
        version: 1 for `checkpoint_format` "gptq", 2 for "gptq_v2".

    Returns:
        `Quantized(packed, format, shape)` of the kernel (in, out), numpy arrays.

    Raises:
        ValueError: an array is missing, of another shape or dtype, or contradicts an option.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxpeft.quant.formats import int4, quantize
        >>> weight = Quantized(quantize(jnp.ones((128, 8)), int4()), int4(), (128, 8))
        >>> from_gptq(to_gptq(weight)).shape
        (128, 8)
    """
    qweight, qzeros, scales = named(arrays, "qweight", "qzeros", "scales")
    groups, out = scales.shape
    rows = 8 * qweight.shape[0]
    words_of(qweight, "qweight", (rows // 8, out))
    words_of(qzeros, "qzeros", (groups, out // 8))
    zero = unpack_words(qzeros, axis=1)
    if _version(version) == 1:
        # A zero point of 0 wraps to 15 in a file.
        zero = (zero + 1) & 15
    fmt = Int4(block, symmetric, str(scales.dtype), indexed)
    packed = {"codes": pack_nibbles(unpack_words(qweight, axis=0)), "scale": scales}
    packed |= _zeros(zero, symmetric) | _index(arrays.get("g_idx"), rows, fmt)
    check(packed, fmt, (rows, out))
    return Quantized(packed, fmt, (rows, out))


def to_gptq(weight: Quantized, *, version: int = 1) -> Arrays:
    """The tensors of a GPTQ file: the inverse of `from_gptq`.

    Args:
        weight: packed arrays of one matrix in `int4`.
        version: of the file, see `from_gptq`.

    Returns:
        `"qweight"`, `"qzeros"`, `"scales"`, `"g_idx"`.

    Raises:
        ValueError: another format, a stack of weights, or sides that are no multiples of 8.
    """
    codes, zero, scales, index = _parts(weight)
    if _version(version) == 1:
        zero = (zero - 1) & 15
    return {
        "qweight": pack_words(codes, axis=0),
        "qzeros": pack_words(zero, axis=1),
        "scales": scales,
        "g_idx": index,
    }


def from_awq(
    arrays: Mapping[str, Any], *, block: int | None = 128, symmetric: bool = False
) -> Quantized:
    """A 4-bit weight from an AWQ file (version "gemm").

    Args:
        arrays: `"qweight"` (in, out / 8), `"qzeros"` (groups, out / 8), `"scales"` (groups, out).
        block: the configuration's group size; None for -1.
        symmetric: whether the configuration says `zero_point: false`.

    Returns:
        As `from_gptq`.

    Raises:
        ValueError: as `from_gptq`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxpeft.quant.formats import int4, quantize
        >>> fmt = int4(64, symmetric=False)
        >>> weight = Quantized(quantize(jnp.ones((128, 8)), fmt), fmt, (128, 8))
        >>> from_awq(to_awq(weight), block=64).shape
        (128, 8)
    """
    qweight, qzeros, scales = named(arrays, "qweight", "qzeros", "scales")
    groups, out = scales.shape
    rows = qweight.shape[0]
    words_of(qweight, "qweight", (rows, out // 8))
    words_of(qzeros, "qzeros", (groups, out // 8))
    zero = unpack_words(qzeros, 1, AWQ_ORDER)
    fmt = Int4(block, symmetric, str(scales.dtype))
    packed = {"codes": pack_nibbles(unpack_words(qweight, 1, AWQ_ORDER)), "scale": scales}
    packed |= _zeros(zero, symmetric)
    check(packed, fmt, (rows, out))
    return Quantized(packed, fmt, (rows, out))


def to_awq(weight: Quantized) -> Arrays:
    """The tensors of an AWQ file: the inverse of `from_awq`.

    Raises:
        ValueError: another format, a stack of weights, outputs that are no multiple of 8, or rows
            that are not in the order of their groups.
    """
    if getattr(weight.format, "indexed", False):
        raise ValueError("AWQ files have no g_idx. Write this weight with to_gptq.")
    codes, zero, scales, _ = _parts(weight)
    return {
        "qweight": pack_words(codes, 1, AWQ_ORDER),
        "qzeros": pack_words(zero, 1, AWQ_ORDER),
        "scales": scales,
    }


def _version(version: int) -> int:
    if version not in (1, 2):
        raise ValueError(f"version={version!r}: 1 is 'gptq', 2 is 'gptq_v2' (checkpoint_format).")
    return version


def _zeros(zero: np.ndarray, symmetric: bool) -> Arrays:
    if not symmetric:
        return {"zero": zero}
    if (zero != _MIDDLE).any():
        raise ValueError(
            f"the zero points are not all {_MIDDLE} but {np.unique(zero).tolist()}: the file is "
            "asymmetric, or of the other version. Pass symmetric=False, or version=1 or 2."
        )
    return {}


def _index(index: Any, rows: int, fmt: Int4) -> Arrays:
    """The block of each row, where it has to be kept."""
    in_order = np.arange(rows, dtype=np.int32) // (fmt.block or rows)
    index = in_order if index is None else block_index("g_idx", index, rows, fmt)
    if fmt.indexed:
        return {"index": index[:, None]}
    if not np.array_equal(index, in_order):
        raise ValueError("'g_idx' is not in the order of groups. Pass indexed=True (desc_act).")
    return {}


def _parts(weight: Quantized) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes (in, out), zero points and scales (groups, out), the group of each row."""
    packed, fmt, shape = weight
    if not isinstance(fmt, Int4) or len(shape) != 2:
        raise ValueError(f"{fmt} of shape {shape} is no int4 matrix. Give one layer's.")
    check(packed, fmt, shape)
    check_codes(fmt)
    halves, scales = np.asarray(packed["codes"]), np.asarray(packed["scale"])
    codes = np.stack([halves & 15, halves >> 4], axis=1).reshape(shape)
    zero = np.full(scales.shape, _MIDDLE, np.uint8)
    in_order = np.arange(shape[0], dtype=np.int32) // (fmt.block or shape[0])
    index = np.asarray(packed["index"])[:, 0] if fmt.indexed else in_order
    return codes, zero if fmt.symmetric else np.asarray(packed["zero"]), scales, index
