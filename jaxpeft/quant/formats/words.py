"""Eight 4-bit codes in an int32, as GPTQ, AWQ and compressed-tensors files have them (numpy)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)


def unpack_words(words: np.ndarray, axis: int, order: Sequence[int] = IN_ORDER) -> np.ndarray:
    """Codes 0..15 along `axis`: the i-th nibble, from the lowest, is code `order[i]` of its word.

    Args:
        words: int32, `(..., n, ...)`.
        axis: that grows to `8 n`.
        order: of the codes of a word.

    Returns:
        uint8.

    Example:
        >>> unpack_words(np.array([[0x76543210]], np.int32), axis=0)[:, 0].tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    last = np.moveaxis(np.asarray(words), axis, -1).astype(np.int32).view(np.uint32)
    codes = np.empty((*last.shape, 8), np.uint8)
    for nibble, place in enumerate(order):
        codes[..., place] = (last >> np.uint32(4 * nibble)) & np.uint32(15)
    return np.moveaxis(codes.reshape(*last.shape[:-1], -1), -1, axis)


def pack_words(codes: np.ndarray, axis: int, order: Sequence[int] = IN_ORDER) -> np.ndarray:
    """The inverse of `unpack_words`.

    Raises:
        ValueError: the axis is no multiple of 8.
    """
    last = np.moveaxis(np.asarray(codes), axis, -1)
    if last.shape[-1] % 8:
        raise ValueError(
            f"an axis of {last.shape[-1]} codes does not fill words of 8. This file format cannot "
            "hold the weight: save it dense."
        )
    eights = last.reshape(*last.shape[:-1], -1, 8).astype(np.uint32)
    words = np.zeros(eights.shape[:-1], np.uint32)
    for nibble, place in enumerate(order):
        words |= eights[..., place] << np.uint32(4 * nibble)
    return np.ascontiguousarray(np.moveaxis(words.view(np.int32), -1, axis))


def named(arrays: Mapping[str, Any], *names: str) -> list[np.ndarray]:
    """Arrays by name, with an error that says what is missing."""
    if missing := [name for name in names if name not in arrays]:
        raise ValueError(
            f"{missing} missing among {sorted(arrays)}. Give all of one layer's tensors."
        )
    return [np.asarray(arrays[name]) for name in names]


def words_of(array: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """An int32 array of the shape that the others ask for."""
    if array.dtype != np.int32 or array.shape != shape:
        raise ValueError(
            f"{name!r} is {array.dtype}{array.shape}, but the weight needs int32{shape} with 4-bit "
            "codes. Check bits and group size in the configuration, or download the file again."
        )
    return array
