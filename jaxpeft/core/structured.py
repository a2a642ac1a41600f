"""Structured weights: pytree nodes that stand in the params tree where an array stood.

`Structured` is the interface, `Sum` adds parts; `Einsum` (in `einsum.py`) is a product of small
factors over labels. LoRA is `Sum(W, Einsum(A, B))`. A view of a structured weight is a structured
weight; where it meets a contraction it does its own work.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxpeft.core.labels import View
from jaxpeft.core.sharding import like, manual, vary, varying

Array = jax.Array


class Contraction(NamedTuple):
    """A product that a weight takes part in.

    `kind` names the primitive, `params` are its parameters, `side` is the weight's operand
    position, `others` are the remaining operands in order, `out` is the result's shape and dtype.
    `bind(array)` runs the program's own operation on an array that stands in for the weight, and
    `bind(array, *others)` with these as the remaining operands.
    `once(name, f)` is `f()`, computed once for all weights that meet the same other operand.
    """

    kind: str
    params: dict[str, Any]
    side: int
    others: tuple[Array, ...]
    out: jax.ShapeDtypeStruct
    bind: Callable[..., Array]
    once: Callable[[Any, Callable[[], Array]], Array] = lambda name, f: f()

    def on(self, *others: Array) -> Contraction:
        """The same product with `others` as the remaining operands, of the shapes that they had."""
        return Contraction(
            self.kind, self.params, self.side, others, self.out,
            lambda array, *given: self.bind(array, *(given or others)),
        )  # fmt: skip


class Structured:
    """An expression in place of a weight. Only `shape`, `dtype` and `materialize` are required.

    The other methods are shortcuts past the dense array: each may return None, which means "not
    this way", and the weight is then materialized.
    """

    shape: tuple[int, ...]
    dtype: Any
    name: str = ""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def stackable(self) -> bool:
        """Whether `restack` works, so that a scan may hand such weights out of its body."""
        return False

    def materialize(self, dtype: DTypeLike | None = None) -> Array:
        """The dense array that this expression stands for, in `dtype` (its own by default)."""
        raise NotImplementedError(f"{type(self).__name__} must define materialize()")

    def view(self, view: View) -> Structured | None:
        """The weight after a reshape, transpose, slice, cast, ...; None if it cannot say."""
        del view
        return None

    def contract(self, op: Contraction) -> Array | None:
        """The result of a product with this weight; None if there is no shortcut."""
        del op
        return None

    def unstack(self) -> tuple[Any, Callable[[Any], Structured]] | None:
        """Arrays stacked on axis 0, and the function from a slice of each to the slice's weight."""
        return None

    def restack(self) -> Structured:
        """This weight, whose arrays have just grown a leading axis, as a stack of such weights."""
        raise NotImplementedError(f"{type(self).__name__} does not restack")

    def _no_array(self, *_: Any, **__: Any) -> Any:
        kind, axes = type(self).__name__, ",".join(map(str, self.shape))
        raise TypeError(
            f"{kind} {self.dtype}[{axes}] stands in params for an array and is none itself. Call "
            "the model with it as `jp.lift(f)(params, *inputs)` or `tuned.apply`, or take the "
            "dense array: `weight.materialize()`."
        )

    __array__ = __getitem__ = __matmul__ = __rmatmul__ = __mul__ = __rmul__ = _no_array
    __add__ = __radd__ = __sub__ = __rsub__ = __truediv__ = __neg__ = _no_array


def node(cls: type) -> Any:
    """Registers a dataclass as a pytree: `static` fields are metadata, the rest are children."""
    fields = dataclasses.fields(cls)
    meta = [field.name for field in fields if field.metadata.get("static")]
    data = [field.name for field in fields if not field.metadata.get("static")]
    return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=meta)


def static(**options: Any) -> Any:
    """A dataclass field that is metadata, not an array."""
    return dataclasses.field(metadata={"static": True}, **options)


@node
@dataclasses.dataclass(frozen=True, eq=False)
class Sum(Structured):
    """`W' = sum of parts`; the first part, usually the frozen array, gives shape and dtype."""

    parts: tuple[Array | Structured, ...]
    name: str = static(default="")

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.parts[0].shape

    @property
    def dtype(self) -> Any:
        return self.parts[0].dtype

    def materialize(self, dtype: DTypeLike | None = None) -> Array:
        # Parts are added in float32 or wider, and rounded once.
        wide = jnp.promote_types(self.dtype, jnp.float32)
        parts = [dense(part, wide) for part in self.parts]
        total = functools.reduce(lambda total, part: total + like(part, total), parts)
        return total.astype(dtype or self.dtype)

    def view(self, view: View) -> Structured | None:
        return self._with([apply_view(part, view) for part in self.parts])

    def contract(self, op: Contraction) -> Array | None:
        terms = [contract(part, op) for part in self.parts]
        known = [term for term in terms if term is not None]
        if len(known) < len(terms):
            return None
        return functools.reduce(
            lambda y, term: lax.add(y, like(lax.convert_element_type(term, y.dtype), y)), known
        )

    def unstack(self) -> tuple[Any, Callable[[Any], Structured]] | None:
        halves = [unstack(part) for part in self.parts]
        if any(half is None for half in halves):
            return None
        stacked, rebuild = zip(*halves, strict=True)
        return stacked, lambda slices: Sum(
            tuple(build(part) for build, part in zip(rebuild, slices, strict=True)), self.name
        )

    @property
    def stackable(self) -> bool:
        return all(not isinstance(part, Structured) or part.stackable for part in self.parts)

    def restack(self) -> Structured:
        return Sum(tuple(restack(part) for part in self.parts), self.name)

    def _with(self, parts: Sequence[Array | Structured | None]) -> Sum | None:
        known = tuple(part for part in parts if part is not None)
        return Sum(known, self.name) if len(known) == len(parts) else None


def dense(weight: Array | Structured, dtype: DTypeLike | None = None) -> Array:
    """The weight as an array, in `dtype` if given."""
    if isinstance(weight, Structured):
        return weight.materialize(dtype)
    return weight if dtype is None else weight.astype(dtype)


def apply_view(weight: Array | Structured, view: View) -> Array | Structured | None:
    return weight.view(view) if isinstance(weight, Structured) else view.bind(weight)


def contract(weight: Array | Structured, op: Contraction) -> Array | None:
    return weight.contract(op) if isinstance(weight, Structured) else op.bind(weight)


def unstack(weight: Array | Structured) -> tuple[Any, Callable[[Any], Any]] | None:
    return weight.unstack() if isinstance(weight, Structured) else (weight, lambda part: part)


def restack(weight: Array | Structured) -> Array | Structured:
    return weight.restack() if isinstance(weight, Structured) else weight


def alike(weight: Any) -> Any:
    """Inside of a `shard_map`, a structured weight whose arrays all vary over the same axes."""
    if not isinstance(weight, Structured):
        return weight
    axes = {axis for leaf in jax.tree.leaves(weight) for axis in varying(leaf)}
    return vary(weight, tuple(sorted(axes)))


def placeholder(weight: Any) -> Any:
    """What stands for a weight while a program is traced: its shape and type."""
    if not isinstance(weight, Structured):
        return weight
    kind = next((kind for leaf in jax.tree.leaves(weight) if (kind := manual(leaf))), None)
    if kind is None:
        return jax.ShapeDtypeStruct(weight.shape, weight.dtype)
    here = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec())
    return jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=here, manual_axis_type=kind)
