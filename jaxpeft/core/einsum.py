"""A weight that is a product of small factors over labelled axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from jaxpeft.core.contract import RULES, Labelled, Numerics, product
from jaxpeft.core.labels import Cut, Drop, Edit, Layout, Split, View
from jaxpeft.core.sharding import place
from jaxpeft.core.structured import Contraction, Structured, node, static

Array = jax.Array


@node
@dataclasses.dataclass(frozen=True, eq=False)
class Einsum(Structured):
    """`W' = scale * einsum(factors)`: each factor has labels, each axis of `W'` is made of labels.

    Labels on no axis are summed over (a rank); labels on an axis that no factor owns broadcast.
    `key` (typed PRNG keys with labels of their own, such as one a layer) drops entries of what the
    weight is multiplied with, at `rate`; it takes no part in `materialize`.

    Example: a rank-2 update of a (4, 3) weight, with label 2 as the rank.

    >>> import jax.numpy as jnp
    >>> layout, (rank,) = Layout.of((4, 3)).fresh(2)
    >>> update = Einsum((jnp.ones((4, 2)), jnp.ones((2, 3))), ((0, rank), (rank, 1)), layout,
    ...                 jnp.dtype("float32"))
    >>> update.materialize()[0].tolist()
    [2.0, 2.0, 2.0]
    """

    factors: tuple[Array, ...]
    owned: tuple[tuple[int, ...], ...] = static()
    layout: Layout = static()
    dtype: Any = static()
    scale: float = static(default=1.0)
    key: Array | None = None
    key_owned: tuple[int, ...] = static(default=())
    rate: float = static(default=0.0)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.layout.shape

    def materialize(self, dtype: DTypeLike | None = None) -> Array:
        wanted = tuple(label for axis in self.layout.axes for label in axis)
        first, *rest = map(Labelled, self.factors, self.owned)
        # Accelerators multiply float32 in fewer bits unless told otherwise.
        wide = Numerics(jnp.result_type(*self.factors), lax.Precision.HIGHEST)
        array = product(first, rest, wanted, self.layout.size, self.scale, wide)
        return array.reshape(self.shape).astype(dtype or self.dtype)

    def view(self, view: View) -> Structured | None:
        if view.kind == "convert":
            return dataclasses.replace(self, dtype=jnp.dtype(view.args[0]))
        if view.kind == "scale":
            return self._scaled(jnp.asarray(view.args[0]), view.args[1])
        if view.kind == "place":
            return self._placed(*view.args)
        step = self.layout.apply(view)
        return self._edited(*step) if step else None

    def contract(self, op: Contraction) -> Array | None:
        rule = RULES.get(op.kind)
        return rule(self, op) if rule else None

    def unstack(self) -> tuple[Any, Callable[[Any], Structured]] | None:
        first, *axes = self.layout.axes
        if len(first) != 1:
            return None
        (label,) = first
        stacked = [
            jnp.moveaxis(array, labels.index(label), 0) if label in labels else None
            for array, labels in self._arrays()
        ]
        left = [tuple(name for name in labels if name != label) for _, labels in self._arrays()]

        def slice_of(slices: Sequence[Array | None]) -> Einsum:
            pairs = [
                (old if new is None else new, labels)
                for (old, _), new, labels in zip(self._arrays(), slices, left, strict=True)
            ]
            return self._with(pairs, self.layout.with_axes(axes))

        return stacked, slice_of

    @property
    def stackable(self) -> bool:
        return True

    def restack(self) -> Structured:
        layout, (label,) = self.layout.fresh(self.factors[0].shape[0])
        pairs = [(array, (label, *labels)) for array, labels in self._arrays()]
        return self._with(pairs, layout.with_axes(((label,), *layout.axes)))

    def _arrays(self) -> list[tuple[Array, tuple[int, ...]]]:
        """Every array with its labels: the factors, then the key if there is one."""
        pairs = list(zip(self.factors, self.owned, strict=True))
        return pairs if self.key is None else [*pairs, (self.key, self.key_owned)]

    def _with(self, pairs: Sequence[tuple[Array, tuple[int, ...]]], layout: Layout) -> Einsum:
        arrays, owned = zip(*pairs, strict=True)
        count = len(self.factors)
        key, key_owned = (arrays[count], owned[count]) if self.key is not None else (None, ())
        return dataclasses.replace(
            self,
            factors=arrays[:count],
            owned=owned[:count],
            layout=layout,
            key=key,
            key_owned=key_owned,
        )

    def _edited(self, layout: Layout, edits: Sequence[Edit]) -> Einsum:
        pairs = self._arrays()
        for edit in edits:
            pairs = [_edit(array, labels, edit) for array, labels in pairs]
        return self._with(pairs, layout)

    def _placed(self, sharding: NamedSharding) -> Structured:
        """Each factor split along its own axes as the weight is asked to be."""
        spec = (*sharding.spec, *[None] * (len(self.shape) - len(sharding.spec)))
        entries = {
            axis[0]: entry
            for axis, entry in zip(self.layout.axes, spec, strict=True)
            if len(axis) == 1
        }
        factors = tuple(
            place(factor, sharding, [entries.get(label) for label in labels])
            for factor, labels in zip(self.factors, self.owned, strict=True)
        )
        return dataclasses.replace(self, factors=factors)

    def _scaled(self, factor: Array, dimensions: tuple[int, ...]) -> Structured | None:
        """Times a scalar or a vector: `factor` has the sizes of the axes `dimensions`."""
        axes = [axis for axis, size in zip(dimensions, factor.shape, strict=True) if size > 1]
        if len(axes) > 1:
            return None
        labels = self.layout.axes[axes[0]] if axes else ()
        sizes = [self.layout.size[label] for label in labels]
        return dataclasses.replace(
            self,
            factors=(*self.factors, factor.reshape(sizes)),
            owned=(*self.owned, labels),
        )


def _edit(array: Array, labels: tuple[int, ...], edit: Edit) -> tuple[Array, tuple[int, ...]]:
    """A factor after one change to one label; a factor that does not own the label stays."""
    if edit.label not in labels:
        return array, labels
    axis = labels.index(edit.label)
    before, after = labels[:axis], labels[axis + 1 :]
    if isinstance(edit, Drop):
        return lax.index_in_dim(array, 0, axis, keepdims=False), before + after
    if isinstance(edit, Split):
        sizes = tuple(size for _, size in edit.parts)
        shape = array.shape[:axis] + sizes + array.shape[axis + 1 :]
        return array.reshape(shape), before + tuple(label for label, _ in edit.parts) + after
    return _cut(array, axis, edit), labels


def _cut(array: Array, axis: int, cut: Cut) -> Array:
    if isinstance(cut.start, int):
        stop = cut.start + (cut.size - 1) * cut.stride + 1
        return lax.slice_in_dim(array, cut.start, stop, cut.stride, axis)
    return lax.dynamic_slice_in_dim(array, cut.start, cut.size, axis)
