"""The metadata of a GGUF file, walked through once: is all of it there?

The reader of the gguf package believes whatever length a damaged or hostile file gives for a list,
and would go on until the memory is full.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

# Bytes of a value by the number of its type; strings and lists say their length themselves.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _LIST, _DEPTH = 8, 9, 4


def check_header(path: Path) -> None:
    """Checks that the metadata of a GGUF file lies within it.

    Args:
        path: the file.

    Raises:
        ValueError: it ends before its metadata do, or has a type of value that there is not.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(data).metadata()


class _Walk:
    """A place in the bytes, which moves on over what is there."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 4
        # Files of the other byte order have the version in the high half.
        self.order = "<" if self.number("I") & 0xFFFF else ">"

    order = "<"

    def number(self, kind: str) -> int:
        start = self.at
        self.skip(struct.calcsize(kind))
        return struct.unpack_from(self.order + kind, self.data, start)[0]

    def skip(self, size: int) -> None:
        if size > len(self.data) - self.at:
            raise ValueError(f"it says that {size} bytes follow at byte {self.at} of it")
        self.at += size

    def metadata(self) -> None:
        self.skip(8)
        for _ in range(self.number("Q")):
            self.skip(self.number("Q"))
            self.value(self.number("I"), _DEPTH)

    def value(self, kind: int, depth: int) -> None:
        if kind in _SIZES:
            self.skip(_SIZES[kind])
        elif kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _LIST and depth:
            self.items(self.number("I"), self.number("Q"), depth - 1)
        else:
            raise ValueError(f"it has a value of type {kind} at byte {self.at} of it")

    def items(self, kind: int, count: int, depth: int) -> None:
        if kind in _SIZES:
            return self.skip(count * _SIZES[kind])
        for _ in range(count):
            self.value(kind, depth)
