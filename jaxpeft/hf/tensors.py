"""The tensors of an adapter file: their names, their shapes, and a reader that misses none."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxpeft.hf.config import CONFIG
from jaxpeft.hf.files import read_tensors, some
from jaxpeft.hf.table import Row

PREFIX = "base_model.model."


class Reader:
    """The tensors of a file, each to be taken once; what goes wrong is told at the end."""

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file() and path.with_suffix(".bin").is_file():
            raise ValueError(
                f"{path.parent} holds adapter_model.bin, a pickle, which can run code when it is "
                "read. Convert it with PEFT: `PeftModel.from_pretrained(...).save_pretrained(...)`."
            )
        self.tensors, _ = read_tensors(path)
        self.taken: set[str] = set()
        self.problems: list[str] = []

    def __contains__(self, key: str) -> bool:
        return PREFIX + key in self.tensors

    def take(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor in float32; zeros after a problem, which `check` raises."""
        name = PREFIX + key
        self.taken.add(name)
        found = self.tensors.get(name)
        if found is None:
            self.problems.append(f"{name} of shape {shape} is missing")
        elif found.shape != shape:
            self.problems.append(f"{name} has shape {found.shape}, expected {shape}")
        elif found.dtype.kind not in "fV":
            self.problems.append(f"{name} is {found.dtype}, expected floating point")
        else:
            return found.astype(np.float32)
        return np.zeros(shape, np.float32)

    def check(self) -> None:
        extra = self.tensors.keys() - self.taken
        problems = [*self.problems, *(f"{name} is not expected" for name in sorted(extra))]
        if problems:
            raise ValueError(
                f"{self.path} does not fit the model and {CONFIG}: {len(problems)} problems: "
                f"{some(problems, 12)}. It holds {len(self.tensors)} tensors. Is it an adapter of "
                "this model?"
            )


def low_rank_keys(row: Row, module: str) -> tuple[str, str]:
    """PEFT's names of the two factors."""
    if row.site.table:
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def torch_axes(row: Row) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The order of a parameter's axes in torch, the stack first, and the shape of one tensor.

    Linear maps are (out, in) in torch, embeddings (in, out); anything else has one axis.
    """
    site = row.site
    if row.axes is not None:
        return _known_axes(row, row.axes)
    stack = site.axes("stack") if row.stacked else ()
    if not site.linear:
        rest = tuple(axis for axis in range(len(site.shape)) if axis not in stack)
        return (*stack, *rest), (int(np.prod([site.shape[axis] for axis in rest])),)
    groups = [site.axes("out", ""), site.axes("in")]
    groups = groups[::-1] if site.table else groups
    sizes = tuple(int(np.prod([site.shape[axis] for axis in group])) for group in groups)
    return (*stack, *groups[0], *groups[1]), sizes


def _known_axes(row: Row, axes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape, first = row.site.shape, int(row.stacked)
    order = np.argsort(axes) if axes else range(len(shape) - first)
    ordered = tuple(first + int(axis) for axis in order)
    return (*range(first), *ordered), tuple(shape[axis] for axis in ordered)
