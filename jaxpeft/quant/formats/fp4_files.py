"""MXFP4 and NVFP4 tensors of files: (out, in / 2) bytes, low half first, to and from ours."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxpeft.quant.formats.base import Quantized, check
from jaxpeft.quant.formats.micro import MXFP4, NVFP4


def from_mxfp4(codes: Any, scales: Any) -> Quantized:
    """A weight from a file's MXFP4 tensors.

    Args:
        codes: uint8 `(*stack, out, in / 2)` (compressed-tensors' `weight_packed`), or
            `(*stack, out, in / 32, 16)` (gpt-oss' `_blocks`).
        scales: uint8 `(*stack, out, in / 32)`, biased exponents.

    Returns:
        `Quantized(packed, format, shape)` of the kernel (*stack, in, out), numpy arrays.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a scale that is not a number (255).

    Example:
        >>> from_mxfp4(np.zeros((3, 2, 16), np.uint8), np.full((3, 2), 127, np.uint8)).shape
        (64, 3)
    """
    codes, scales = np.asarray(codes), np.asarray(scales)
    if codes.ndim == scales.ndim + 1 and codes.shape[-1] == 16:
        codes = codes.reshape(*codes.shape[:-2], -1)
    weight = _kernel({"codes": codes, "scale": scales}, MXFP4())
    if bad := int((scales == 255).sum()):
        raise ValueError(
            f"{bad} of {scales.size} MXFP4 scales are 255, not a number. Download the file again."
        )
    return weight


def from_nvfp4(codes: Any, scales: Any, tensor_scale: Any, *, inverse: bool = False) -> Quantized:
    """A weight from a file's NVFP4 tensors.

    Args:
        codes: uint8 `(*stack, out, in / 2)`.
        scales: float8_e4m3fn `(*stack, out, in / 16)`.
        tensor_scale: one float32 for each weight of the stack: ModelOpt's `weight_scale_2`, or
            compressed-tensors' `weight_global_scale` with `inverse`.
        inverse: whether block scales are divided by it.

    Returns:
        As `from_mxfp4`.

    Raises:
        ValueError: shapes or dtypes that do not fit, or scales that are not finite, or 0 with
            `inverse`.

    Example:
        >>> import ml_dtypes
        >>> scales = np.ones((3, 4), ml_dtypes.float8_e4m3fn)
        >>> from_nvfp4(np.zeros((3, 32), np.uint8), scales, np.float32(0.1)).shape
        (64, 3)
    """
    codes, scales = np.asarray(codes), np.asarray(scales)
    stack = codes.shape[:-2]
    factor = np.asarray(tensor_scale, np.float32)
    if factor.size != max(int(np.prod(stack)), 1) or (inverse and not factor.all()):
        raise ValueError(
            f"tensor_scale{factor.shape} is not one number other than 0 for each weight of a stack "
            f"{stack}. Check it, or download the file again."
        )
    arrays = {"codes": codes, "scale": scales}
    return _kernel(arrays, NVFP4(inverse), tensor_scale=factor.reshape(*stack, 1, 1))


def to_fp4(weight: Quantized) -> dict[str, np.ndarray]:
    """A file's arrays of an `mxfp4` or `nvfp4` weight: `"codes"`, `"scales"`, `"tensor_scale"`.

    Raises:
        ValueError: another format, or arrays that do not fit it.
    """
    packed, fmt, shape = weight
    if not isinstance(fmt, MXFP4 | NVFP4):
        raise ValueError(f"{fmt} is neither mxfp4 nor nvfp4. Dequantize and quantize the weight.")
    check(packed, fmt, shape)
    by_row = {
        name: np.ascontiguousarray(np.swapaxes(np.asarray(packed[key]), -1, -2))
        for name, key in (("codes", "codes"), ("scales", "scale"))
    }
    if isinstance(fmt, MXFP4):
        return by_row
    return by_row | {"tensor_scale": np.asarray(packed["tensor_scale"])[..., 0, 0]}


def _kernel(arrays: dict[str, np.ndarray], fmt: MXFP4 | NVFP4, **more: np.ndarray) -> Quantized:
    codes = arrays["codes"]
    if codes.ndim < 2:
        raise ValueError(f"codes{codes.shape} have no axes (out, in / 2). Give a whole weight's.")
    shape = (*codes.shape[:-2], 2 * codes.shape[-1], codes.shape[-2])
    packed = {name: np.swapaxes(array, -1, -2) for name, array in arrays.items()} | more
    check(packed, fmt, shape)
    return Quantized(packed, fmt, shape)
