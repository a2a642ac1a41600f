"""What an `Einsum` weight does where it meets a product: `x` goes through its factors in turn.

Each rule gives exactly what the dense weight would give, without forming it, or None when the
product is of a form that it does not cover.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpeft.core.labels import Layout, View
from jaxpeft.core.sharding import explicit, like, placed, spec_of
from jaxpeft.core.structured import Contraction

if TYPE_CHECKING:
    from jaxpeft.core.einsum import Einsum

Array = jax.Array


class Labelled(NamedTuple):
    """An array with one label an axis."""

    array: Array
    labels: tuple[int, ...]


class Numerics(NamedTuple):
    """How the products are computed: operand dtype, and `dot_general`'s two options."""

    dtype: Any
    precision: Any = None
    accumulate: Any = None


def product(
    first: Labelled,
    rest: Sequence[Labelled],
    wanted: tuple[int, ...],
    size: dict[int, int],
    scale: float = 1.0,
    numerics: Numerics | None = None,
) -> Array:
    """`scale * einsum(first, *rest -> wanted)`, in turn, the smallest result first."""
    numerics = numerics or Numerics(jnp.result_type(first.array, *(f.array for f in rest)))
    now = Labelled(_cast(first.array, numerics.dtype), first.labels)
    left = list(rest)
    while left:
        needed = [_needed(left, i, wanted) for i in range(len(left))]
        results = [_result_size(now, f, keep, size) for f, keep in zip(left, needed, strict=True)]
        best = min(range(len(left)), key=lambda i: results[i])
        now = _join(now, left.pop(best), needed[best], numerics)
        if scale != 1.0:
            now, scale = now._replace(array=now.array * scale), 1.0
    array = now.array if scale == 1.0 else now.array * scale
    return _arrange(Labelled(array, now.labels), wanted, size)


def _needed(left: Sequence[Labelled], index: int, wanted: tuple[int, ...]) -> set[int]:
    """Labels that must outlive the product with factor `index`."""
    others = (labels for i, (_, labels) in enumerate(left) if i != index)
    return set(wanted).union(*others)


def _result_size(
    x: Labelled, f: Labelled, keep: set[int], size: dict[int, int]
) -> tuple[bool, int]:
    unrelated = not set(x.labels) & set(f.labels)
    result = (set(x.labels) | set(f.labels)) & keep
    return unrelated, math.prod(size[label] for label in result)


def _join(x: Labelled, f: Labelled, keep: set[int], numerics: Numerics) -> Labelled:
    """The product of two operands, summed over the labels that nothing needs any more."""
    f = Labelled(_cast(f.array, numerics.dtype), f.labels)
    x, f = _sum_out(x, keep | set(f.labels)), _sum_out(f, keep | set(x.labels))
    shared = [label for label in x.labels if label in f.labels]
    contracted = [label for label in shared if label not in keep]
    if not contracted and set(f.labels) <= set(x.labels):
        return Labelled(x.array * _spread(f, x.labels), x.labels)
    batch = [label for label in shared if label in keep]
    dims = [
        (
            tuple(x.labels.index(label) for label in group),
            tuple(f.labels.index(label) for label in group),
        )
        for group in (contracted, batch)
    ]
    gone = set(shared)
    free = [label for operand in (x, f) for label in operand.labels if label not in gone]
    array = lax.dot_general(
        _cast(x.array, numerics.dtype),
        f.array,
        (dims[0], dims[1]),
        precision=numerics.precision,
        preferred_element_type=numerics.accumulate,
        out_sharding=_out_sharding(x, f, (*batch, *free)),
    )
    return Labelled(array, (*batch, *free))


def _out_sharding(x: Labelled, f: Labelled, labels: Sequence[int]) -> Any:
    """On an explicit mesh, every label stays split as the operand that brings it has it."""
    meshes = [sharding.mesh for operand in (x, f) if (sharding := explicit(operand.array))]
    if not meshes:
        return None
    entries = {
        label: entry
        for operand in (f, x)
        for label, entry in zip(operand.labels, spec_of(operand.array), strict=True)
    }
    return placed(meshes[0], [entries[label] for label in labels])


def _sum_out(x: Labelled, keep: set[int]) -> Labelled:
    axes = tuple(i for i, label in enumerate(x.labels) if label not in keep)
    if not axes:
        return x
    return Labelled(x.array.sum(axes), tuple(label for label in x.labels if label in keep))


def _spread(f: Labelled, labels: tuple[int, ...]) -> Array:
    """`f` with its axes in the order of `labels`, of size 1 where it has none."""
    order = sorted(range(len(f.labels)), key=lambda i: labels.index(f.labels[i]))
    sizes = dict(zip(f.labels, f.array.shape, strict=True))
    return f.array.transpose(order).reshape([sizes.get(label, 1) for label in labels])


def _arrange(x: Labelled, wanted: tuple[int, ...], size: dict[int, int]) -> Array:
    x = _sum_out(x, set(wanted))
    if x.labels == wanted:
        return x.array
    return jnp.broadcast_to(_spread(x, wanted), [size[label] for label in wanted])


def dropped(weight: Einsum, x: Array) -> Array:
    """`x` with entries dropped at the weight's rate, and the rest scaled up to keep the mean."""
    if weight.key is None or weight.rate == 0.0:
        return x
    key = weight.key[(0,) * weight.key.ndim]
    keep = jax.random.bernoulli(key, 1.0 - weight.rate, x.shape)
    return jnp.where(like(keep, x), x / jnp.asarray(1.0 - weight.rate, x.dtype), 0)


def _factors(weight: Einsum) -> list[Labelled]:
    return [Labelled(*pair) for pair in zip(weight.factors, weight.owned, strict=True)]


def _flat(axes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(label for axis in axes for label in axis)


def _label(x: Array, known: dict[int, tuple[int, ...]], layout: Layout) -> tuple[Any, ...]:
    """`x` split by the labels of the axes in `known`, with a new label on every other axis."""
    axes: list[tuple[int, ...]] = []
    for axis, size in enumerate(x.shape):
        if axis not in known:
            layout, known = (grown := layout.fresh(size))[0], {**known, axis: grown[1]}
        axes.append(known[axis])
    labels = _flat(axes)
    return Labelled(_resize(x, [layout.size[label] for label in labels]), labels), axes, layout


def dot_general(weight: Einsum, op: Contraction) -> Array:
    """`x @ W'` as `((x @ A) @ B)`; from whichever side, over whichever axes."""
    (contracting, batch), side = op.params["dimension_numbers"], op.side
    w_contract, x_contract = contracting[side], contracting[1 - side]
    w_batch, x_batch = batch[side], batch[1 - side]
    w_axes = weight.layout.axes
    known = {
        x_axis: w_axes[w_axis]
        for x_axis, w_axis in zip((*x_contract, *x_batch), (*w_contract, *w_batch), strict=True)
    }
    array, known = _rows(op, known)
    x, x_axes, layout = _label(dropped(weight, array), known, weight.layout)
    paired = {*w_contract, *w_batch}
    x_free = [labels for axis, labels in enumerate(x_axes) if axis not in known]
    w_free = [labels for axis, labels in enumerate(w_axes) if axis not in paired]
    free = (x_free, w_free) if side == 1 else (w_free, x_free)
    wanted = _flat([*(w_axes[axis] for axis in w_batch), *free[0], *free[1]])
    numerics = Numerics(
        _compute_dtype(x.array, op), op.params["precision"], op.params["preferred_element_type"]
    )
    y = product(x, _factors(weight), wanted, layout.size, weight.scale, numerics)
    return _cast(_resize(y, op.out.shape), op.out.dtype)


def _cast(x: Array, dtype: Any) -> Array:
    return x if x.dtype == dtype else lax.convert_element_type(x, dtype)


def _resize(x: Array, shape: Sequence[int]) -> Array:
    # A reshape to the same shape is not free on an explicit mesh.
    return x if x.shape == tuple(shape) else x.reshape(shape)


def _rows(
    op: Contraction, known: dict[int, tuple[int, ...]]
) -> tuple[Array, dict[int, tuple[int, ...]]]:
    """`x` with its leading free axes (batch, time) as one, and the axes in `known` renumbered.

    XLA copies activations to transpose them for a gradient over several axes, but not over one.
    With several devices those axes may be sharded apart, so they are left alone. All weights that
    see one `x` get the same flat array: it is kept once for the backward pass.
    """
    (x,) = op.others
    free = next((axis for axis in range(x.ndim) if axis in known), x.ndim)
    if free < 2 or jax.device_count() > 1:
        return x, known
    flat = op.once(("rows", free), lambda: x.reshape(-1, *x.shape[free:]))
    return flat, {axis - free + 1: labels for axis, labels in known.items()}


def _compute_dtype(x: Array, op: Contraction) -> Any:
    """Factors are cast to the activations' dtype, so that a bfloat16 model computes in bfloat16."""
    return x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else op.out.dtype


def gather(weight: Einsum, op: Contraction) -> Array | None:
    """Rows of a table: `A[ids] @ B`. Covers one indexed axis, with all other axes taken whole."""
    dims, (indices,) = op.params["dimension_numbers"], op.others
    axes, sizes = weight.layout.axes, op.params["slice_sizes"]
    if len(dims.start_index_map) != 1 or dims.collapsed_slice_dims != dims.start_index_map:
        return None
    (indexed,) = dims.start_index_map
    whole = all(n == sizes[i] for i, n in enumerate(weight.shape) if i != indexed)
    if dims.operand_batching_dims or len(axes[indexed]) != 1 or not whole or op.side != 0:
        return None
    (label,) = axes[indexed]
    layout, rows = weight.layout.fresh(*indices.shape[:-1])
    taken = [_take(f, label, rows, indices, op.params) for f in _factors(weight)]
    rest = iter(_flat_axes(axes, indexed))
    batch = iter((row,) for row in rows)
    wanted = _flat(
        [next(rest if i in dims.offset_dims else batch) for i in range(len(op.out.shape))]
    )
    first = next((i for i, f in enumerate(taken) if set(rows) & set(f.labels)), 0)
    others = taken[:first] + taken[first + 1 :]
    y = product(taken[first], others, wanted, layout.size, weight.scale)
    return y.reshape(op.out.shape).astype(op.out.dtype)


def _flat_axes(axes: Sequence[tuple[int, ...]], but: int) -> list[tuple[int, ...]]:
    return [labels for axis, labels in enumerate(axes) if axis != but]


def _take(
    f: Labelled, label: int, rows: tuple[int, ...], indices: Array, params: dict[str, Any]
) -> Labelled:
    """The rows of one factor, by the program's own gather; factors without the label stay."""
    if label not in f.labels:
        return f
    axis = f.labels.index(label)
    rest = tuple(name for name in f.labels if name != label)
    dims = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(len(rows), len(rows) + len(rest))),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
    )
    sizes = tuple(1 if i == axis else n for i, n in enumerate(f.array.shape))
    taken = lax.gather(
        f.array,
        indices,
        dims,
        sizes,
        mode=params.get("mode"),
        fill_value=params.get("fill_value"),
    )
    return Labelled(taken, (*rows, *rest))


def conv_general_dilated(weight: Einsum, op: Contraction) -> Array | None:
    """`conv(x, A)` with the rank as channels, then the other factors on the channel axis."""
    out_axis, *inner = op.params["dimension_numbers"].rhs_spec
    groups = op.params["feature_group_count"]
    if op.side != 1 or op.params["batch_group_count"] != 1:
        return None
    split = _split_axis(weight, out_axis, groups) if groups > 1 else weight
    inside = set(_flat([weight.layout.axes[axis] for axis in inner]))
    kernels = [i for i, labels in enumerate(split.owned) if inside & set(labels)] if split else []
    if split is None or len(kernels) != 1 or not inside <= set(split.owned[kernels[0]]):
        return None
    factors, axes, size = _factors(split), split.layout.axes, split.layout.size
    kernel = factors.pop(kernels[0])
    group = axes[out_axis][:1] if groups > 1 else ()
    hidden = tuple(name for name in kernel.labels if name not in inside and name not in group)
    if set(hidden) & set(axes[out_axis]):
        return None
    channels = (*group, *hidden)
    order = [channels if axis == out_axis else labels for axis, labels in enumerate(axes)]
    shape = [math.prod(size[name] for name in labels) for labels in order]
    x = dropped(weight, op.others[0])
    numerics = Numerics(
        _compute_dtype(x, op), op.params["precision"], op.params["preferred_element_type"]
    )
    narrow = _arrange(kernel, _flat(order), size).reshape(shape).astype(numerics.dtype)
    y = lax.conv_general_dilated(x, narrow, **{name: op.params[name] for name in _CONV_OPTIONS})
    feature = op.params["dimension_numbers"].out_spec[1]
    z, z_axes, layout = _label(y, {feature: channels}, split.layout)
    wanted = [axes[out_axis] if i == feature else labels for i, labels in enumerate(z_axes)]
    out = product(z, factors, _flat(wanted), layout.size, weight.scale, numerics)
    return out.reshape(op.out.shape).astype(op.out.dtype)


_CONV_OPTIONS = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "feature_group_count",
    "precision",
    "preferred_element_type",
)


def _split_axis(weight: Einsum, axis: int, groups: int) -> Any:
    """The same weight with an axis whose major label is the group of a grouped convolution."""
    shape = weight.shape
    apart = (*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])
    split = weight.view(View("reshape", (apart,)))
    return split and split.view(View("reshape", (shape,)))


def ragged_dot_general(weight: Einsum, op: Contraction) -> Array | None:
    """`ragged_dot(ragged_dot(x, A), B)`, with one `A` and `B` an expert."""
    dims, axes, size = op.params["ragged_dot_dimension_numbers"], weight.layout.axes, None
    ((x_in, w_in), batch), x = dims.dot_dimension_numbers, op.others[0]
    simple = (op.side, x.ndim, tuple(x_in), tuple(dims.lhs_ragged_dimensions)) == (1, 2, (1,), (0,))
    if not simple or any(batch) or len(dims.rhs_group_dimensions) != 1 or _unknown(op.params):
        return None
    group, inner = axes[dims.rhs_group_dimensions[0]], axes[w_in[0]]
    factors, size = _factors(weight), weight.layout.size
    first = [f for f in factors if set(f.labels) & set(inner)]
    second = [f for f in factors if not set(f.labels) & set(inner)]
    named = set(_flat(axes))
    hidden = tuple(dict.fromkeys(n for f in first for n in f.labels if n not in named))
    outer = tuple(n for n in _flat(axes) if n not in {*group, *inner})
    if not first or not second or set(_flat([f.labels for f in first])) & set(outer):
        return None
    numerics = Numerics(
        _compute_dtype(x, op), op.params["precision"], op.params["preferred_element_type"]
    )
    y = dropped(weight, x).astype(numerics.dtype)
    steps = (first, (inner, hidden), 1.0), (second, (hidden, outer), weight.scale)
    for (start, *rest), sides, scale in steps:
        narrow = product(start, rest, _flat([group, *sides]), size, scale)
        shape = [math.prod(size[name] for name in labels) for labels in (group, *sides)]
        y = lax.ragged_dot(
            y.astype(numerics.dtype),
            narrow.reshape(shape).astype(numerics.dtype),
            op.others[1],
            precision=numerics.precision,
            preferred_element_type=numerics.accumulate,
        )
    return y.reshape(op.out.shape).astype(op.out.dtype)


def _unknown(params: dict[str, Any]) -> bool:
    """Whether a `ragged_dot` has options that this rule does not pass on."""
    known = {"ragged_dot_dimension_numbers", "precision", "preferred_element_type"}
    return any(value is not None for name, value in params.items() if name not in known)


RULES: dict[str, Callable[[Any, Contraction], Array | None]] = {
    "dot_general": dot_general,
    "gather": gather,
    "conv_general_dilated": conv_general_dilated,
    "ragged_dot_general": ragged_dot_general,
}
