"""What arrays a compiled program makes, read from its optimized HLO text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

_INSTRUCTION = re.compile(r"= (\w+)\[([\d,]*)\](?:\{[^}]*\})? ([\w\-]+)\(")

# These hand an array on, or are roots of fusions, whose own instructions are in the text as well.
MOVES = frozenset(
    "parameter get-tuple-element bitcast copy convert transpose reshape slice dynamic-slice fusion "
    "constant call".split()
)


def made(text: str, sizes: Iterable[int]) -> set[str]:
    """`opcode dtype[shape]` of the instructions that compute an array with this many elements.

    Element counts are compared, not shapes, so that a transposed or flattened one is found too.
    """
    wanted = set(sizes)
    return {
        f"{opcode} {dtype}[{dims}]"
        for dtype, dims, opcode in _INSTRUCTION.findall(text)
        if opcode not in MOVES and math.prod(int(n) for n in dims.split(",") if n) in wanted
    }
