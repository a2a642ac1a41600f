"""Finds the softmax attentions of a program: which products they are, and what each axis is.

An attention is a product of two activations whose result goes through `exp`, is divided by its sum
over one axis, and is contracted over that axis by a second product. The axes of the first result
are its *labels*; they are followed through all that lies between the two products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.extend import core as jex

from jaxpeft.core import control
from jaxpeft.core.attention_axes import Attention, Axes, match
from jaxpeft.core.tap import PER_HEAD, boundaries

INLINE = tuple(name for name, rule in control.RULES.items() if rule is control.inline)

# An equation, a program inside it, an equation in there, and so on.
Place = tuple[int, ...]


class Product(NamedTuple):
    """A product of two activations: perhaps the first of an attention in the module at `path`."""

    place: Place
    eqn: Any
    path: str


class Fact(NamedTuple):
    """What is known of a value.

    Attributes:
        active: it depends on more than parameters and constants.
        product: the product that it is made of by what happens between an attention's products.
        axes: the labels of each axis; None for a sum over labels.
        exped: it went through `exp`.
        summed: the labels that it is summed over, or over which it is divided by its sum.
    """

    active: bool = False
    product: Product | None = None
    axes: Axes | None = None
    exped: bool = False
    summed: frozenset[int] = frozenset()


@dataclasses.dataclass
class Walk:
    """The state of a walk through a program, in its order.

    Attributes:
        taken: the names of taps that are there already.
        open: paths of the modules that are being called.
        counts: how many attentions each module has so far.
        found: the attention that a product is part of, by the product's place.
    """

    taken: frozenset[str]
    open: list[str] = dataclasses.field(default_factory=list)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    found: dict[Place, Attention] = dataclasses.field(default_factory=dict)

    def fork(self) -> Walk:
        return Walk(self.taken, list(self.open), dict(self.counts))

    def join(self, other: Walk) -> None:
        self.found.update(other.found)
        for path, count in other.counts.items():
            self.counts[path] = max(count, self.counts.get(path, 0))

    def tap(self, name: str) -> None:
        """A module opens at its input and closes at its output."""
        path, _, side = name.rpartition(":")
        if side == "in":
            self.open.append(path)
            self.counts.pop(path, None)
        elif side == "out" and path in self.open:
            del self.open[len(self.open) - 1 - self.open[::-1].index(path) :]

    def add(self, first: Place, second: Place, attention: Attention, path: str) -> None:
        """Names an attention, unless its module has such marks of its own."""
        if any(f"{path}:{kind}" in self.taken for kind in PER_HEAD):
            return
        count = self.counts.get(path, 0)
        self.counts[path] = count + 1
        end = f"_{count}" if count else ""
        names = {kind: f"{path}:{kind}{end}" for kind in PER_HEAD}
        self.found[first] = self.found[second] = attention._replace(names=names, place=first)


def find(jaxpr: Any, params: int) -> dict[Place, Attention]:
    """The attentions of a program whose first `params` inputs are parameters, by both products."""
    walk = Walk(frozenset(boundary.name for boundary in boundaries(jaxpr)))
    facts = [Fact(active=i >= params) for i in range(len(jaxpr.invars))]
    _walk(jaxpr, facts, walk, ())
    return walk.found


def programs(eqn: Any) -> list[Any]:
    """The programs that an equation holds, each once."""
    return list({id(program): program for program in jex.jaxprs_in_params(eqn.params)}.values())


def _walk(jaxpr: Any, facts: Sequence[Fact], walk: Walk, place: Place | None) -> list[Fact]:
    """The facts of a program's outputs; without a place, in what cannot change, none is found."""
    env = dict(zip(jaxpr.invars, facts, strict=True))

    def read(atom: Any) -> Fact:
        return Fact() if isinstance(atom, control.Literal) else env.get(atom, Fact())

    for i, eqn in enumerate(jaxpr.eqns):
        here = None if place is None else (*place, i)
        outs = _step(eqn, [read(atom) for atom in eqn.invars], walk, here)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _step(eqn: Any, facts: Sequence[Fact], walk: Walk, place: Place | None) -> Sequence[Fact]:
    name = eqn.primitive.name
    if name == "tap":
        walk.tap(eqn.params["name"])
        return facts[:1]
    if name in INLINE or name == "custom_jvp_call":
        inner = (*place, 0) if place is not None and name in INLINE else None
        return _walk(programs(eqn)[0], facts, walk, inner)
    if name == "optimization_barrier":
        return facts
    active = any(fact.active for fact in facts)
    if name in _PROGRAMS and active and place is not None:
        flags = _PROGRAMS[name](eqn, [fact.active for fact in facts], walk, place)
        return [Fact(flag) for flag in flags or [True] * len(eqn.outvars)]
    if not any(fact.product for fact in facts) and name != "dot_general":
        return [Fact(active)] * len(eqn.outvars)
    if name == "dot_general":
        return [Fact(active)] if place is None else [_product(eqn, facts, walk, place)]
    out = _followed(eqn, facts) or Fact(active)
    return [out, *[Fact(active)] * (len(eqn.outvars) - 1)]


# --- programs inside: only whether their values depend on activations passes in and out ---


def _run(
    program: Any, flags: Sequence[bool], eqn: Any, walk: Walk, place: Place
) -> tuple[list[bool], Walk]:
    inner = walk.fork()
    index = [id(p) for p in programs(eqn)].index(id(program))
    facts = _walk(program, [Fact(flag) for flag in flags], inner, (*place, index))
    return [fact.active for fact in facts], inner


def _loop(
    eqn: Any, body: Any, parts: Sequence[Sequence[bool]], walk: Walk, place: Place
) -> list[bool]:
    """A body whose inputs are constants, carries and slices: once more until no carry changes."""
    consts, carry, xs = map(list, parts)
    while True:
        outs, inner = _run(body, [*consts, *carry, *xs], eqn, walk, place)
        after = [a or b for a, b in zip(carry, outs, strict=False)]
        if after == carry:
            walk.join(inner)
            return [*carry, *outs[len(carry) :]]
        carry = after


def _scan(eqn: Any, flags: list[bool], walk: Walk, place: Place) -> list[bool] | None:
    spec = control.read_scan(eqn.params)
    if spec is None:
        return None
    a, b = spec.consts, spec.consts + spec.carry
    body, _ = control.open_jaxpr(spec.body)
    return _loop(eqn, body, (flags[:a], flags[a:b], flags[b:]), walk, place)


def _while(eqn: Any, flags: list[bool], walk: Walk, place: Place) -> list[bool] | None:
    spec = control.read_while(eqn.params)
    if spec is None:
        return None
    a, b = spec.cond_consts, spec.cond_consts + spec.body_consts
    body, _ = control.open_jaxpr(spec.body)
    return _loop(eqn, body, (flags[a:b], flags[b:], ()), walk, place)


def _cond(eqn: Any, flags: list[bool], walk: Walk, place: Place) -> list[bool]:
    runs = [_run(program, flags[1:], eqn, walk, place) for program in programs(eqn)]
    for _, inner in runs:
        walk.join(inner)
    return [flags[0] or any(outs) for outs in zip(*(outs for outs, _ in runs), strict=True)]


def _checkpoint(eqn: Any, flags: list[bool], walk: Walk, place: Place) -> list[bool]:
    outs, inner = _run(programs(eqn)[0], flags, eqn, walk, place)
    walk.join(inner)
    return outs


_RULES = {"scan": _scan, "while": _while, "cond": _cond}
_PROGRAMS: dict[str, Callable[[Any, list[bool], Walk, Place], list[bool] | None]] = {
    name: _RULES.get(name, _checkpoint) for name in control.RULES if name not in INLINE
}


# --- between the two products: each axis is followed ---

_ELEMENTWISE = frozenset(
    "abs add clamp convert_element_type copy copy_p div erf exp exp2 expm1 integer_pow log log1p "
    "logistic max min mul name neg pow reduce_precision reshard rsqrt select_n "
    "sharding_constraint sqrt square stop_gradient sub tanh".split()
)


def _followed(eqn: Any, facts: Sequence[Fact]) -> Fact | None:
    """The fact of an equation's first result, where operands are made of a product."""
    name = eqn.primitive.name
    if name in _ELEMENTWISE:
        fact = _met(facts)
        return fact._replace(exped=True) if fact and name in ("exp", "exp2") else fact
    fact = facts[0]
    if fact.product is None:
        return None
    if name == "reduce_sum" and fact.axes is not None and fact.exped:
        labels = (label for axis in eqn.params["axes"] for label in fact.axes[axis])
        return Fact(True, fact.product, None, True, frozenset(labels))
    if name not in _MOVES:
        return None
    if fact.axes is None:
        return fact
    axes = _MOVES[name](eqn.params, fact.axes, eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape)
    return axes and fact._replace(axes=axes)


def _met(facts: Sequence[Fact]) -> Fact | None:
    """Values of one shape meet: those of one product go on, divided by its sum if that is there."""
    made = [fact for fact in facts if fact.product]
    if len({fact.product.place for fact in made if fact.product}) > 1:
        return None
    whole = [fact for fact in made if fact.axes is not None]
    if len({fact.axes for fact in whole}) > 1:
        return None
    exped = any(fact.exped for fact in whole or made)
    summed = frozenset().union(*(fact.summed for fact in made))
    return (whole or made)[0]._replace(exped=exped, summed=summed)


def _broadcast(params: Any, axes: Any, old: Any, new: Any) -> Any:
    source = {int(out): i for i, out in enumerate(params["broadcast_dimensions"])}
    kept = {out: i for out, i in source.items() if old[i] == new[out]}
    return tuple(axes[kept[out]] if out in kept else () for out in range(len(new)))


def _reshape(params: Any, axes: Any, old: Any, new: Any) -> Any:
    """Equal sizes at the end and at the start stay; what is between merges, or is lost."""
    if params.get("dimensions") is not None:
        return None
    end = _common(old[::-1], new[::-1], min(len(old), len(new)))
    start = _common(old, new, min(len(old), len(new)) - end)
    middle, count = axes[start : len(old) - end], len(new) - start - end
    merged = (sum(middle, ()),) if count == 1 else ((),) * count
    return (*axes[:start], *merged, *axes[len(old) - end :])


def _common(first: Sequence[int], second: Sequence[int], most: int) -> int:
    return next((i for i in range(most) if first[i] != second[i]), most)


def _cut(params: Any, axes: Any, old: Any, new: Any) -> Any:
    """A slice from the start; it takes away again what a `concatenate` added at the end."""
    unit = [1] * len(old)
    same = not any(params["start_indices"]) and list(params["strides"] or unit) == unit
    return axes if same else None


_MOVES: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "transpose": lambda params, axes, old, new: tuple(axes[i] for i in params["permutation"]),
    "squeeze": lambda params, axes, old, new: tuple(
        labels for i, labels in enumerate(axes) if i not in params["dimensions"]
    ),
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "slice": _cut,
    "split": lambda params, axes, old, new: axes,
    "concatenate": lambda params, axes, old, new: axes,
}


# --- the products ---


def _product(eqn: Any, facts: Sequence[Fact], walk: Walk, place: Place) -> Fact:
    """A product ends the attention that one operand is the weights of, or may begin one."""
    for side, fact in enumerate(facts):
        product = fact.product
        if product and product.place not in walk.found:
            attention = _ended(product, fact, side, eqn)
            if attention:
                walk.add(product.place, place, attention, product.path)
                return Fact(True)
    if not all(fact.active for fact in facts):
        return Fact(any(fact.active for fact in facts))
    axes = tuple((axis,) for axis in range(eqn.outvars[0].aval.ndim))
    return Fact(True, Product(place, eqn, walk.open[-1] if walk.open else ""), axes)


def _ended(product: Product, fact: Fact, side: int, eqn: Any) -> Attention | None:
    """The attention of `product` and `eqn`, which contracts a softmax, its operand `side`."""
    contract = eqn.params["dimension_numbers"][0][side]
    if fact.axes is None or not fact.exped or len(contract) != 1:
        return None
    label = fact.axes[contract[0]]
    softmax = len(label) == 1 and label[0] in fact.summed
    return match(product.eqn, eqn, side, fact.axes) if softmax else None
