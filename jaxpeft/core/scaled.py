"""A weight times numbers along some of its axes, which scale what it meets instead of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxpeft.core.einsum import Einsum
from jaxpeft.core.labels import Layout, View
from jaxpeft.core.sharding import like
from jaxpeft.core.structured import (
    Contraction,
    Structured,
    apply_view,
    contract,
    dense,
    node,
    restack,
    unstack,
)

Array = jax.Array


@node
@dataclasses.dataclass(frozen=True, eq=False)
class Scaled(Structured):
    """`W' = W * l`: `scale` holds vectors over some axes of `W`, an array or a structured weight.

    Where a product keeps the axes of a vector its result is scaled, where it contracts them its
    other operand is: `x (W * l) = (x W) * l`. `W * l` is made by `materialize` alone.

    Example: the second column of a (2, 2) weight, three times as large.

    >>> import jax.numpy as jnp
    >>> Scaled.along(jnp.ones((2, 2)), jnp.array([1.0, 3.0]), (1,)).materialize()[0].tolist()
    [1.0, 3.0]
    """

    weight: Any
    scale: Any

    @classmethod
    def along(cls, weight: Any, values: Array, axes: Sequence[int]) -> Scaled:
        """`weight` times `values`, which have its axes `axes`, in order."""
        layout = Layout.of(weight.shape)
        return cls(weight, Einsum((values,), (tuple(axes),), layout, values.dtype))

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    def materialize(self, dtype: DTypeLike | None = None) -> Array:
        # Multiplied in float32 or wider, and rounded once.
        wide = jnp.promote_types(self.dtype, jnp.float32)
        weight = dense(self.weight, wide)
        return (weight * like(self.scale.materialize(wide), weight)).astype(dtype or self.dtype)

    def view(self, view: View) -> Structured | None:
        scale = self.scale if view.kind == "convert" else self.scale.view(view)
        weight = self.weight if view.kind == "scale" else apply_view(self.weight, view)
        known = weight is not None and isinstance(scale, Einsum)
        return Scaled(weight, scale) if known else None

    def contract(self, op: Contraction) -> Array | None:
        if op.kind == "gather":
            rows, found = self.scale.contract(op), contract(self.weight, op)
            return None if rows is None or found is None else _times(found, rows)
        rule = _RULES.get(op.kind)
        places = rule(op) if rule else None
        return None if places is None else self._scaling(op, places)

    def _scaling(self, op: Contraction, places: Places) -> Array | None:
        """The product of the weight alone, scaled in front of it and behind."""
        first, *rest = op.others
        behind = []
        for axes, vector in _vectors(self.scale):
            if set(axes) <= places.kept.keys():
                behind.append((axes, vector))
            elif set(axes) <= places.met.keys():
                first = _times(first, places.spread(vector, axes, places.met, first.ndim))
            else:
                return None
        y = contract(self.weight, op.on(first, *rest) if first is not op.others[0] else op)
        if y is None:
            return None
        spread = (places.spread(vector, axes, places.kept, y.ndim) for axes, vector in behind)
        return functools.reduce(_times, spread, y)

    def unstack(self) -> tuple[Any, Callable[[Any], Structured]] | None:
        weight, scale = unstack(self.weight), self.scale.unstack()
        if weight is None or scale is None:
            return None
        return (weight[0], scale[0]), lambda parts: Scaled(weight[1](parts[0]), scale[1](parts[1]))

    @property
    def stackable(self) -> bool:
        return not isinstance(self.weight, Structured) or self.weight.stackable

    def restack(self) -> Structured:
        return Scaled(restack(self.weight), self.scale.restack())


def scaled(weight: Structured, values: Array, axes: Sequence[int]) -> Scaled | None:
    """`weight` times a number, or a vector along one of its axes, whose sizes `values` has or 1."""
    values = jnp.asarray(values)
    long = [axis for axis, size in zip(axes, values.shape, strict=True) if size > 1]
    if len(long) > 1:
        return None
    return Scaled.along(weight, values.reshape([weight.shape[axis] for axis in long]), long)


def _times(x: Array, scale: Array) -> Array:
    """In the wider dtype of the two and rounded to that of `x`: scales are close to one."""
    return (x * scale).astype(x.dtype)


def _vectors(scale: Einsum) -> list[tuple[tuple[int, ...], Array]]:
    """The factors, each with the axes of the weight that it lies along and whole over them."""
    factor = scale.scale
    found = []
    for array, owned in zip(scale.factors, scale.owned, strict=True):
        axes = tuple(i for i, axis in enumerate(scale.layout.axes) if set(axis) & set(owned))
        layout = scale.layout.with_axes(scale.layout.axes[i] for i in axes)
        part = Einsum((array,), (owned,), layout, scale.dtype, factor)
        found.append((axes, part.materialize()))
        factor = 1.0
    return found


class Places(NamedTuple):
    """Where a product has the axes of its weight.

    Attributes:
        met: the axis of the other operand that meets each axis of the weight, if one does.
        kept: the axis of the result for each axis of the weight, if it has one.
        experts: of a ragged product the weight's axis of experts, and the expert of each row, which
            stands at axis 0 of both operands.
    """

    met: Mapping[int, int]
    kept: Mapping[int, int]
    experts: tuple[int, Array] | None = None

    def spread(self, v: Array, axes: Sequence[int], to: Mapping[int, int], ndim: int) -> Array:
        """`v` over the weight's `axes`, broadcast against an operand or the result."""
        if self.experts and self.experts[0] in axes:
            v = jnp.take(v, self.experts[1], axis=axes.index(self.experts[0]))
        order = sorted(range(len(axes)), key=lambda i: to[axes[i]])
        shape = [1] * ndim
        for i in order:
            shape[to[axes[i]]] = v.shape[i]
        return v.transpose(order).reshape(shape)


def _dot_general(op: Contraction) -> Places:
    (contracting, batch), side = op.params["dimension_numbers"], op.side
    other = 1 - side
    met = zip((*contracting[side], *batch[side]), (*contracting[other], *batch[other]), strict=True)
    joined = len(contracting[side]) + len(batch[side])
    x_free = op.others[0].ndim - joined
    ndim = len(op.out.shape) - x_free + len(contracting[side])
    paired = {*contracting[side], *batch[side]}
    free = [axis for axis in range(ndim) if axis not in paired]
    start = len(batch[side]) + (x_free if side == 1 else 0)
    kept = {axis: i for i, axis in enumerate(batch[side])}
    return Places(dict(met), kept | {axis: start + i for i, axis in enumerate(free)})


def _conv(op: Contraction) -> Places | None:
    dims, groups = op.params["dimension_numbers"], op.params["feature_group_count"]
    if op.side != 1 or op.params["batch_group_count"] != 1:
        return None
    out_axis, in_axis, *_ = dims.rhs_spec
    met = {in_axis: dims.lhs_spec[1]} if groups == 1 else {}
    return Places(met, {out_axis: dims.out_spec[1]})


def _ragged(op: Contraction) -> Places | None:
    dims = op.params["ragged_dot_dimension_numbers"]
    ((x_in, w_in), batch), (x, sizes) = dims.dot_dimension_numbers, op.others
    simple = (op.side, x.ndim, tuple(x_in), tuple(dims.lhs_ragged_dimensions)) == (1, 2, (1,), (0,))
    if not simple or any(batch) or len(dims.rhs_group_dimensions) != 1:
        return None
    (expert,) = dims.rhs_group_dimensions
    (free,) = {0, 1, 2} - {expert, *w_in}
    rows = jnp.repeat(jnp.arange(sizes.size), sizes, total_repeat_length=x.shape[0])
    return Places({expert: 0, w_in[0]: 1}, {expert: 0, free: 1}, (expert, rows))


_RULES: dict[str, Callable[[Contraction], Places | None]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "ragged_dot_general": _ragged,
}
