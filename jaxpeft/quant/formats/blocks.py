"""Blocks along the input axis, codes packed into bytes, and arithmetic that rounds as written."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

# A scale of zero becomes this before a division: normal, because XLA flushes smaller ones to zero.
SMALLEST = float(np.finfo(np.float32).tiny)


def blocked(x: Array, block: int) -> Array:
    """(..., in, out) -> (..., in / block, block, out)."""
    return x.reshape(*x.shape[:-2], x.shape[-2] // block, block, x.shape[-1])


def unblocked(x: Array) -> Array:
    """(..., in / block, block, out) -> (..., in, out)."""
    return x.reshape(*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1])


def scaled(x: Array, scale: Array) -> Array:
    """`x * scale` with the rows of `scale` (..., in / block, out) along blocks of `x`."""
    return unblocked(blocked(x, x.shape[-2] // scale.shape[-2]) * scale[..., :, None, :])


def absmax(x: Array, block: int) -> Array:
    """Largest magnitude of each block: (..., in, out) -> (..., in / block, out)."""
    return jnp.max(jnp.abs(blocked(x, block)), axis=-2)


def pack_nibbles(codes: Any) -> Any:
    """Two codes a byte: row `2i` in the low half, row `2i + 1` in the high half.

    Args:
        codes: uint8 `(..., in, out)`, values 0..15; a JAX or a numpy array.

    Returns:
        uint8 `(..., in / 2, out)`.
    """
    return codes[..., 0::2, :] | (codes[..., 1::2, :] << 4)


def unpack_nibbles(packed: Array) -> Array:
    """The inverse of `pack_nibbles`.

    XLA takes a concatenation into what uses it on a CPU alone; on a GPU it keeps from vectors.
    """
    fields = functools.partial(bit_fields, group=1, shifts=(0, 4), mask=15)
    return lax.platform_dependent(packed, cpu=_halves, default=fields)


def _halves(packed: Array) -> Array:
    pairs = jnp.stack([packed & 15, packed >> 4], axis=-2)
    return pairs.reshape(*packed.shape[:-2], 2 * packed.shape[-2], packed.shape[-1])


def bit_fields(x: Array, group: int, shifts: Sequence[int], mask: int) -> Array:
    """Bit fields of bytes (..., k, out): of each `group` of bytes, one field of all, then the next.

    Returns:
        uint8 (..., k * len(shifts), out).
    """
    grouped = x.reshape(*x.shape[:-2], x.shape[-2] // group, 1, group, x.shape[-1])
    shift = jnp.asarray(shifts, jnp.uint8)[:, None, None]
    return ((grouped >> shift) & mask).reshape(*x.shape[:-2], -1, x.shape[-1])


def lookup(table: Sequence[float], codes: Array) -> Array:
    """`table[codes]` in float32 for a table of 2^k values; no code is out of its range.

    A gather of single elements is slow on a TPU, and does not vectorize on a CPU. On a GPU it is
    one load, of neighbouring words that stay in the nearest cache, where selections take twenty
    instructions.
    """
    select = functools.partial(selected, table)
    return lax.platform_dependent(codes, cuda=functools.partial(_gathered, table), default=select)


def _gathered(table: Sequence[float], codes: Array) -> Array:
    # Bounds are known from the bits that are left, and cost nothing.
    index = (codes & (len(table) - 1)).astype(jnp.uint32)
    return jnp.asarray(table, jnp.float32).at[index].get(mode="promise_in_bounds")


def selected(table: Sequence[float], codes: Array) -> Array:
    """The same as a tree of selections.

    The values are spread over an array made of the codes: JAX lifts what depends on no data out
    of a scan, and would keep an array of the shape of the codes for each value.
    """
    zeros = (codes & 0).astype(jnp.uint32)
    values: list[Any] = [zeros | bits for bits in np.asarray(table, np.float32).view(np.uint32)]
    for bit in range(len(values).bit_length() - 1):
        odd = (codes >> bit) & 1 != 0
        values = [jnp.where(odd, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
    return lax.bitcast_convert_type(values[0], jnp.float32)


def nearest(x: Array, table: np.ndarray) -> Array:
    """Index of the value of an ascending float32 `table` that is nearest to `x`, ties downwards."""
    bounds = midpoints(table)
    return functools.reduce(lambda n, bound: n + (x > bound), bounds, jnp.zeros(x.shape, jnp.uint8))


def midpoints(table: np.ndarray) -> np.ndarray:
    """Halfway between neighbours, rounded to float32."""
    return ((table[:-1] + table[1:]) / np.float32(2)).astype(np.float32)


def rounded(x: Array) -> Array:
    """`x` itself, but an addition after it does not fuse with the product that made it.

    `a * b + c` compiles to one instruction that rounds once; the formats are defined with two
    roundings. A selection in between keeps them apart, on every backend.
    """
    return jnp.where(jnp.isnan(x), jnp.nan, x)


def divided(x: Array, by: Array | float) -> Array:
    """`x / by`, rounded once; `by` broadcasts against `x`.

    XLA turns a division by a constant or a scalar into a product with its inverse, which rounds
    twice. It cannot where the divisor depends on `x`.
    """
    return x / jnp.where(jnp.isnan(x), jnp.nan, by)


def nonzero(scale: Array) -> Array:
    """A scale to divide by: 1 where it is 0, as all of its weights are."""
    return jnp.where(scale == 0, 1, scale)


def round_to_int(x: Array, key: Array | None) -> Array:
    """To the nearest integer, ties to even; with a key to a neighbour, right on average."""
    if key is None:
        return jnp.round(x)
    return jnp.floor(x + jax.random.uniform(key, x.shape, jnp.float32))
