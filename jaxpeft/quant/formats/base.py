r"""What all packed formats share: the description of one, the layout rule, checks and the error.

A weight is `(*stack, in, out)`: leading axes that a scan or experts run over, the axis that
products contract, the axis that they keep. Blocks of equal scale run along `in`. Every packed array
has as many axes as the weight: the stack axes are whole, `in` is divided (by the codes in a
byte, by the block), `out` is whole or 1. So a slice of the stack or of `out`, and a sharding of
them, is the same slice and the same sharding of each packed array.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxpeft.core.sharding import automatic, placed_as, spread

Array = jax.Array
Packed = dict[str, Any]  # arrays of JAX, or of numpy where a converter made them
Shape = tuple[int, ...]
Layout = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Format:
    """A packed format: a name, options that JSON can hold, and three pure functions.

    `layout(shape)` says which arrays hold a weight, `encode(weight, key)` makes them, in float32
    arithmetic, and `decode(packed)` is the float32 weight.
    """

    name: ClassVar[str]

    def layout(self, shape: Shape) -> Layout:
        """Names, shapes and dtypes of the packed arrays; ValueError if the shape does not fit."""
        raise NotImplementedError

    def encode(self, weight: Array, key: Array | None) -> Packed:
        """Packs a float32 weight; `key` rounds stochastically, where the format can."""
        raise NotImplementedError

    def decode(self, packed: Mapping[str, Array]) -> Array:
        """The float32 weight `(*stack, in, out)`."""
        raise NotImplementedError


class Error(NamedTuple):
    """How far a packed weight is from the original.

    `rms = sqrt(mean((W - W')^2))` in the units of `W`; `max_relative = max|W - W'| / max|W|`.
    """

    rms: Array
    max_relative: Array


class Quantized(NamedTuple):
    """A packed weight with what it takes to read it: the result of a converter."""

    packed: Packed
    format: Format
    shape: Shape


def quantize(weight: Array, fmt: Format, *, key: Array | None = None) -> Packed:
    """Packs a weight.

    Args:
        weight: `(*stack, in, out)`, any float dtype; computed in float32.
        fmt: the format, such as `nf4()`.
        key: rounds stochastically (integer formats only); each code is right on average.

    Returns:
        A flat dict of arrays, as `fmt.layout(weight.shape)` lists them.

    Raises:
        ValueError: the weight is not finite (where its values are known), not of a float dtype,
            of a shape that the format cannot block, or `key` is given to a format without
            stochastic rounding.

    Example:
        >>> from jaxpeft.quant.formats import nf4, quantize
        >>> packed = quantize(jnp.ones((64, 3)), nf4(double=False))
        >>> packed["codes"].shape, packed["absmax"].shape
        ((32, 3), (1, 3))
    """
    weight = jnp.asarray(weight)
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(f"a weight of dtype {weight.dtype} is no float. Give the dense weight.")
    fmt.layout(weight.shape)
    _check_finite("weight", weight, "Find the step or the file that made it so.")
    packed = _encode(weight, key, fmt)
    return {name: placed_as(array, spread(weight, array.shape)) for name, array in packed.items()}


def dequantize(
    packed: Mapping[str, Any], fmt: Format, shape: Shape, dtype: DTypeLike = jnp.float32
) -> Array:
    """The dense weight, computed in float32 and rounded once to `dtype`.

    Args:
        packed: the arrays of `quantize` or of a converter.
        fmt: their format.
        shape: of the weight, `(*stack, in, out)`.
        dtype: of the result.

    Returns:
        The weight.

    Raises:
        ValueError: an array is missing, or of another shape or dtype than `fmt.layout(shape)`.

    Example:
        >>> from jaxpeft.quant.formats import dequantize, nf4, quantize
        >>> packed = quantize(jnp.full((64, 3), 2.0), nf4())
        >>> dequantize(packed, nf4(), (64, 3), jnp.bfloat16).dtype
        dtype(bfloat16)
    """
    check_layout(packed, fmt, shape)
    sharding = spread(max(packed.values(), key=lambda array: array.size), shape)
    return automatic(lambda arrays: decoded(arrays, fmt, dtype), sharding, dict(packed))


def error(weight: Array, packed: Mapping[str, Any], fmt: Format) -> Error:
    """Root mean square and largest relative difference between a weight and its packed form.

    Args:
        weight: the original, `(*stack, in, out)`.
        packed: its packed arrays.
        fmt: their format.

    Returns:
        `Error(rms, max_relative)`, float32 scalars; `max_relative` is 0 for an exact result.

    Example:
        >>> from jaxpeft.quant.formats import error, int8, quantize
        >>> w = jnp.linspace(-1, 1, 64).reshape(32, 2)
        >>> float(error(w, quantize(w, int8()), int8()).max_relative) < 0.5 / 127 + 1e-6
        True
    """
    weight = jnp.asarray(weight, jnp.float32)
    off = jnp.abs(weight - dequantize(packed, fmt, weight.shape))
    worst, largest = jnp.max(off), jnp.max(jnp.abs(weight))
    return Error(jnp.sqrt(jnp.mean(off * off)), jnp.where(worst > 0, worst / largest, 0.0))


# Compiled as a whole, so that no array of the weight's size is made on the way.
@functools.partial(jax.jit, static_argnames="fmt")
def _encode(weight: Array, key: Array | None, fmt: Format) -> Packed:
    shardings = {n: spread(weight, array.shape) for n, array in fmt.layout(weight.shape).items()}
    encode = lambda weight, key: fmt.encode(weight.astype(jnp.float32), key)  # noqa: E731
    return automatic(encode, shardings, weight, key)


@functools.partial(jax.jit, static_argnames=("fmt", "dtype"))
def decoded(packed: Packed, fmt: Format, dtype: DTypeLike) -> Array:
    """`dequantize` without its checks."""
    return fmt.decode(packed).astype(dtype)


def check(packed: Mapping[str, Any], fmt: Format, shape: Shape) -> None:
    """Checks the layout of packed arrays, and that their scales are finite where they are known.

    Raises:
        ValueError: as said there, naming the array.
    """
    check_layout(packed, fmt, shape)
    for name, array in packed.items():
        if jnp.issubdtype(array.dtype, jnp.floating):
            _check_finite(name, array, "The file is damaged: download or quantize it again.")


def check_layout(packed: Mapping[str, Any], fmt: Format, shape: Shape) -> None:
    """Checks names, shapes and dtypes of packed arrays against `fmt.layout(shape)`."""
    expected = fmt.layout(tuple(shape))
    if missing := expected.keys() - packed.keys():
        raise ValueError(
            f"{fmt} of a weight {tuple(shape)} lacks {sorted(missing)}; it has {sorted(packed)}. "
            "Give all arrays of one weight, and the options that it was quantized with."
        )
    for name, want in expected.items():
        got = packed[name]
        if tuple(got.shape) != want.shape or got.dtype != want.dtype:
            raise ValueError(
                f"{name!r} of {fmt} is {got.dtype}{tuple(got.shape)}, but a weight {tuple(shape)} "
                f"needs {want.dtype}{want.shape}. Check the weight's shape and the format's "
                "options, or download the file again."
            )


def _check_finite(name: str, array: Array, fix: str) -> None:
    """Refuses NaN and infinity, unless the values are not known yet, as under `jit`."""
    if isinstance(array, jax.ShapeDtypeStruct):
        return
    bad = np.sum(~np.isfinite(array)) if isinstance(array, np.ndarray) else _bad(array)
    if not isinstance(bad, jax.core.Tracer) and bad:
        raise ValueError(f"{name!r} has {bad} of {array.size} entries that are not finite. {fix}")


@jax.jit
def _bad(array: Array) -> Array:
    return jnp.sum(~jnp.isfinite(array))


def check_rounding(fmt: Format, key: Array | None) -> None:
    """Refuses a key for a format that has no stochastic rounding."""
    if key is not None:
        raise ValueError(f"{fmt} has no stochastic rounding. Leave out key, or use int8 or int4.")


def split(shape: Shape, block: int, *, choices: tuple[int, ...] = ()) -> tuple[Shape, int, int]:
    """(stack, in, out) of a weight's shape, after checking that blocks tile its input axis.

    Args:
        shape: of the weight.
        block: size of the blocks.
        choices: other sizes that the format could have, for the error.

    Raises:
        ValueError: fewer than two axes, or `block` does not divide the input axis.
    """
    if len(shape) < 2:
        raise ValueError(
            f"a weight {tuple(shape)} has no input and output axis. Leave it dense, or reshape it "
            "to (*stack, in, out)."
        )
    *stack, rows, columns = shape
    if not rows or rows % block:
        fitting = [choice for choice in choices if rows and rows % choice == 0]
        use = f"Use block={max(fitting)}" if fitting else "Leave this weight dense"
        raise ValueError(
            f"blocks of {block} do not tile the input axis of a weight {tuple(shape)} "
            f"(*stack, in, out). {use}, or transpose it if its input axis is another one."
        )
    return tuple(stack), rows, columns


def spec(shape: Shape, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.dtype(dtype))
