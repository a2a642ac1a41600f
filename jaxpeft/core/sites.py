"""Site discovery: how a program uses each of its parameters, from one abstract trace.

The jaxpr is walked with the label bookkeeping of views alone: every axis of every parameter is
followed through casts, transposes, slices, jits, loops and remat to the product that contracts it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxpeft.core import control, views
from jaxpeft.core.frame import frame
from jaxpeft.core.labels import Drop, Layout, Split, View
from jaxpeft.core.lift import trace
from jaxpeft.core.site import Site
from jaxpeft.core.structured import Structured
from jaxpeft.core.tap import boundaries
from jaxpeft.core.tree import leaves_with_paths


@dataclasses.dataclass
class _Record:
    """What has been seen of one parameter so far."""

    shape: tuple[int, ...]
    roles: dict[int, str] = dataclasses.field(default_factory=dict)
    uses: list[str] = dataclasses.field(default_factory=list)
    dense: list[str] = dataclasses.field(default_factory=list)
    lookups: list[str] = dataclasses.field(default_factory=list)
    groups: int = 1

    def site(self, path: str, dtype: Any) -> Site:
        known = (self.roles.get(axis, "") for axis in range(len(self.shape)))
        roles = tuple(known) if self.roles else ()
        dense, lookups = (tuple(dict.fromkeys(seen)) for seen in (self.dense, self.lookups))
        name = jnp.dtype(dtype).name
        return Site(path, self.shape, name, roles, tuple(self.uses), self.groups, dense, lookups)


@dataclasses.dataclass(frozen=True)
class _Track:
    """A view of a parameter at one place in the program; `origin` maps labels to its axes."""

    record: _Record
    layout: Layout
    origin: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, record: _Record) -> _Track:
        layout = Layout.of(record.shape)
        return cls(record, layout, tuple((label, label) for label, _ in layout.sizes))

    def assign(self, axes: Sequence[int], role: str) -> None:
        """Gives a role to the parameter's axes under these axes of the view; the first stays."""
        origin = dict(self.origin)
        for label in (label for axis in axes for label in self.layout.axes[axis]):
            if label in origin:
                self.record.roles.setdefault(origin[label], role)

    def use(self, kind: str) -> None:
        if kind not in self.record.uses:
            self.record.uses.append(kind)

    def without_stack(self) -> _Track:
        """One slice along axis 0, as a scan takes it."""
        self.assign([0], "stack")
        return dataclasses.replace(self, layout=self.layout.with_axes(self.layout.axes[1:]))

    def view(self, view: View) -> _Track | None:
        step = self.layout.apply(view)
        if step is None:
            return None
        layout, edits = step
        origin = dict(self.origin)
        for edit in edits:
            axis = origin.get(edit.label)
            if isinstance(edit, Split) and axis is not None:
                origin.update((part, axis) for part, _ in edit.parts)
            if isinstance(edit, Drop) and axis is not None:
                self.record.roles.setdefault(axis, "stack")
        return _Track(self.record, layout, tuple(origin.items()))


def discover(
    f: Callable[..., Any],
    params: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    names: Sequence[str] = (),
) -> tuple[Site, ...]:
    """The sites of `f(params, *args, **kwargs)`: every floating-point parameter, in tree order.

    Args:
        f: a pure function.
        params: its first argument, arrays or `ShapeDtypeStruct`s.
        args: its other arguments, arrays or `ShapeDtypeStruct`s where they are arrays.
        kwargs: its keyword arguments.
        names: of its positional arguments after the first.

    Returns:
        One `Site` a floating-point leaf of `params`, then one a call boundary that is tapped, of
        shape `(layers..., features)`.

    Example:
        >>> import jax
        >>> w, x = jax.ShapeDtypeStruct((4, 3), "float32"), jax.ShapeDtypeStruct((2, 4), "float32")
        >>> discover(lambda p, x: x @ p["w"], {"w": w}, (x,), {})[0].roles
        ('in', 'out')
    """
    pairs, _ = leaves_with_paths(params, is_leaf=lambda x: isinstance(x, Structured))
    leaves, outer = frame(params)
    inputs, inner = frame((tuple(args), dict(kwargs)))
    jaxpr, _, _ = trace(f, outer, inner, leaves, inputs)
    paths = [path for i, (path, _) in enumerate(pairs) if i not in dict(outer.static)]
    weights = [
        (path, leaf, _Record(tuple(leaf.shape)) if is_weight(leaf) else None)
        for path, leaf in zip(paths, leaves, strict=True)
    ]
    tracks = [_Track.of(record) if record else None for _, _, record in weights]
    _walk(jaxpr, [*tracks, *_ids((args, kwargs), names)])
    sites = [record.site(path, leaf.dtype) for path, leaf, record in weights if record]
    return (*sites, *_boundaries(jaxpr))


def _ids(given: Any, names: Sequence[str]) -> list[_Ids | None]:
    """The integer arrays among the model's inputs, by the names of its arguments."""
    positional = dict(enumerate(names))
    args, kwargs = given
    named = [(positional.get(i, str(i)), arg) for i, arg in enumerate(args)]
    return [
        _Ids(name) if jnp.issubdtype(leaf.dtype, jnp.integer) else None
        for name, value in [*named, *sorted(kwargs.items())]
        for leaf in frame(value)[0]
    ]


def _boundaries(jaxpr: Any) -> list[Site]:
    """The first tap of each name, as a site."""
    found: dict[str, Site] = {}
    for tap in boundaries(jaxpr):
        roles = ("stack",) * len(tap.stack) + ("in",) * len(tap.features)
        shape = (*tap.stack, *tap.features)
        dtype = jnp.dtype(tap.dtype).name
        site = Site(tap.name, shape, dtype, roles, ("call",), sources=tap.sources)
        found.setdefault(tap.name, site)
    return list(found.values())


def is_weight(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


@dataclasses.dataclass(frozen=True)
class _Ids:
    """An integer input of the model, on its way to the table that it indexes."""

    name: str

    def without_stack(self) -> _Ids:
        return self


_Tracks = Sequence[Any]

# What indexing does to ids before it gathers: casts, shapes, and negative ids counted from the end.
_OF_IDS = {"convert_element_type", "reshape", "squeeze", "broadcast_in_dim", "expand_dims", "add"}
_OF_IDS |= {"select_n", "copy", "sharding_constraint", "optimization_barrier", "concatenate"}
_OF_IDS |= {"slice", "dynamic_slice", "pad", "dynamic_update_slice"}


def _walk(jaxpr: Any, inputs: _Tracks) -> list[Any]:
    """Follows the parameters and the ids through a program; the tracks of its outputs."""
    env = {var: track for var, track in zip(jaxpr.invars, inputs, strict=True) if track}

    def read(atom: Any) -> Any:
        return None if isinstance(atom, control.Literal) else env.get(atom)

    small: set[Any] = set()
    for eqn in jaxpr.eqns:
        tracks = [read(atom) for atom in eqn.invars]
        if any(tracks):
            scalars = [isinstance(v, control.Literal) or v in small for v in eqn.invars]
            outs = _met(eqn, tracks, scalars)
            env.update((v, t) for v, t in zip(eqn.outvars, outs, strict=False) if t)
        elif eqn.primitive.name == "broadcast_in_dim":
            small.add(eqn.outvars[0])
    return [read(atom) for atom in jaxpr.outvars]


def _met(eqn: Any, tracks: _Tracks, scalars: Sequence[bool]) -> _Tracks:
    """One equation that a parameter or ids reach."""
    weights = [track if isinstance(track, _Track) else None for track in tracks]
    ids = next((track for track in tracks if isinstance(track, _Ids)), None)
    name = eqn.primitive.name
    if ids and name in _WALKS and (outs := _WALKS[name](eqn, tracks)) is not None:
        return outs
    if ids and name == "gather" and weights[0]:
        weights[0].record.lookups.append(ids.name)
    if any(weights):
        return _step(eqn, weights, scalars)
    return [ids] * len(eqn.outvars) if name in _OF_IDS else []


def _step(
    eqn: Any, tracks: Sequence[_Track | None], scalars: Sequence[bool]
) -> Sequence[_Track | None]:
    name = eqn.primitive.name
    if name in _WALKS:
        outs = _WALKS[name](eqn, tracks)
        if outs is not None:
            return outs
    elif name in _PRODUCTS:
        for side, track in enumerate(tracks):
            if track:
                track.use(name)
                _PRODUCTS[name](track, side, eqn)
        return []
    elif name == "split" and tracks[0]:
        return [tracks[0].view(view) for view in views.pieces(eqn.params, tracks[0].layout.shape)]
    elif name in ("stop_gradient", "optimization_barrier"):
        return tracks
    elif name in ("mul", "div", "neg"):
        out = _scaled(eqn, tracks, scalars)
        if out:
            return [out]
    else:
        out = _viewed(eqn, tracks)
        if out:
            return [out]
    for track in filter(None, tracks):
        track.record.dense.append(name)
    return _same_shape(eqn, tracks)


def _same_shape(eqn: Any, tracks: Sequence[_Track | None]) -> list[_Track | None]:
    """Past an unknown operation that keeps the shape (a mask, an activation) axes keep their place.

    The weight is dense from there on, but which of its axes the product contracts is still known.
    One that was broadcast first is part of the activations there, such as positions of a batch.
    """
    shape, track = next((t.layout.shape, t) for t in tracks if t)
    own = {label for axis in track.layout.axes for label in axis} <= dict(track.origin).keys()
    return [track if own and var.aval.shape == shape else None for var in eqn.outvars]


def _scaled(eqn: Any, tracks: Sequence[_Track | None], scalars: Sequence[bool]) -> _Track | None:
    """`-w`, `w * v` or `w / v` with a scalar or broadcast `v`: still a view of `w`."""
    if len(tracks) == 1:
        return tracks[0]
    side = 0 if tracks[0] else 1
    scalar = scalars[1 - side] or not eqn.invars[1 - side].aval.shape
    return tracks[side] if scalar and (side == 0 or eqn.primitive.name == "mul") else None


def _viewed(eqn: Any, tracks: Sequence[_Track | None]) -> _Track | None:
    weight = tracks[0]
    if weight is None:
        return None
    shape = weight.layout.shape
    kind = views.read(eqn.primitive.name, eqn.params, shape, eqn.invars[1:])
    return weight.view(View(kind[0], kind[1])) if kind else None


def _dot_general(track: _Track, side: int, eqn: Any) -> None:
    contracting, batch = eqn.params["dimension_numbers"]
    track.assign(batch[side], "batch")
    track.assign(contracting[side], "in")
    track.assign(range(len(track.layout.axes)), "out")


def _gather(track: _Track, side: int, eqn: Any) -> None:
    dims = eqn.params["dimension_numbers"]
    if side == 0:
        track.assign(dims.operand_batching_dims, "batch")
        track.assign(dims.start_index_map, "in")
        track.assign(range(len(track.layout.axes)), "out")


def _conv(track: _Track, side: int, eqn: Any) -> None:
    if side != 1:
        return
    out_axis, *inner = eqn.params["dimension_numbers"].rhs_spec
    track.record.groups = eqn.params["feature_group_count"]
    track.assign(inner, "in")
    track.assign([out_axis], "out")


def _ragged(track: _Track, side: int, eqn: Any) -> None:
    dims = eqn.params["ragged_dot_dimension_numbers"]
    if side == 1:
        track.assign(dims.rhs_group_dimensions, "batch")
        _dot_general(track, side, _Params({"dimension_numbers": dims.dot_dimension_numbers}))


@dataclasses.dataclass(frozen=True)
class _Params:
    params: dict[str, Any]


_PRODUCTS: dict[str, Callable[[_Track, int, Any], None]] = {
    "dot_general": _dot_general,
    "gather": _gather,
    "conv_general_dilated": _conv,
    "ragged_dot_general": _ragged,
}


def _inline(eqn: Any, tracks: Sequence[_Track | None]) -> Any:
    program = control.read_call(eqn.params)
    return None if program is None else _walk(control.open_jaxpr(program)[0], tracks)


def _scan(eqn: Any, tracks: _Tracks) -> Any:
    spec = control.read_scan(eqn.params)
    if spec is None:
        return None
    first = spec.consts + spec.carry
    slices = [track.without_stack() if track else None for track in tracks[first:]]
    body = control.open_jaxpr(spec.body)[0]
    _walk(body, [*tracks[:first], *slices])
    return _handed_on(body, spec.consts, tracks[spec.consts : first])


def _while(eqn: Any, tracks: Sequence[_Track | None]) -> Any:
    spec = control.read_while(eqn.params)
    if spec is None:
        return None
    consts, init = (
        spec.cond_consts + spec.body_consts,
        tracks[spec.cond_consts + spec.body_consts :],
    )
    body = control.open_jaxpr(spec.body)[0]
    _walk(control.open_jaxpr(spec.cond)[0], [*tracks[: spec.cond_consts], *init])
    _walk(body, [*tracks[spec.cond_consts : consts], *init])
    return _handed_on(body, spec.body_consts, init)


def _handed_on(body: Any, first: int, init: Sequence[_Track | None]) -> Iterator[_Track | None]:
    same = control.invariant(body, first, len(init))
    return iter([track if kept else None for track, kept in zip(init, same, strict=True)])


def _cond(eqn: Any, tracks: Sequence[_Track | None]) -> Any:
    if "branches" not in eqn.params:
        return None
    for branch in eqn.params["branches"]:
        _walk(control.open_jaxpr(branch)[0], tracks[1:])
    return []


_WALKS: dict[str, Callable[[Any, Sequence[_Track | None]], Any]] = {
    name: {"cond": _cond, "scan": _scan, "while": _while}.get(name, _inline)
    for name in control.RULES
}
