"""What weights are in host memory: `Plain`, not packed at all, and `Worded`, bytes as words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxpeft.quant.formats.base import Format, Layout, Packed, Shape, spec, split

Array = jax.Array
BYTES = 4


@dataclasses.dataclass(frozen=True)
class Plain(Format):
    """The values as they are, in `dtype`.

    Example:
        >>> Plain("bfloat16").layout((2, 8, 4))["values"].shape
        (2, 8, 4)
    """

    dtype: str = "float32"

    name: ClassVar[str] = "plain"

    def layout(self, shape: Shape) -> Layout:
        split(shape, 1)
        return {"values": spec(shape, jnp.dtype(self.dtype))}

    def encode(self, weight: Array, key: Array | None) -> Packed:
        del key
        return {"values": weight.astype(self.dtype)}

    def decode(self, packed: Mapping[str, Array]) -> Array:
        return packed["values"]


@dataclasses.dataclass(frozen=True)
class Worded(Format):
    """A format whose arrays of bytes are arrays of words, of four rows or four columns each.

    A TPU lays out a stack of byte matrices otherwise than one of them, and to take one from the
    host it would move all. Words it lays out alike.

    Example:
        >>> from jaxpeft.quant.formats import nf4
        >>> Worded(nf4()).layout((64, 8))["codes.uint8.rows"]
        ShapeDtypeStruct(shape=(8, 8), dtype=uint32)
    """

    inner: Format

    name: ClassVar[str] = "worded"

    def layout(self, shape: Shape) -> Layout:
        return jax.eval_shape(to_words, self.inner.layout(shape))

    def encode(self, weight: Array, key: Array | None) -> Packed:
        return to_words(self.inner.encode(weight, key))

    def decode(self, packed: Mapping[str, Array]) -> Array:
        return self.inner.decode(from_words(packed))


def on_device(fmt: Format) -> Format | None:
    """The format that a weight has on the device, and None where it is dense there.

    Example:
        >>> from jaxpeft.quant.formats import nf4
        >>> on_device(Worded(nf4())), on_device(Plain())
        (NF4(block=64, double=True), None)
    """
    if isinstance(fmt, Plain):
        return None
    return fmt.inner if isinstance(fmt, Worded) else fmt


def to_words(packed: Mapping[str, Any]) -> Packed:
    """Arrays of bytes as uint32, named `name.dtype.axis`; others, and too short ones, as they are.

    Example:
        >>> list(to_words({"codes": jnp.ones((8, 3), jnp.int8), "scale": jnp.ones((1, 3))}))
        ['codes.int8.rows', 'scale']
    """
    return dict(_to_words(name, array) for name, array in packed.items())


def from_words(packed: Mapping[str, Any]) -> Packed:
    """The inverse of `to_words`."""
    return dict(_from_words(name, array) for name, array in packed.items())


def _to_words(name: str, x: Array) -> tuple[str, Array]:
    *lead, rows, columns = x.shape
    if x.dtype.itemsize > 1 or (rows % BYTES and columns % BYTES):
        return name, x
    if rows % BYTES:
        parts, axis = x.reshape(*lead, rows, columns // BYTES, BYTES), "columns"
    else:
        parts = jnp.swapaxes(x.reshape(*lead, rows // BYTES, BYTES, columns), -1, -2)
        axis = "rows"
    return f"{name}.{x.dtype}.{axis}", lax.bitcast_convert_type(parts, jnp.uint32)


def _from_words(name: str, x: Array) -> tuple[str, Array]:
    if "." not in name:
        return name, x
    name, dtype, axis = name.split(".")
    parts = lax.bitcast_convert_type(x, jnp.dtype(dtype))
    *lead, rows, columns, _ = parts.shape
    if axis == "columns":
        return name, parts.reshape(*lead, rows, columns * BYTES)
    return name, jnp.swapaxes(parts, -1, -2).reshape(*lead, rows * BYTES, columns)
