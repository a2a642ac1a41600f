"""Codes of 4 or 8 bits in an int32, as GPTQ, AWQ and compressed-tensors files have them (numpy)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def unpack_words(
    words: np.ndarray, axis: int, order: Sequence[int] | None = None, bits: int = 4
) -> np.ndarray:
    """Codes along `axis`: the i-th field of a word, from the lowest, is code `order[i]` of it.

    Args:
        words: int32, `(..., n, ...)`.
        axis: that grows to `32 n / bits`.
        order: of the codes of a word; None for the order of the fields.
        bits: of a code, 4 or 8.

    Returns:
        uint8.

    Example:
        >>> unpack_words(np.array([[0x76543210]], np.int32), axis=0)[:, 0].tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    last = np.moveaxis(np.asarray(words), axis, -1).astype(np.int32).view(np.uint32)
    codes = np.empty((*last.shape, 32 // bits), np.uint8)
    for field, place in enumerate(order or range(32 // bits)):
        codes[..., place] = (last >> np.uint32(bits * field)) & np.uint32(2**bits - 1)
    return np.moveaxis(codes.reshape(*last.shape[:-1], -1), -1, axis)


def pack_words(
    codes: np.ndarray, axis: int, order: Sequence[int] | None = None, bits: int = 4
) -> np.ndarray:
    """The inverse of `unpack_words`.

    Raises:
        ValueError: the axis is no multiple of `32 / bits`.
    """
    last, count = np.moveaxis(np.asarray(codes), axis, -1), 32 // bits
    if last.shape[-1] % count:
        raise ValueError(
            f"an axis of {last.shape[-1]} codes does not fill words of {count}. This file format "
            "cannot hold the weight: save it dense."
        )
    parts = last.reshape(*last.shape[:-1], -1, count).astype(np.uint32)
    words = np.zeros(parts.shape[:-1], np.uint32)
    for field, place in enumerate(order or range(count)):
        words |= parts[..., place] << np.uint32(bits * field)
    return np.ascontiguousarray(np.moveaxis(words.view(np.int32), -1, axis))


def named(arrays: Mapping[str, Any], *names: str) -> list[np.ndarray]:
    """Arrays by name, with an error that says what is missing."""
    if missing := [name for name in names if name not in arrays]:
        raise ValueError(
            f"{missing} missing among {sorted(arrays)}. Give all of one layer's tensors."
        )
    return [np.asarray(arrays[name]) for name in names]


def words_of(array: np.ndarray, name: str, shape: tuple[int, ...], bits: int = 4) -> np.ndarray:
    """An int32 array of the shape that the others ask for."""
    if array.dtype != np.int32 or array.shape != shape:
        raise ValueError(
            f"{name!r} is {array.dtype}{array.shape}, but the weight needs int32{shape} with "
            f"{bits}-bit codes. Check bits and group size in the configuration, or download the "
            "file again."
        )
    return array


def matrix(array: np.ndarray, name: str) -> np.ndarray:
    """An array of two axes."""
    if array.ndim != 2:
        raise ValueError(
            f"{name!r} has shape {array.shape}, but should be a matrix. Give one layer's tensors, "
            "or download the file again."
        )
    return array


def whole_blocks(block: int, rows: int, array: np.ndarray) -> tuple[int, np.ndarray]:
    """Blocks that tile the rows, where a file cuts the last one short: smaller ones, repeated.

    Args:
        block: rows that share a row of `array`.
        rows: of the weight.
        array: `(ceil(rows / block), ...)`, such as scales.

    Returns:
        The largest block that divides `rows` and `block`, and `array` for it.

    Raises:
        ValueError: `array` has another number of rows, or `block` is not positive.

    Example:
        >>> whole_blocks(128, 192, np.array([[1], [2]]))[1][:, 0].tolist()
        [1, 1, 2]
    """
    if block < 1 or len(array) != -(-rows // block):
        raise ValueError(
            f"{len(array)} blocks of {block} are not the blocks of {rows} inputs. Check the group "
            "or block size in the configuration, or download the file again."
        )
    part = math.gcd(block, rows) or block
    return part, array[np.arange(0, rows, part) // block]
