"""Programs inside programs: the only place that knows how JAX encodes higher-order primitives.

Each rule re-emits one primitive through the public function of its name, with structured weights
let into the body. A rule returns None where it does not know the encoding (another JAX version, a
new parameter); the weight is then materialized in front of the primitive, which is always right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core as jex

from jaxpeft.core.structured import Structured, restack, unstack

Values = list[Any]


class Handed(NamedTuple):
    """What boundaries hand to others: values that methods read elsewhere, and methods' states."""

    seen: dict[str, Any]
    states: dict[str, Any]


class Inner(NamedTuple):
    """How to evaluate a program inside.

    `run(jaxpr, consts, args, taps, handed)` evaluates it with the methods `taps` at work in it, and
    puts into `handed` what their boundaries hand to other methods. `taps` are those around it, and
    `handed` takes what was handed on in it.
    """

    run: Callable[[Any, Sequence[Any], Sequence[Any], Any, Handed], Values]
    taps: dict[str, Any]
    handed: Handed

    def __call__(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> Values:
        return self.run(jaxpr, consts, args, self.taps, self.handed)

    def apart(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], taps: Any, states: Any
    ) -> tuple[Values, dict[str, Any], dict[str, Any]]:
        """The outputs, what was seen, and the states: for a body that JAX traces on its own."""
        handed = Handed({}, dict(states))
        return self.run(jaxpr, consts, args, taps, handed), handed.seen, handed.states

    @property
    def states(self) -> dict[str, Any]:
        """The states that methods inside take up, as they are in front of it."""
        inside = {name for tap in self.taps.values() for name in tap.states}
        return {name: v for name, v in self.handed.states.items() if name in inside}

    def hand_on(self, seen: dict[str, Any], states: dict[str, Any]) -> None:
        """Takes what a body has handed out."""
        self.handed.seen.update(seen)
        self.handed.states.update(states)


class Scan(NamedTuple):
    body: Any
    consts: int
    carry: int
    length: int
    reverse: bool
    unroll: Any


class While(NamedTuple):
    cond: Any
    cond_consts: int
    body: Any
    body_consts: int


def open_jaxpr(closed: Any) -> tuple[Any, Sequence[Any]]:
    """The jaxpr and its constants, of a closed jaxpr or of a plain one."""
    return getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())


def read_scan(params: dict[str, Any]) -> Scan | None:
    """The parts of a scan, as JAX 0.10 gives them and as 0.11 does.

    The older one counts constants and carries; the newer has trees of the inputs and outputs.
    """
    common = {"jaxpr", "length", "reverse", "unroll"}
    extra = set(params) - common - {"linear", "_split_transpose"}
    if extra == {"num_consts", "num_carry"}:
        counts = params["num_consts"], params["num_carry"]
    elif extra == {"ft_in", "ft_out"}:
        consts, carry, _ = params["ft_in"].unpack()
        counts = len(consts), len(carry)
    else:
        return None
    if not common <= set(params):
        return None
    return Scan(params["jaxpr"], *counts, *(params[n] for n in ("length", "reverse", "unroll")))


def read_while(params: dict[str, Any]) -> While | None:
    names = ("cond_jaxpr", "cond_nconsts", "body_jaxpr", "body_nconsts")
    return While(*(params[name] for name in names)) if set(params) == set(names) else None


def read_call(params: dict[str, Any]) -> Any | None:
    """The one program of a call-like primitive (`jit`, `closed_call`, `remat`)."""
    return params.get("jaxpr", params.get("call_jaxpr"))


def invariant(body: Any, first: int, count: int) -> list[bool]:
    """For each of `count` loop carries, whether the body hands it on as it came."""
    return [body.outvars[i] is body.invars[first + i] for i in range(count)]


def inline(eqn: Any, values: Values, inner: Inner) -> Values | None:
    program = read_call(eqn.params)
    return None if program is None else inner(*open_jaxpr(program), values)


def checkpoint(eqn: Any, values: Values, inner: Inner) -> Values | None:
    if not {"jaxpr", "prevent_cse", "policy"} <= set(eqn.params):
        return None
    if eqn.params["policy"] is jax.checkpoint_policies.everything_saveable:
        # The same without it, and then products with packed weights have policies of their own.
        return inline(eqn, values, inner)
    jaxpr, consts = open_jaxpr(eqn.params["jaxpr"])
    again = jax.checkpoint(
        lambda args, states: inner.apart(jaxpr, consts, args, inner.taps, states),
        prevent_cse=eqn.params["prevent_cse"],
        policy=eqn.params["policy"],
    )
    outs, seen, states = again(values, inner.states)
    inner.hand_on(seen, states)
    return outs


def cond(eqn: Any, values: Values, inner: Inner) -> Values | None:
    if "branches" not in eqn.params or isinstance(values[0], Structured):
        return None
    index, *operands = values

    def branch(closed: Any) -> Callable[[Values, Any], tuple[Values, Any]]:
        jaxpr, consts = open_jaxpr(closed)

        def run(args: Values, states: Any) -> tuple[Values, Any]:
            outs, _, after = inner.apart(jaxpr, consts, args, inner.taps, states)
            return _dense(outs), _same(after, states)

        return run

    branches = [branch(closed) for closed in eqn.params["branches"]]
    outs, states = lax.switch(index, branches, operands, inner.states)
    inner.hand_on({}, states)
    return outs


def scan(eqn: Any, values: Values, inner: Inner) -> Values | None:
    spec = read_scan(eqn.params)
    if spec is None:
        return None
    jaxpr, jaxpr_consts = open_jaxpr(spec.body)
    consts, init, xs = _cut(values, spec.consts, spec.carry)
    fixed = _fixed(init, invariant(jaxpr, spec.consts, spec.carry))
    stacks = [unstack(x) for x in xs]
    if fixed is None or any(stack is None for stack in stacks):
        return None
    layers, rebuild = _transposed(stacks)
    stacked = {name: tap.stacked for name, tap in inner.taps.items() if tap.stack}

    def body(before: tuple[Values, Any], xs: tuple[Values, Any]) -> tuple[Any, Any]:
        (carry, states), (slices, taps) = before, xs
        here = inner.taps | {name: inner.taps[name].layer(part) for name, part in taps.items()}
        weights = [build(part) for build, part in zip(rebuild, slices, strict=True)]
        args = [*consts, *_fill(fixed, carry), *weights]
        outs, seen, after = inner.apart(jaxpr, jaxpr_consts, args, here, states)
        carry_out, ys = outs[: spec.carry], outs[spec.carry :]
        ys = [y if _stacks(y) else _dense([y])[0] for y in ys]
        return (_changing(carry_out, fixed), _same(after, states)), (ys, seen)

    start, over = (_changing(init, fixed), inner.states), (layers, stacked)
    (end, states), (ys, seen) = lax.scan(body, start, over, spec.length, spec.reverse, spec.unroll)
    inner.hand_on(seen, states)
    return [*_fill(fixed, end), *(restack(y) for y in ys)]


def while_loop(eqn: Any, values: Values, inner: Inner) -> Values | None:
    spec = read_while(eqn.params)
    if spec is None:
        return None
    test_consts, body_consts, init = _cut(values, spec.cond_consts, spec.body_consts)
    test, test_closed = open_jaxpr(spec.cond)
    body, body_closed = open_jaxpr(spec.body)
    fixed = _fixed(init, invariant(body, spec.body_consts, len(init)))
    if fixed is None:
        return None

    def step(before: tuple[Values, Any]) -> tuple[Values, Any]:
        args = [*body_consts, *_fill(fixed, before[0])]
        outs, _, after = inner.apart(body, body_closed, args, inner.taps, before[1])
        return _changing(outs, fixed), _same(after, before[1])

    def go_on(before: tuple[Values, Any]) -> Any:
        args = [*test_consts, *_fill(fixed, before[0])]
        return inner.apart(test, test_closed, args, inner.taps, before[1])[0][0]

    end, states = lax.while_loop(go_on, step, (_changing(init, fixed), inner.states))
    inner.hand_on({}, states)
    return _fill(fixed, end)


def _cut(values: Values, first: int, second: int) -> tuple[Values, Values, Values]:
    return values[:first], values[first : first + second], values[first + second :]


def _transposed(pairs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _fixed(init: Values, handed_on: list[bool]) -> Values | None:
    """Carried weights that the loop never changes (None elsewhere); None if it changes one."""
    weights = [value if isinstance(value, Structured) else None for value in init]
    if any(w is not None and not same for w, same in zip(weights, handed_on, strict=True)):
        return None
    return weights


def _fill(fixed: Values, changing: Values) -> Values:
    rest = iter(changing)
    return [next(rest) if weight is None else weight for weight in fixed]


def _same(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The states that went into a body; one that began in it ends with it."""
    return {name: after[name] for name in before}


def _changing(carried: Values, fixed: Values) -> Values:
    """What a loop carries but for the weights that it never changes."""
    return [value for value, weight in zip(carried, fixed, strict=True) if weight is None]


def _stacks(value: Any) -> bool:
    """Whether a stack of such values can be told apart again: arrays, and weights that restack."""
    return not isinstance(value, Structured) or value.stackable


def _dense(values: Values) -> Values:
    return [v.materialize() if isinstance(v, Structured) else v for v in values]


RULES: dict[str, Callable[[Any, Values, Inner], Values | None]] = {
    "jit": inline,
    "pjit": inline,
    "closed_call": inline,
    "core_call": inline,
    "call": inline,
    "remat": checkpoint,
    "remat2": checkpoint,
    "checkpoint": checkpoint,
    "cond": cond,
    "scan": scan,
    "while": while_loop,
}

Literal = jex.Literal
