"""A tuning in some layers of a stack only: AdapterDrop, and whatever leaves layers out.

W'_i = m(W_i) or x'_i = m(x_i) for i in the selection, else as they are
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpeft.core.labels import View
from jaxpeft.core.method import Leaves, Method, tune_weight
from jaxpeft.core.rules import Chain, Rules
from jaxpeft.core.scaled import Scaled
from jaxpeft.core.site import Site
from jaxpeft.core.structured import Structured, Sum, apply_view, dense
from jaxpeft.core.tap import Here, as_before

Array = jax.Array

# The option that says which layers, and the leaf that says so to the method's functions.
OPTION = "in_layers"
DROP = "drop_layers"


def layers(tuning: Any, select: Sequence[int] | slice = slice(None)) -> Any:
    """A tuning of some layers of stacks: the others stay as they are, and have no parameters.

    AdapterDrop is `layers(houlsby(), slice(4, None))`, adapters without the first four layers. A
    number of first layers can be left out at run time too: `apply(..., drop_layers=n)`, where `n`
    may be traced. Drawn anew in each step (in training, for instance uniformly between none and
    all), it gives robust AdapterDrop: one adapter of which any first layers may be dropped later.

    Leaves: those of the methods, with the selected layers alone along the stack axis; a method on
    activations does not compute in the others.

    Args:
        tuning: a method, `rules(...)` or `chain(...)`, on weights or at call boundaries.
        select: which layers: their numbers, or a slice; negative numbers count from the last.

    Returns:
        A tuning like the one given. A bare method goes to stacked sites alone. Layers that are not
        stacked by a scan have paths of their own, which rules choose among.

    Raises:
        TypeError: if `tuning` or `select` is no such thing.
        ValueError: if a method must be in all layers, as a prefix must, or is in some of them
            already; from `init`, if a stack has no such layers.

    Example:
        >>> import jaxpeft as jp
        >>> upper_half = jp.layers(jp.lora(8), slice(6, 12))
        >>> tuning = jp.layers(jp.rules(("**/mlp:out", jp.bottleneck(48))), [0, 5, -1])

    Reference:
        Rücklé et al. 2021, arXiv:2010.11918.
    """
    if not isinstance(select, slice):
        listed = isinstance(select, Sequence) and not isinstance(select, str)
        if not listed or not all(isinstance(i, int) for i in select):
            raise TypeError(f"select={select!r}: numbers of layers, [0, 5], or slice(6, None).")
        select = tuple(select)
    if isinstance(tuning, Rules):
        return Rules(tuple((where, layers(part, select)) for where, part in tuning.pairs))
    if isinstance(tuning, Chain):
        return Chain(tuple(layers(part, select) for part in tuning.tunings))
    if not isinstance(tuning, Method):
        raise TypeError(f"a tuning is a method, rules(...) or chain(...), got {tuning!r}.")
    return in_layers(tuning, select)


def in_layers(method: Method, select: tuple[int, ...] | slice) -> Method:
    """`layers` of one method."""
    if method.needs.everywhere:
        raise ValueError(
            f"`{method.name}` must be in all layers: without it they take the placeholders for "
            "tokens. Use llama_adapter, whose rows are beside the sequence, for some of them."
        )
    if OPTION in method.options:
        raise ValueError(
            f"`{method.name}` is in layers {method.options[OPTION]!r} already. Say once which: "
            f"jp.layers(method, {_shown(select)!r})."
        )

    def start(key: Array, site: Site, weight: Any) -> Leaves:
        kept = _numbers(select, site)
        return method.init(key, _shorter(site, kept), _taken(weight, site, kept))

    def tuned(site: Site, leaves: Leaves, weight: Any, key: Array | None) -> Any:
        leaves = dict(leaves)
        on = leaves.pop(OPTION)
        changed = tune_weight(method, site, leaves, weight, key)
        return _where(on, changed, weight, _axis(site))

    def call(site: Site, leaves: Leaves, x: Array, here: Here) -> Any:
        leaves, act = dict(leaves), method.call
        on = leaves.pop(OPTION)
        assert act is not None
        if not method.needs.states:
            return lax.cond(on, lambda: act(site, leaves, x, here).astype(x.dtype), lambda: x)

        def changed() -> tuple[Array, dict[str, Any]]:
            y, states = act(site, leaves, x, here)
            return y.astype(x.dtype), {**here.states, **as_before(states, here.states)}

        return lax.cond(on, changed, lambda: (x, dict(here.states)))

    def spread(site: Site, leaves: Leaves, inputs: Mapping[str, Any]) -> Leaves:
        whole = _whole(method, site, leaves, _numbers(select, site))
        whole = method.spread(site, whole, inputs) if method.spread else whole
        return whole | {OPTION: _on(select, site, inputs.get(DROP))}

    own = method.needs.inputs
    return method._replace(
        init=start,
        weight=method.weight and tuned,
        call=method.call and call,
        fits=lambda site: len(site.axes("stack")) == 1 and method.fits(site),
        bare=lambda site: len(site.axes("stack")) == 1 and method.bare(site),
        options={**method.options, OPTION: _shown(select)},
        needs=method.needs._replace(inputs=tuple(dict.fromkeys((*own, DROP)))),
        spread=spread,
    )


def _shown(select: tuple[int, ...] | slice) -> Any:
    """A selection as a JSON value: numbers, or a string such as "4::"."""
    if not isinstance(select, slice):
        return list(select)
    ends = (select.start, select.stop, select.step)
    return ":".join("" if end is None else str(end) for end in ends)


def selection(shown: Any) -> tuple[int, ...] | slice:
    """The inverse: from the option "in_layers" of a method.

    >>> selection([0, 5]), selection("4::")
    ((0, 5), slice(4, None, None))
    """
    if not isinstance(shown, str):
        return tuple(shown)
    return slice(*(int(end) if end else None for end in shown.split(":")))


def numbers(select: tuple[int, ...] | slice, depth: int) -> list[int]:
    """The selected among this many layers, in order.

    >>> numbers((-1, 0), 4), numbers(slice(2, None), 4)
    ([0, 3], [2, 3])
    """
    if isinstance(select, slice):
        return sorted(range(depth)[select])
    return sorted({range(depth)[i] for i in select})


def selected(shown: Any, depth: int) -> list[int]:
    """The layers that a method works in, by its option "in_layers"; all, if it has none."""
    return list(range(depth)) if shown is None else numbers(selection(shown), depth)


def _numbers(select: tuple[int, ...] | slice, site: Site) -> list[int]:
    (depth,) = site.sizes("stack")
    try:
        found = numbers(select, depth)
    except IndexError:
        found = []
    if not found:
        raise ValueError(
            f"layers {_shown(select)!r}: {site.path!r} is a stack of {depth} layers, 0 to "
            f"{depth - 1}, of which it selects none or one that is not there."
        )
    return found


def _axis(site: Site) -> int:
    return site.axes("stack")[0]


def _on(select: tuple[int, ...] | slice, site: Site, drop: Any) -> Array:
    """For each layer whether the method works there."""
    (depth,) = site.sizes("stack")
    on = np.isin(np.arange(depth), _numbers(select, site))
    return jnp.asarray(on) if drop is None else on & (jnp.arange(depth) >= drop)


def _shorter(site: Site, kept: Sequence[int]) -> Site:
    """The site of a stack with the selected layers alone."""
    axis = _axis(site)
    shape = (*site.shape[:axis], len(kept), *site.shape[axis + 1 :])
    return dataclasses.replace(site, shape=shape)


def _taken(weight: Any, site: Site, kept: Sequence[int]) -> Any:
    """The selected layers of a weight; of a packed one their shape alone."""
    if weight is None:
        return None
    if isinstance(weight, jax.ShapeDtypeStruct | Structured):
        return jax.ShapeDtypeStruct(_shorter(site, kept).shape, weight.dtype)
    return jnp.take(weight, jnp.asarray(kept), axis=_axis(site))


def _whole(method: Method, site: Site, leaves: Leaves, kept: Sequence[int]) -> Leaves:
    """The leaves of all layers; those of layers that are not selected are never used."""
    (depth,) = site.sizes("stack")
    if len(kept) == depth:
        return leaves
    index = jnp.asarray([kept.index(i) if i in kept else 0 for i in range(depth)])
    if _axis(site) == 0:  # where leaves have their layers too
        return jax.tree.map(lambda leaf: jnp.take(leaf, index, 0), leaves)
    few, all_ = _sizes(method, _shorter(site, kept)), _sizes(method, site)
    axes = jax.tree.map(lambda a, b: int(np.argmax(np.not_equal(a.shape, b.shape))), few, all_)
    return jax.tree.map(lambda leaf, axis: jnp.take(leaf, index, axis), leaves, axes)


def _sizes(method: Method, site: Site) -> Leaves:
    """The leaves at a site, as shapes."""
    weight = jax.ShapeDtypeStruct(site.shape, site.dtype)
    start = lambda key, weight: method.init(key, site, weight)  # noqa: E731
    return jax.eval_shape(start, jax.random.key(0), weight)


def _where(on: Array, changed: Any, weight: Any, axis: int) -> Any:
    """The changed weight where `on`, else the weight, as an expression where that can be."""
    if isinstance(changed, Sum) and changed.parts[0] is weight:
        mask = on.astype(weight.dtype)
        view = View("scale", (mask, (axis,)), lambda part: part * _along(mask, axis, part.ndim))
        parts = [apply_view(part, view) for part in changed.parts[1:]]
        known = [part for part in parts if part is not None]
        if len(known) == len(parts):
            return Sum((weight, *known), changed.name)
    if isinstance(changed, Scaled) and changed.weight is weight and len(changed.scale.factors) == 1:
        (factor,), (owned,), (label,) = (
            changed.scale.factors, changed.scale.owned, changed.scale.layout.axes[axis]
        )  # fmt: skip
        kept = jnp.where(_along(on, owned.index(label), factor.ndim), factor, 1)
        return Scaled(weight, dataclasses.replace(changed.scale, factors=(kept,)))
    whole = dense(changed)
    return jnp.where(_along(on, axis, whole.ndim), whole, dense(weight))


def _along(values: Array, axis: int, ndim: int) -> Array:
    return values.reshape([-1 if i == axis else 1 for i in range(ndim)])
