"""`QuantizedWeight`: a packed weight that stands in the params tree where the array stood.

A product unpacks the weight next to it, and its backward pass unpacks it again: only packed
arrays are kept in between. A view of the weight moves labels; a scan over layers takes slices of
the packed arrays, so that one layer at a time is dense.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from jaxpeft.core.labels import Cut, Drop, Edit, Layout, Split, View
from jaxpeft.core.memory import on_host, to_device
from jaxpeft.core.scaled import scaled
from jaxpeft.core.sharding import automatic, fitting, placed_as, spread
from jaxpeft.core.structured import Contraction, Structured, node, static
from jaxpeft.quant.formats import Format, check
from jaxpeft.quant.formats.base import decoded

Array = jax.Array
Labels = tuple[int, ...]


@node
@dataclasses.dataclass(frozen=True, eq=False)
class Taken:
    """A view that labels cannot say, to be taken of the dense array; `operands` are its starts."""

    operands: tuple[Any, ...]
    bind: Callable[..., Any] = static()

    def __call__(self, array: Array) -> Array:
        return self.bind(array, *self.operands)


@node
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedWeight(Structured):
    """A weight as packed arrays of `(stack..., in, out)`.

    `groups` are the labels of the weight's axes in that order: each stack label has an axis of its
    own, the labels of `in` and of `out` share one each. `tail` are views that labels cannot say,
    taken of the dense array. `compute` says how products are done: see `jaxpeft.quant.product`.
    `looped` says that the weight is a slice that a loop has taken.
    """

    packed: Mapping[str, Array]
    format: Format = static()
    groups: tuple[Labels, Labels, Labels] = static()
    layout: Layout = static()
    dtype: Any = static()
    tail: tuple[Taken, ...] = ()
    compute: str = static(default="auto")
    name: str = static(default="")
    looped: bool = static(default=False)

    def __repr__(self) -> str:
        axes = ",".join(map(str, self.shape))
        return f"QuantizedWeight({self.dtype}[{axes}], {self.format})"

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        dense = jax.ShapeDtypeStruct(self.layout.shape, self.dtype)
        return tuple(jax.eval_shape(functools.partial(_viewed, self.tail), dense).shape)

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """The canonical shape `(stack..., in, out)`."""
        size, (stack, ins, outs) = self.layout.size, self.groups
        sizes = (math.prod(size[label] for label in group) for group in (ins, outs))
        return (*(size[label] for label in stack), *sizes)

    @property
    def axes(self) -> tuple[Labels, Labels, Labels]:
        """The axes of the weight, as it stands in a params tree, that are stack, input, output."""
        at = {label: i for i, axis in enumerate(self.layout.axes) for label in axis}
        stack, ins, outs = (tuple(at[label] for label in group) for group in self.groups)
        return stack, ins, outs

    @property
    def nbytes(self) -> int:
        """Bytes of the packed arrays."""
        return sum(array.size * array.dtype.itemsize for array in self.packed.values())

    @property
    def stackable(self) -> bool:
        return not self.tail

    @property
    def sharding(self) -> NamedSharding | None:
        """Of the dense weight, where that of the packed arrays is known."""
        return None if self.tail else self._sharding(self.packed)

    def materialize(self, dtype: DTypeLike | None = None) -> Array:
        self._check_arrays()
        packed = to_device(dict(self.packed))
        dense = functools.partial(self._dense, jnp.dtype(dtype or self.dtype))
        return _viewed(self.tail, automatic(dense, self._sharding(packed), packed))

    def _check_arrays(self) -> None:
        """Refuses arrays that a cast of the whole tree, or a transform around it, has reached."""
        for name, want in self.format.layout(self.packed_shape).items():
            got = self.packed.get(name, want)
            if got.dtype != want.dtype:
                raise TypeError(
                    f"{name!r} of {self} is {got.dtype}, not {want.dtype}: the arrays of a packed "
                    "weight are not to be cast. Cast params before `jp.quantize`, and give it "
                    "`dtype=` for the dtype that weights show to the model."
                )
            if tuple(got.shape) != want.shape:
                raise TypeError(
                    f"{name!r} of {self} is {tuple(got.shape)}, not {want.shape}. A vmap, scan or "
                    "shard_map that takes packed params apart goes inside of the function that "
                    "`jp.lift` or `jp.transform` takes; or pack the parts in the same way: "
                    "`jax.vmap(lambda p: jp.quantize(p, fmt))(params)`."
                )

    def _dense(self, dtype: Any, packed: dict[str, Array]) -> Array:
        matrix = decoded(packed, self.format, dtype)
        labels = [label for group in self.groups for label in group]
        size = self.layout.size
        wanted = [label for axis in self.layout.axes for label in axis]
        array = matrix.reshape([size[label] for label in labels])
        array = array.transpose([labels.index(label) for label in wanted])
        return array.reshape(self.layout.shape)

    def _sharding(self, packed: Mapping[str, Array]) -> NamedSharding | None:
        sharding = spread(max(packed.values(), key=lambda array: array.size), self.packed_shape)
        if sharding is None:
            return None
        size, major = self.layout.size, self._major
        entry: dict[int | None, Any] = dict(zip(major, sharding.spec, strict=False))
        firsts = [axis[0] if axis else None for axis in self.layout.axes]
        sizes = [1 if label is None else size[label] for label in firsts]
        return fitting(sharding.mesh, [entry.get(label) for label in firsts], sizes)

    @property
    def _major(self) -> list[int | None]:
        """The label that is split where an axis of the packed arrays is split."""
        stack, ins, outs = self.groups
        return [*stack, *(group[0] if group else None for group in (ins, outs))]

    def view(self, view: View) -> Structured | None:
        if view.kind == "scale":
            return scaled(self, *view.args)
        if view.kind == "convert":
            return dataclasses.replace(self, dtype=jnp.dtype(view.args[0]))
        placed = self._placed(*view.args) if view.kind == "place" and not self.tail else None
        if placed is not None:
            return placed
        step = None if self.tail or view.kind == "place" else self.layout.apply(view)
        return (step and self._moved(*step)) or self._taken(view)

    def _taken(self, view: View) -> QuantizedWeight:
        return dataclasses.replace(self, tail=(*self.tail, Taken(view.operands, view.bind)))

    def _moved(self, layout: Layout, edits: Sequence[Edit]) -> QuantizedWeight | None:
        """The weight after a view that changes labels; None if the packed arrays cannot say it."""
        found = self
        for edit in edits:
            edited = found._edited(edit)
            if edited is None:
                return None
            found = edited
        known = {label for group in found.groups for label in group}
        shown = {label for axis in layout.axes for label in axis}
        return dataclasses.replace(found, layout=layout) if shown <= known else None

    def _placed(self, sharding: NamedSharding) -> QuantizedWeight | None:
        """The packed arrays moved as the weight is asked to be; None if their axes cannot."""
        axes = self.layout.axes
        entries = (*sharding.spec, *[None] * len(axes))
        asked = {axis[0]: entry for axis, entry in zip(axes, entries, strict=False) if axis}
        if any(entry is not None and label not in self._major for label, entry in asked.items()):
            return None
        spec = [None if label is None else asked.get(label) for label in self._major]
        packed = {
            name: placed_as(array, fitting(sharding.mesh, spec, array.shape))
            for name, array in to_device(dict(self.packed)).items()
        }
        return dataclasses.replace(self, packed=packed)

    def _edited(self, edit: Edit) -> QuantizedWeight | None:
        """The packed arrays and labels after an edit; the layout is set by who calls."""
        if edit.label not in self.groups[0] and isinstance(edit, Cut):
            return self._columns(edit)
        (stack, ins, outs), packed = self.groups, self.packed
        if not isinstance(edit, Cut):
            parts = tuple(label for label, _ in edit.parts) if isinstance(edit, Split) else ()
            stack, ins, outs = (_split(group, edit.label, parts) for group in self.groups)
        if edit.label in self.groups[0]:
            change = functools.partial(_axis_edited, edit, self.groups[0].index(edit.label))
            packed = {name: change(array) for name, array in packed.items()}
        return dataclasses.replace(self, packed=packed, groups=(stack, ins, outs))

    def _columns(self, edit: Cut) -> QuantizedWeight | None:
        """Some of the outputs: the same columns of each packed array that has a column for each."""
        size, arrays = self.packed_shape[-1], self.packed.values()
        if self.groups[2] != (edit.label,) or size == 1:
            return None
        if any(on_host(array) or array.shape[-1] not in (1, size) for array in arrays):
            return None
        packed = {
            name: x if x.shape[-1] == 1 else _axis_edited(edit, x.ndim - 1, x)
            for name, x in self.packed.items()
        }
        return dataclasses.replace(self, packed=packed)

    def contract(self, op: Contraction) -> Array | None:
        from jaxpeft.quant.product import product

        self._check_arrays()
        return product(self, op)

    def unstack(self) -> tuple[Any, Callable[[Any], Structured]] | None:
        (first, *axes), (stack, ins, outs) = self.layout.axes, self.groups
        if self.tail or not first or not set(first) <= set(stack):
            return None
        front = functools.partial(_in_front, [stack.index(label) for label in first])
        packed = {name: front(array) for name, array in self.packed.items()}
        left = tuple(label for label in stack if label not in first)
        layout = self.layout.with_axes(axes)
        groups = (left, ins, outs)
        slice_ = dataclasses.replace(self, groups=groups, layout=layout, looped=True)
        return packed, lambda packed: dataclasses.replace(slice_, packed=packed)

    def restack(self) -> Structured:
        length = next(iter(self.packed.values())).shape[0]
        layout, (label,) = self.layout.fresh(length)
        stack, ins, outs = self.groups
        return dataclasses.replace(
            self,
            groups=((label, *stack), ins, outs),
            layout=layout.with_axes(((label,), *layout.axes)),
            looped=False,
        )


def _viewed(tail: Sequence[Taken], array: Any) -> Any:
    return functools.reduce(lambda array, taken: taken(array), tail, array)


def _split(labels: Labels, label: int, parts: Labels) -> Labels:
    return tuple(p for old in labels for p in (parts if old == label else (old,)))


def _axis_edited(edit: Edit, axis: int, array: Array) -> Array:
    """A packed array after an edit of the label that its axis is."""
    if isinstance(edit, Drop):
        return jnp.squeeze(array, axis)
    if isinstance(edit, Split):
        sizes = (size for _, size in edit.parts)
        return array.reshape(*array.shape[:axis], *sizes, *array.shape[axis + 1 :])
    if isinstance(edit.start, int) or edit.stride != 1:
        stop = edit.start + (edit.size - 1) * edit.stride + 1
        return lax.slice_in_dim(array, edit.start, stop, edit.stride, axis)
    return lax.dynamic_slice_in_dim(array, edit.start, edit.size, axis)


def _in_front(axes: Sequence[int], array: Array) -> Array:
    """A packed array whose stack axes `axes` are one, in front."""
    if list(axes) == [0]:
        return array
    moved = jnp.moveaxis(array, axes, range(len(axes)))
    return moved.reshape(-1, *moved.shape[len(axes) :])


def wrap(
    packed: Mapping[str, Any],
    fmt: Format,
    shape: Sequence[int],
    *,
    axes: tuple[Sequence[int], Sequence[int], Sequence[int]] | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    compute: str = "auto",
) -> QuantizedWeight:
    """A quantized weight from packed arrays.

    Args:
        packed: arrays as `fmt.layout` of `(stack..., in, out)` lists them.
        fmt: their format.
        shape: of the weight in the params tree.
        axes: which of its axes are stack, input and output; the last one is the output, the one
            before the input, when absent.
        dtype: that the weight shows to the model, in which products are computed.
        compute: "auto", "xla", "pallas" or "interpret"; see `jaxpeft.quantize`.

    Returns:
        The weight, to be put in a params tree.

    Raises:
        ValueError: if the arrays do not fit, or a scale is not finite.
    """
    layout = Layout.of(shape)
    n = len(layout.axes)
    stack, ins, outs = axes or (range(n - 2), (n - 2,), (n - 1,))
    groups = (tuple(stack), tuple(ins), tuple(outs))
    weight = QuantizedWeight(dict(packed), fmt, groups, layout, jnp.dtype(dtype), (), compute)
    check(packed, fmt, weight.packed_shape)
    return weight
