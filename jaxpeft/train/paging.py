"""Programs on arrays in host memory, of which only small parts are on the device at a time.

A program is traced as if all of its arrays were on the device. Work that treats each element by
itself waits until its results are known to be outputs or are needed by other work, and is then
done a chunk at a time: a chunk of the host's arrays is fetched, worked on and put back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

from jaxpeft.core import control
from jaxpeft.core.lift import run
from jaxpeft.core.memory import HOST, as_in, on_host, to_device
from jaxpeft.core.sharding import explicit, placed_as
from jaxpeft.train.chunks import SIZE, cut_of, in_chunks

Array = jax.Array

# Each element of their results depends on the elements of the same place alone.
ELEMENTWISE = frozenset(
    "abs add add_any and cbrt ceil clamp convert_element_type copy copy_p cos div eq erf exp exp2 "
    "expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter "
    "not or pow rem round rsqrt select_n sign sin sqrt square stop_gradient sub tanh xor".split()
)


def paged(f: Callable[..., Any], *args: Any, into: Any, kept: Sequence[Any] = ()) -> Any:
    """`f(*args)`, which may read arrays of the host as if they were on the device.

    Args:
        f: a function of arrays.
        *args: trees of arrays, some of them in host memory.
        into: a tree like the results, of arrays. A result is written over the one in its place, on
            the device or the host, where they have the same shape and dtype.
        kept: arrays of the host that `f` takes from there by itself.

    Returns:
        The results, in the memories where the arrays of `into` are.

    Example:
        >>> from jaxpeft.core.memory import to_host
        >>> m = to_host(jnp.ones((4, 4)))
        >>> paged(lambda m: 2 * m, m, into=m).sharding.memory_kind
        'pinned_host'
    """
    own = {id(x) for x in kept}

    def shape(x: Any) -> Any:
        return jax.eval_shape(to_device, x) if on_host(x) and id(x) not in own else x

    closed, out = jax.make_jaxpr(f, return_shape=True)(*jax.tree.map(shape, args))
    results = _evaluate(*control.open_jaxpr(closed), jax.tree.leaves(args))
    places = jax.tree.leaves(into)
    return jax.tree.unflatten(jax.tree.structure(out), as_in(_computed(results, places), places))


@dataclasses.dataclass(eq=False)
class Later:
    """A result of an elementwise equation, that waits.

    Attributes:
        eqn: the equation.
        inputs: its operands: arrays, scalars, and what waits, too.
        sources: the arrays and scalars that it depends on, by their `id`s.
    """

    eqn: Any
    inputs: list[Any]
    sources: dict[int, Any]

    @classmethod
    def of(cls, eqn: Any, inputs: list[Any]) -> Later:
        sources: dict[int, Any] = {}
        for x in inputs:
            sources |= x.sources if isinstance(x, Later) else {id(x): x}
        return cls(eqn, inputs, sources)

    @property
    def aval(self) -> Any:
        return self.eqn.outvars[0].aval

    @property
    def hosts(self) -> set[int]:
        return {key for key, x in self.sources.items() if on_host(x)}

    def at(self, known: dict[int, Any], shape: Sequence[int]) -> Any:
        """Its value for chunks of its sources, which it adds to what is `known` of them."""
        if id(self) not in known:
            values = [
                x.at(known, shape) if isinstance(x, Later) else known[id(x)] for x in self.inputs
            ]
            if self.eqn.primitive.name == "broadcast_in_dim":
                known[id(self)] = jnp.broadcast_to(values[0], tuple(shape))
            else:
                known[id(self)] = self.eqn.primitive.bind(*values, **self.eqn.params)
        return known[id(self)]


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """The outputs of a program: arrays, or what waits."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda atom: atom.val if isinstance(atom, jex.Literal) else env[atom]  # noqa: E731
    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name == "jit":
            outs = _evaluate(*control.open_jaxpr(eqn.params["jaxpr"]), values)
        elif _is_elementwise(eqn):
            outs = [Later.of(eqn, values)]
        else:
            pairs = zip(eqn.invars, _computed(values), strict=True)
            outs = run(eqn, [_in_memory_of(*pair) for pair in pairs])
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _is_elementwise(eqn: Any) -> bool:
    shape = eqn.outvars[0].aval.shape
    shapes = [atom.aval.shape for atom in eqn.invars]
    if eqn.primitive.name == "broadcast_in_dim":
        return bool(shape) and shapes == [()]
    known = eqn.primitive.name in ELEMENTWISE
    return known and bool(shape) and all(s in ((), shape) for s in shapes)


def _in_memory_of(atom: Any, x: Any) -> Any:
    """A value in the memory where an equation has its operand."""
    return x if atom.aval.memory_space == HOST else to_device(x)


Pair = tuple[Later, Any]


def _computed(values: Sequence[Any], places: Sequence[Any] | None = None) -> list[Any]:
    """The values, where what waited is computed, and written over its place if that fits."""
    pairs = zip(values, places or [None] * len(values), strict=True)
    found: dict[int, Any] = {}
    whole: list[dict[int, Any]] = [{}]  # those that are not cut, of about a chunk each
    for group in _groups([pair for pair in pairs if isinstance(pair[0], Later)]):
        sources = {key: x for later, _ in group for key, x in later.sources.items()}
        hosts = [x for x in sources.values() if on_host(x)]
        if not hosts or cut_of(hosts):
            # Loops come one after another.
            found |= _together(group, sources)
            continue
        if sum(math.prod(x.shape) for x in whole[-1].values()) > SIZE:
            whole.append({})
        if len(whole) > 2:
            # Two are under way at a time, so that not all are fetched at first.
            sources, whole[-3] = _after(sources, whole[-3])
        whole[-1] |= _together(group, sources)
    found |= {key: x for part in whole for key, x in part.items()}
    return [found[id(x)] if isinstance(x, Later) else x for x in values]


def _groups(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Those that share an array of the host together, so that it is fetched once."""
    groups: list[tuple[set[int], list[Pair]]] = []
    for pair in pairs:
        hosts, joined = pair[0].hosts, [pair]
        apart = [group for group in groups if not group[0] & hosts]
        for keys, others in (group for group in groups if group[0] & hosts):
            hosts, joined = hosts | keys, [*others, *joined]
        groups = [*apart, (hosts, joined)]
    return [group for _, group in groups]


def _after(sources: dict[int, Any], results: dict[int, Any]) -> Any:
    """Both, where the host's arrays are not read before the results are there."""
    hosts = {key: x for key, x in sources.items() if on_host(x)}
    hosts, results = lax.optimization_barrier((hosts, results))
    return sources | hosts, results


def _together(group: Sequence[Pair], sources: dict[int, Any]) -> dict[int, Any]:
    """The values of those that share arrays of the host, by `id`."""
    laters = {id(later): later for later, _ in group}
    if not any(map(on_host, sources.values())):
        return {key: x.at(sources, x.aval.shape) for key, x in laters.items()}
    targets = _targets(group, sources)
    scalars = {key: x for key, x in sources.items() if not jnp.ndim(x)}
    others = {key: x for key, x in sources.items() if key not in scalars | targets}

    def step(chunks: Any, read: Any, single: Any) -> list[Array]:
        known = dict(zip([*targets, *others, *scalars], [*chunks, *read, *single], strict=True))
        return [x.at(known, chunks[0].shape) for x in laters.values()]

    lists = [list(part.values()) for part in (targets, others, scalars)]
    return dict(zip(laters, in_chunks(step, *lists), strict=True))


def _targets(group: Sequence[Pair], sources: dict[int, Any]) -> dict[int, Any]:
    """What each result is written over: the array in its place if that fits, or a new one."""
    targets: dict[int, Any] = {}
    for later, place in dict(group).items():
        aval, key = later.aval, id(place)
        fits = place is not None and (place.shape, place.dtype) == (aval.shape, aval.dtype)
        if fits and key not in targets and (key in sources or on_host(place)):
            targets[key] = sources.get(key, place)
        else:
            like = next(x for x in sources.values() if jnp.ndim(x))
            # Nothing reads it: its key is that of no source.
            targets[-id(later)] = placed_as(jnp.zeros(aval.shape, aval.dtype), explicit(like))
    return targets
