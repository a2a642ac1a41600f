"""Call boundaries: `tap` marks a value with a name; `lift` runs a method where it meets the mark.

A tap is the identity: to JAX it is a primitive that lowers to nothing. Flax models are tapped at
every module's input and output by their doors; functions without modules call `tap` themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir

from jaxpeft.core import control
from jaxpeft.core.structured import node, static

_tap = jex.Primitive("tap")

# Sides of an attention, of shape (..., time, heads, width); others are (..., features).
PER_HEAD = ("query", "key", "value", "context")


def kind_per_head(name: str) -> str:
    """Which side of an attention a boundary is, "key" for "attn:key_1" as well; "" if it is none.

    >>> kind_per_head("attn:key_1"), kind_per_head("attn:out")
    ('key', '')
    """
    kind, _, count = name.rpartition(":")[2].partition("_")
    return kind if kind in PER_HEAD and (not count or count.isdigit()) else ""


def tap(x: jax.Array, name: str, **sources: jax.Array) -> jax.Array:
    """`x`, marked as a place where methods that act on activations may work.

    Args:
        x: activations, features last: `(..., features)`.
        name: a path and a side, such as "layers/attn:out". Rules match it like a parameter's path.
        **sources: other activations that a method may read there, by name; the output of a module
            has its `input`. They cost nothing where no method reads them.

    Returns:
        `x`.

    Example:
        >>> import jaxpeft as jp
        >>> def model(params, x):
        ...     return jp.tap(x @ params["w"], "w:out")
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
        >>> tuned = jp.transform(model, jp.rules(("w:out", jp.bottleneck(2))))
        >>> adapter = tuned.init(jax.random.key(0), params, x)
        >>> adapter["w:out"]["down"].shape
        (2, 3)
    """
    return _tap.bind(x, *sources.values(), name=name, sources=tuple(sources))


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    return _tap.bind(*primals, **params), tangents[0]


def _batch(args: Any, axes: Any, **params: Any) -> Any:
    # Features stay last, as methods expect them.
    size = next(x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None)
    moved = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(args, axes, strict=True)
    ]
    return _tap.bind(*moved, **params), 0


_tap.def_impl(lambda x, *sources, **params: x)
_tap.def_abstract_eval(lambda x, *sources, **params: x)
mlir.register_lowering(_tap, lambda ctx, x, *sources, **params: [x])
ad.primitive_jvps[_tap] = _jvp
batching.primitive_batchers[_tap] = _batch


class Here(NamedTuple):
    """What a method sees at a call boundary besides its leaves and the activations there.

    Attributes:
        key: PRNG key of this site and layer for dropout, or None.
        sources: further activations by name: those that the tap carries (`input` at a module's
            output), and those that the method reads from other boundaries, by their names.
        weights: the frozen parameters that the method reads, by path; of this layer in a scan.
        inputs: keyword arguments of `apply` that are the method's own, such as `task_ids`.
        states: what the method's sites in front of this one have handed on, by name.
    """

    key: jax.Array | None = None
    sources: Mapping[str, Any] = {}
    weights: Mapping[str, Any] = {}
    inputs: Mapping[str, Any] = {}
    states: Mapping[str, Any] = {}

    def state(self, name: str, path: str) -> Any:
        """The state `name` as the site in front of that at `path` has left it."""
        if name not in self.states:
            raise ValueError(
                f"the method at {path!r} takes up {name!r}, which no site in front of it has "
                "begun, or one inside of another loop, with which it ended. Let the rules match "
                "the boundary where it begins too."
            )
        return self.states[name]


@node
@dataclasses.dataclass(frozen=True, eq=False)
class Tap:
    """A method at work at one call boundary; `stack` leading axes of its arrays are layers.

    `leaves`, `key` and `weights` are stacked over layers, `shared` and `inputs` are not. A tap
    without a `call` only hands what it marks to the taps whose `reads` name it.
    """

    leaves: Any = None
    key: Any = None
    weights: Any = dataclasses.field(default_factory=dict)
    shared: Any = dataclasses.field(default_factory=dict)
    inputs: Any = dataclasses.field(default_factory=dict)
    site: Any = static(default=None)
    call: Callable[..., Any] | None = static(default=None)
    stack: int = static(default=0)
    reads: tuple[str, ...] = static(default=())
    seen: bool = static(default=False)
    states: tuple[str, ...] = static(default=())

    def __call__(
        self, x: jax.Array, sources: Mapping[str, Any], states: Mapping[str, Any]
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The tuned activations, and the states that the method hands on."""
        if self.call is None:
            return x, {}
        mine = {name: states[name] for name in self.states if name in states}
        here = Here(self.key, sources, self.weights, self.inputs, mine)
        leaves = {**self.leaves, "shared": self.shared} if self.shared else self.leaves
        result = self.call(self.site, leaves, x, here)
        y, changed = result if self.states else (result, {})
        return y.astype(x.dtype), as_before(changed, mine)

    @property
    def stacked(self) -> Any:
        """The arrays that a scan over layers takes one slice of a step."""
        return self.leaves, self.key, self.weights

    def layer(self, stacked: Any) -> Tap:
        """The same method inside such a scan, with that slice."""
        leaves, key, weights = stacked
        return dataclasses.replace(
            self, leaves=leaves, key=key, weights=weights, stack=self.stack - 1
        )


def as_before(changed: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """States in the dtypes that they had, so that a loop can carry them."""
    cast = lambda new, old: new.astype(old.dtype)  # noqa: E731
    return {n: jax.tree.map(cast, v, before[n]) if n in before else v for n, v in changed.items()}


class Boundary(NamedTuple):
    """A tap in a program: its name, the layers of the scans around it, what it marks.

    `sources` are the names and widths of the further activations that it carries.
    """

    name: str
    stack: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any
    sources: tuple[tuple[str, int], ...]

    @property
    def features(self) -> tuple[int, ...]:
        """The last axis; inside an attention the last two, heads and their width."""
        return self.shape[-2:] if kind_per_head(self.name) else self.shape[-1:]


def boundaries(jaxpr: Any, stack: tuple[int, ...] = ()) -> Iterator[Boundary]:
    """The taps of a program, those of programs inside it included, in order of appearance."""
    for eqn in jaxpr.eqns:
        if eqn.primitive is _tap:
            aval, *others = (atom.aval for atom in eqn.invars)
            widths = (other.shape[-1] if other.shape else 1 for other in others)
            sources = tuple(zip(eqn.params["sources"], widths, strict=True))
            yield Boundary(eqn.params["name"], stack, aval.shape, aval.dtype, sources)
        yield from inside(eqn, stack)


def inside(eqn: Any, stack: tuple[int, ...] = ()) -> Iterator[Boundary]:
    """The taps of the programs that an equation holds."""
    spec = control.read_scan(eqn.params) if eqn.primitive.name == "scan" else None
    layers = (*stack, spec.length) if spec else stack
    for program in jex.jaxprs_in_params(eqn.params):
        yield from boundaries(program, layers)
