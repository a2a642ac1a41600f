"""Stacks of GGUF weights whose layers have several kinds of blocks, as those of Q4_K_M files do.

A stack has one layout, so each layer keeps its bytes in room for the largest kind, and its kind.
The fields of the blocks of a group of inputs lie one behind the other, each with its bytes along
the inputs. Unpacking reads the bytes as each of the kinds and selects.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpeft.quant.formats import blocks
from jaxpeft.quant.formats.base import Format, Layout, Packed, Quantized, Shape, check, spec, split
from jaxpeft.quant.formats.ggml import FIELDS, GGUF

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class MixedGGUF(Format):
    """Several kinds of GGUF blocks, one kind for each layer of a stack."""

    kinds: tuple[str, ...]

    name = "gguf_mixed"

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds))
        if len(set(self.kinds)) < 2 or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"gguf_mixed needs two kinds of blocks or more, not {self.kinds}.")
        for kind in self.kinds:
            GGUF(kind)

    @property
    def block(self) -> int:
        """Inputs of a group, which is of whole blocks of each kind."""
        return max(GGUF(kind).block for kind in self.kinds)

    def layout(self, shape: Shape) -> Layout:
        stack, rows, columns = split(shape, self.block)
        room = max(self._ends(kind)[-1] for kind in self.kinds)
        return {
            "bytes": spec((*stack, rows // self.block * room, columns), np.uint8),
            "kind": spec((*stack, 1, 1), np.uint8),
        }

    def encode(self, weight: Array, key: Array | None) -> Packed:
        raise ValueError(
            f"{self} is what a file's layers have, and only read. Quantize to one format, such as "
            "jp.quant.gguf('q8_0')."
        )

    def decode(self, packed: Mapping[str, Array]) -> Array:
        values = (GGUF(kind).decode(self.fields(packed["bytes"], kind)) for kind in self.kinds)
        return functools.reduce(
            lambda found, nth: jnp.where(packed["kind"] == nth[0], nth[1], found),
            enumerate(values),
            jnp.float32(jnp.nan),
        )

    def fields(self, raw: Array, kind: str) -> dict[str, Array]:
        """The bytes `(*stack, bytes, out)` as arrays of this kind of blocks."""
        count = self.block // GGUF(kind).block
        groups = blocks.blocked(raw, self.layout((self.block, 1))["bytes"].shape[0])
        found, start = {}, 0
        for field, end in zip(FIELDS[kind], self._ends(kind), strict=True):
            part = groups[..., start:end, :]
            size = field.dtype.itemsize
            split_ = part.reshape(*part.shape[:-2], count * field.length, size, part.shape[-1])
            cast = jnp.moveaxis(split_, -2, -1) if size > 1 else split_[..., 0, :]
            found[field.name] = blocks.unblocked(lax.bitcast_convert_type(cast, field.dtype))
            start = end
        return found

    def _ends(self, kind: str) -> list[int]:
        """Where the bytes of each field of a group end."""
        count = self.block // GGUF(kind).block
        return np.cumsum([count * f.length * f.dtype.itemsize for f in FIELDS[kind]]).tolist()


def mix(weight: Quantized, kinds: Sequence[str]) -> Quantized:
    """A matrix in GGUF blocks as a layer of a stack of these kinds.

    Args:
        weight: of the kernel (in, out), numpy arrays; its kind is one of the kinds.
        kinds: of the stack's layers.

    Returns:
        The same weight in `MixedGGUF(kinds)`.

    Raises:
        ValueError: its inputs are no multiple of 256, which blocks of different sizes need.

    Example:
        >>> from jaxpeft.quant.formats.ggml import from_gguf
        >>> layer = mix(from_gguf(np.zeros((3, 36), np.uint8), "Q4_0"), ("q4_0", "q8_0"))
        >>> layer.format, layer.packed["bytes"].shape
        (MixedGGUF(kinds=('q4_0', 'q8_0')), (68, 3))
    """
    packed, fmt, (rows, out) = weight
    assert isinstance(fmt, GGUF)
    mixed = MixedGGUF(tuple(kinds))
    room = mixed.layout((rows, out))["bytes"].shape[0]
    raw = np.zeros((out, rows // mixed.block, room // (rows // mixed.block)), np.uint8)
    start = 0
    for field, end in zip(FIELDS[fmt.kind], mixed._ends(fmt.kind), strict=True):
        by_row = np.ascontiguousarray(np.swapaxes(np.asarray(packed[field.name]), 0, 1))
        raw[..., start:end] = by_row.view(np.uint8).reshape(*raw.shape[:2], end - start)
        start = end
    kind = np.full((1, 1), mixed.kinds.index(fmt.kind), np.uint8)
    return Quantized({"bytes": raw.reshape(out, room).T, "kind": kind}, mixed, (rows, out))


def unmix(weight: Quantized) -> Quantized:
    """The inverse of `mix`: a layer in the kind of blocks that it has.

    Raises:
        ValueError: arrays that do not fit the format, or a kind that it does not have.
    """
    packed, mixed, shape = weight
    assert isinstance(mixed, MixedGGUF)
    check(packed, mixed, shape)
    number = int(np.asarray(packed["kind"]).item())
    if number >= len(mixed.kinds):
        raise ValueError(f"'kind' is {number}, but {mixed} has {len(mixed.kinds)}.")
    kind = mixed.kinds[number]
    fields = mixed.fields(jnp.asarray(packed["bytes"]), kind)
    return Quantized({k: np.asarray(v) for k, v in fields.items()}, GGUF(kind), shape)
