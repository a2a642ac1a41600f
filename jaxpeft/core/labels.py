"""Bookkeeping of weight axes: how views of a weight act on the labels that its axes are made of.

An axis of a weight is a product of *labels* (major first), so that a reshape is a regrouping and a
transpose a permutation, with no data moved. A structured weight keeps its factors by label; what a
view does to the factors is given as `Edit`s. Site discovery runs the same rules on shapes alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Split(NamedTuple):
    """`label` becomes the product of new labels, given with their sizes, major first."""

    label: int
    parts: tuple[tuple[int, int], ...]


class Cut(NamedTuple):
    """`label` keeps `size` entries from `start` (an int or a traced scalar) on, every `stride`."""

    label: int
    start: Any
    size: int
    stride: int = 1


class Drop(NamedTuple):
    """`label`, of size 1, goes away."""

    label: int


Edit = Split | Cut | Drop


def no_array(array: Any) -> Any:
    raise TypeError(f"this view is of labels alone and cannot be taken of {type(array).__name__}")


class View(NamedTuple):
    """One shape-only operation on a weight.

    `kind` and `args` say what it does to labels; `bind(array)` runs the program's own operation on
    an array that stands in for the weight, `bind(array, *operands)` with these values.
    """

    kind: str
    args: tuple[Any, ...]
    bind: Callable[..., Any] = no_array

    @property
    def operands(self) -> tuple[Any, ...]:
        """The program's values that it depends on, which `bind` takes after the array."""
        starts = self.args[0] if self.kind == "slice" else ()
        return () if all(isinstance(start, int) for start in starts) else tuple(starts)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The labels of each axis, and the size of every label (hidden ones, like a rank, too).

    >>> layout = Layout.of((6, 4))
    >>> layout.axes, layout.shape
    (((0,), (1,)), (6, 4))
    >>> view, edits = layout.apply(View("reshape", ((2, 3, 4),)))
    >>> view.axes, edits
    (((2,), (3,), (1,)), (Split(label=0, parts=((2, 2), (3, 3))),))
    """

    axes: tuple[tuple[int, ...], ...]
    sizes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, shape: Iterable[int]) -> Layout:
        """One label an axis."""
        shape = tuple(shape)
        return cls(tuple((i,) for i in range(len(shape))), tuple(enumerate(shape)))

    @property
    def shape(self) -> tuple[int, ...]:
        size = self.size
        return tuple(math.prod(size[label] for label in axis) for axis in self.axes)

    @property
    def size(self) -> dict[int, int]:
        return dict(self.sizes)

    def fresh(self, *sizes: int) -> tuple[Layout, tuple[int, ...]]:
        """The layout with new labels of these sizes known (on no axis yet), and the labels."""
        first = 1 + max((label for label, _ in self.sizes), default=-1)
        labels = tuple(range(first, first + len(sizes)))
        added = tuple(zip(labels, sizes, strict=True))
        return dataclasses.replace(self, sizes=self.sizes + added), labels

    def with_axes(self, axes: Iterable[Iterable[int]]) -> Layout:
        return dataclasses.replace(self, axes=tuple(tuple(axis) for axis in axes))

    def resized(self, label: int, size: int) -> Layout:
        sizes = tuple((name, size if name == label else old) for name, old in self.sizes)
        return dataclasses.replace(self, sizes=sizes)

    def apply(self, view: View) -> tuple[Layout, tuple[Edit, ...]] | None:
        """The layout after `view` and what happens to the labels; None if labels cannot say it."""
        rule = _RULES.get(view.kind)
        return rule(self, *view.args) if rule else None


Step = tuple[Layout, tuple[Edit, ...]] | None


def _keep(layout: Layout, *_: Any) -> Step:
    return layout, ()


def _transpose(layout: Layout, permutation: tuple[int, ...]) -> Step:
    return layout.with_axes(layout.axes[axis] for axis in permutation), ()


def _squeeze(layout: Layout, dimensions: tuple[int, ...]) -> Step:
    gone = [label for axis in dimensions for label in layout.axes[axis]]
    kept = (axis for i, axis in enumerate(layout.axes) if i not in dimensions)
    return layout.with_axes(kept), tuple(Drop(label) for label in gone)


def _reshape(layout: Layout, shape: tuple[int, ...]) -> Step:
    edits: list[Edit] = []
    pending = [label for axis in layout.axes for label in axis]
    axes: list[tuple[int, ...]] = []
    for wanted in shape:
        group: list[int] = []
        need = wanted
        while need > 1 or (pending and layout.size[pending[0]] == 1):
            if not pending:
                return None
            label = pending.pop(0)
            size = layout.size[label]
            if need % size:
                if size % need:
                    return None
                layout, parts = layout.fresh(need, size // need)
                edits.append(Split(label, tuple((part, layout.size[part]) for part in parts)))
                pending.insert(0, parts[1])
                label, size = parts[0], need
            group.append(label)
            need //= size
        axes.append(tuple(group))
    if pending and not axes:
        return layout.with_axes(()), (*edits, *(Drop(label) for label in pending))
    if pending:
        return None
    return layout.with_axes(axes), tuple(edits)


def _broadcast(layout: Layout, shape: tuple[int, ...], dimensions: tuple[int, ...]) -> Step:
    old_shape, edits = layout.shape, []
    source = {out: axis for axis, out in enumerate(dimensions)}
    axes: list[tuple[int, ...]] = []
    old_axes = layout.axes
    for out, size in enumerate(shape):
        if out in source and old_shape[source[out]] == size:
            axes.append(old_axes[source[out]])
            continue
        edits += [Drop(label) for label in (old_axes[source[out]] if out in source else ())]
        layout, labels = layout.fresh(*([size] if size > 1 else []))
        axes.append(labels)
    return layout.with_axes(axes), tuple(edits)


def _slice(
    layout: Layout, starts: tuple[Any, ...], sizes: tuple[int, ...], strides: tuple[int, ...]
) -> Step:
    edits: list[Edit] = []
    for axis, (start, size, stride) in enumerate(zip(starts, sizes, strides, strict=True)):
        if layout.shape[axis] == size:
            continue
        cut = _cut_axis(layout, axis, start, size, stride)
        if cut is None:
            return None
        edits.append(cut)
        layout = layout.resized(cut.label, cut.size)
    return layout, tuple(edits)


def _cut_axis(layout: Layout, axis: int, start: Any, size: int, stride: int) -> Cut | None:
    """The cut of one axis, on its major label if whole blocks of the minor ones are taken."""
    major, *minor = layout.axes[axis]
    block = math.prod(layout.size[label] for label in minor)
    if block == 1:
        return Cut(major, start, size, stride)
    if stride != 1 or size % block or not isinstance(start, int) or start % block:
        return None
    return Cut(major, start // block, size // block)


_RULES: dict[str, Callable[..., Step]] = {
    "keep": _keep,
    "convert": _keep,
    "scale": _keep,
    "place": _keep,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "reshape": _reshape,
    "broadcast": _broadcast,
    "slice": _slice,
}
