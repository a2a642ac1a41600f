r"""Bytes with a dynamic exponent: 256 values over seven decades, for scales and optimizer states.

    x = table[code] * absmax

A value has a sign, a run of zeros that gives a power of ten, and the rest of the byte as a linear
fraction between 0.1 and 1. The unsigned table gives the sign's bit to the fraction.

Reference:
    Dettmers et al. 2021, arXiv:2110.02861, section 2; Dettmers 2015, arXiv:1511.04561.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpeft.quant.formats.blocks import SMALLEST, midpoints, rounded

Array = jax.Array
BLOCK = 256


@functools.cache
def dynamic_table(signed: bool = True) -> np.ndarray:
    """The 256 values in ascending order, 0 and 1 among them, in float32 as bitsandbytes has them.

    Example:
        >>> table = dynamic_table(signed=False)
        >>> len(table), float(table[0]), float(table[-1])
        (256, 0.0, 1.0)
    """
    f32 = np.float32
    means = []
    for exponent in range(-6, 1):
        count = 2 ** (exponent + 6 + (not signed))
        edges = _linspace(count + 1)
        means.append(f32(10.0**exponent) * ((edges[:-1] + edges[1:]) / f32(2)))
    positive = np.concatenate(means)
    negative = [-positive] if signed else []
    return np.sort(np.concatenate([*negative, positive, [f32(0), f32(1)]])).astype(f32)


def _linspace(count: int) -> np.ndarray:
    """From 0.1 to 1 as torch has it: a float32 step, from the start up and from the end down."""
    start, index = np.float64(np.float32(0.1)), np.arange(count)
    step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(count - 1))
    lower, upper = start + step * index, 1 - step * (count - 1 - index)
    return np.where(index < count // 2, lower, upper).astype(np.float32)


def encode_dynamic(x: Array, *, signed: bool = True) -> tuple[Array, Array]:
    """Codes of the nearest values, and the largest magnitude of each block.

    Args:
        x: float32 `(..., block)`.
        signed: whether `x` can be negative.

    Returns:
        uint8 codes of the shape of `x`, and float32 absmax `(...)`.
    """
    largest = jnp.max(jnp.abs(x), axis=-1)
    return codes_of(x, largest[..., None], signed=signed), largest


def codes_of(x: Array, largest: Array, *, signed: bool = True) -> Array:
    """Codes of the values nearest to `x / largest`, ties downwards; `largest` broadcasts."""
    scaled = jnp.clip(x * (1 / jnp.maximum(largest, SMALLEST)), -1, 1)
    bits = lax.bitcast_convert_type(scaled, jnp.uint32)
    magnitude, negative = jnp.maximum(bits & _MAGNITUDE, _FIRST << _SHIFT), bits >> 31
    bucket = jnp.minimum(magnitude >> _SHIFT, _LAST) - _FIRST
    table = jnp.asarray(_buckets(signed))
    entry = table.at[negative * (len(table) // 2) + bucket].get(mode="promise_in_bounds")
    beyond = magnitude - ((bucket + _FIRST) << _SHIFT) > (entry >> 8)
    return jnp.where(beyond, (entry & 255) + 1 - 2 * negative, entry & 255).astype(jnp.uint8)


# Buckets of numbers of one sign that share their exponent and leading seven bits, from one that is
# nearest to 0 to 1. At most one number that is halfway between two values lies in each.
_MAGNITUDE, _SHIFT = 2**31 - 1, 16
_FIRST, _LAST = (int(np.float32(2.0**e).view(np.uint32)) >> _SHIFT for e in (-23, 0))


@functools.cache
def _buckets(signed: bool) -> np.ndarray:
    """uint32 for each bucket of positive numbers and of negative ones: `code + 256 * limit`.

    The code is that of the bucket's smallest magnitude. Magnitudes whose bits are more than `limit`
    above that have the next one, away from 0.
    """
    bounds = midpoints(dynamic_table(signed))
    starts = np.arange(_FIRST, _LAST + 2, dtype=np.uint32) << _SHIFT
    entries = []
    for sign in (np.float32(1), np.float32(-1)):
        code, after = (
            np.searchsorted(bounds, sign * (starts - i).view(np.float32)) for i in (0, 1)
        )
        code, last, starts_ = code[:-1], after[1:], starts[:-1]
        met = bounds[np.minimum(np.minimum(code, last), len(bounds) - 1)]
        # A number that is halfway has the lower code, which lies away from 0 for a negative one.
        limit = np.abs(met).view(np.uint32) - starts_ - (sign < 0)
        entries.append(code + 256 * np.where(code == last, 2**_SHIFT, limit))
    return np.concatenate(entries).astype(np.uint32)


def decode_dynamic(codes: Array, scale: Array, *, signed: bool = True) -> Array:
    """`table[codes] * scale`, float32; `scale` broadcasts against `codes`."""
    table = jnp.asarray(dynamic_table(signed))
    return rounded(table.at[codes.astype(jnp.int32)].get(mode="promise_in_bounds") * scale)
