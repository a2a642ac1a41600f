r"""LLM.int8(): an int8 product for most inputs, and a float product for columns with outliers.

    W'[i, j] = code[i, j] * absmax[j] / 127

    y = (x8 @ codes) * rowmax * absmax / 127^2  +  x[:, outliers] @ W'[outliers]

`outliers` are the input columns in which some |x| reaches the threshold; `x8` is the rest of `x`,
each row rounded to int8 by its own largest magnitude.

Reference:
    Dettmers et al. 2022, arXiv:2208.07339.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpeft.quant.formats.base import Format, Layout, Packed, Quantized, Shape, check, spec, split
from jaxpeft.quant.formats.blocks import round_to_int

Array = jax.Array
_STEP = np.float32(1 / 127)
_STEP_SQUARED = np.float32(1 / 127**2)


@dataclasses.dataclass(frozen=True)
class LLMInt8(Format):
    """8-bit integers by the largest magnitude of each output; see `llm_int8_dot`."""

    threshold: float = 6.0

    name = "llm_int8"

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(
                f"llm_int8(threshold={self.threshold!r}) must be positive; 6.0 is usual, and "
                "float('inf') is for no outliers."
            )

    def layout(self, shape: Shape) -> Layout:
        stack, rows, columns = split(shape, 1)
        return {
            "codes": spec((*stack, rows, columns), np.int8),
            "absmax": spec((*stack, 1, columns), np.float32),
        }

    def encode(self, weight: Array, key: Array | None) -> Packed:
        codes, absmax = _to_int8(weight, axis=-2, key=key)
        return {"codes": codes, "absmax": absmax}

    def decode(self, packed: Mapping[str, Array]) -> Array:
        return packed["codes"].astype(jnp.float32) * packed["absmax"] * _STEP


def llm_int8(threshold: float = 6.0) -> LLMInt8:
    """The weights of LLM.int8(): 8 bits a weight and 32 for each output.

    Args:
        threshold: magnitude from which an input counts as an outlier, for `llm_int8_dot`.

    Returns:
        The format. Codes and absmax equal those of bitsandbytes.

    Raises:
        ValueError: if `threshold` is not positive.

    Example:
        >>> llm_int8().layout((64, 3))["absmax"].shape
        (1, 3)

    Reference:
        Dettmers et al. 2022, arXiv:2208.07339.
    """
    return LLMInt8(threshold)


def llm_int8_dot(x: Array, packed: Mapping[str, Array], fmt: LLMInt8) -> Array:
    """`x @ W'` with int8 arithmetic but for outlier columns, as bitsandbytes computes it.

    Which columns hold outliers is known only as the program runs, so that the float product runs
    over all columns, and only where there are any outliers. The backward pass is that of `x @ W'`.

    Args:
        x: `(..., in)`, any float dtype.
        packed: arrays of one weight (in, out).
        fmt: their format, with the threshold.

    Returns:
        `(..., out)` in the dtype of `x`.

    Raises:
        ValueError: `x` does not have as many columns as the weight has rows.

    Example:
        >>> from jaxpeft.quant.formats import quantize
        >>> packed = quantize(jnp.eye(3), llm_int8())
        >>> llm_int8_dot(jnp.array([[1.0, 0.0, 9.0]]), packed, llm_int8()).round(3)
        Array([[1., 0., 9.]], dtype=float32)
    """
    codes, absmax = packed["codes"], packed["absmax"]
    if codes.ndim != 2 or x.shape[-1] != codes.shape[0]:
        raise ValueError(
            f"x{x.shape} does not meet a weight {codes.shape} (in, out). Give one layer's arrays."
        )
    flat = x.reshape(-1, x.shape[-1])
    y = _dot(flat, codes, absmax, fmt.threshold)
    return y.reshape(*x.shape[:-1], codes.shape[1])


def _dot(x: Array, codes: Array, absmax: Array, threshold: float) -> Array:
    @jax.custom_vjp
    def dot(x: Array, codes: Array, absmax: Array) -> Array:
        return _mixed(x, codes, absmax, threshold)

    def forward(x: Array, codes: Array, absmax: Array) -> tuple[Array, tuple[Array, Array]]:
        return dot(x, codes, absmax), (codes, absmax)

    def backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Any, Array]:
        codes, absmax = saved
        frozen = np.zeros(codes.shape, jax.dtypes.float0), jnp.zeros_like(absmax)
        return g @ _dense(codes, absmax, g.dtype).T, *frozen

    dot.defvjp(forward, backward)
    return dot(x, codes, absmax)


def _mixed(x: Array, codes: Array, absmax: Array, threshold: float) -> Array:
    wide = x.astype(jnp.float32)
    outliers = jnp.abs(wide) >= threshold
    columns = jnp.any(outliers, axis=0)
    x8, rowmax = _to_int8(jnp.where(outliers, 0, wide), axis=-1, key=None)
    total = lax.dot(jnp.where(columns, 0, x8), codes, preferred_element_type=jnp.int32)
    main = total.astype(jnp.float32) * (rowmax * absmax) * _STEP_SQUARED

    def rest() -> Array:
        return jnp.where(columns, x, 0) @ _dense(codes, absmax, x.dtype)

    none = lambda: jnp.zeros_like(main, x.dtype)  # noqa: E731
    return main.astype(x.dtype) + lax.cond(jnp.any(columns), rest, none)


def _dense(codes: Array, absmax: Array, dtype: Any) -> Array:
    return (codes.astype(jnp.float32) * absmax * _STEP).astype(dtype)


def _to_int8(x: Array, *, axis: int, key: Array | None) -> tuple[Array, Array]:
    absmax = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    codes = round_to_int(x * (127 / jnp.where(absmax == 0, 1, absmax)), key)
    return jnp.clip(codes, -127, 127).astype(jnp.int8), absmax


def from_llm_int8(arrays: Mapping[str, Any], threshold: float = 6.0) -> Quantized:
    """A weight of LLM.int8() from the tensors of a file.

    Args:
        arrays: `"weight"` int8 (out, in) and `"SCB"` float32 (out).
        threshold: the configuration's `llm_int8_threshold`.

    Returns:
        `Quantized(packed, format, shape)` of the kernel (in, out), numpy arrays.

    Raises:
        ValueError: an array is missing, of another shape or dtype, or not finite.

    Example:
        >>> arrays = {"weight": np.ones((3, 8), np.int8), "SCB": np.ones(3, np.float32)}
        >>> from_llm_int8(arrays).shape
        (8, 3)
    """
    if missing := {"weight", "SCB"} - arrays.keys():
        raise ValueError(f"{sorted(missing)} missing among {sorted(arrays)}. Give both arrays.")
    codes, absmax = np.asarray(arrays["weight"]).T, np.asarray(arrays["SCB"])[None]
    weight = Quantized({"codes": codes, "absmax": absmax}, LLMInt8(threshold), codes.shape)
    check(*weight)
    return weight


def to_llm_int8(weight: Quantized) -> dict[str, np.ndarray]:
    """The inverse of `from_llm_int8`, for one matrix.

    Raises:
        ValueError: another format, or a stack of weights.
    """
    packed, fmt, shape = weight
    if not isinstance(fmt, LLMInt8) or len(shape) != 2:
        raise ValueError(f"{fmt} of shape {shape} is no llm_int8 matrix. Give one layer's.")
    codes, absmax = np.asarray(packed["codes"]), np.asarray(packed["absmax"])
    return {"weight": np.ascontiguousarray(codes.T), "SCB": absmax[0]}
