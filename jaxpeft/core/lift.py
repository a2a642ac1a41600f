"""`lift(f)`: `f` with structured weights allowed in its params.

`f` is traced to a jaxpr with arrays in the places of the weights, and the jaxpr is evaluated again
with the weights in those places. An equation that no weight reaches runs as it is, programs inside
it included; a view of a weight is a weight; a product runs the weight's own rule; anything else
gets the dense array, which is never wrong, at worst slower, and is reported.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core as jex
from jax.extend import source_info_util

from jaxpeft.core import contract, control, views
from jaxpeft.core.frame import Frame, frame, named
from jaxpeft.core.labels import View
from jaxpeft.core.report import Materialized, Report, refuse, warn
from jaxpeft.core.sharding import vary
from jaxpeft.core.structured import Contraction, Structured, alike, apply_view, placeholder
from jaxpeft.core.tap import Tap, inside

Values = list[Any]


def lift(f: Callable[..., Any], *, strict: bool = False) -> Callable[..., Any]:
    """`f(params, *args, **kwargs)` with structured weights allowed among the leaves of `params`.

    Equal to `f` of the materialized params, under `jit`, `grad`, `vmap`, `scan` and `checkpoint`.
    Arrays among the other arguments are traced; anything else is passed through as it is.

    Args:
        f: a pure function of a params pytree and further arguments.
        strict: raise `MaterializeError` where a weight would become dense, instead of a
            `MaterializeWarning`.

    Returns:
        A function of the same signature.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxpeft.core.labels import Layout
        >>> from jaxpeft.core.einsum import Einsum
        >>> layout, (rank,) = Layout.of((4, 3)).fresh(1)
        >>> low_rank = Einsum((jnp.ones((4, 1)), jnp.ones((1, 3))), ((0, rank), (rank, 1)), layout,
        ...                   jnp.dtype("float32"))
        >>> lift(lambda params, x: x @ params["w"])({"w": low_rank}, jnp.ones((1, 4))).tolist()
        [[4.0, 4.0, 4.0]]
    """

    @functools.wraps(f)
    def lifted(params: Any, *args: Any, **kwargs: Any) -> Any:
        return call(f, params, args, kwargs, refuse if strict else warn)

    return lifted


def call(
    f: Callable[..., Any],
    params: Any,
    args: Any,
    kwargs: Any,
    report: Report,
    taps: dict[str, Tap] | None = None,
    frozen: Any = None,
    whole: bool = True,
) -> Any:
    """`f(params, *args, **kwargs)` where some leaves of `params` are structured weights.

    `taps` are methods by the name of the call boundary that they work at. A weight that the call
    hands back as it came is given as it stands in `frozen`, a tree like `params`. A `whole` call
    must meet all taps. Outside of any trace the evaluation is compiled, and the program is kept
    for the next call.
    """
    weights, outer = frame(named(params))
    inputs, inner = frame((args, kwargs))
    before = weights if frozen is None else frame(frozen)[0]
    static, arrays = (f, outer, inner, report, whole), (weights, inputs, taps or {}, before)
    return (_compiled if _is_eager(arrays, static) else _interpreted)(*static, *arrays)


def _is_eager(arrays: Any, static: Any) -> bool:
    try:
        hash(static)
    except TypeError:
        return False
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arrays))


def _interpreted(
    f: Callable[..., Any],
    outer: Frame,
    inner: Frame,
    report: Report,
    whole: bool,
    weights: Values,
    inputs: Values,
    taps: dict[str, Tap],
    before: Values,
) -> Any:
    weights = [alike(weight) for weight in weights]
    jaxpr, consts, out_tree = trace(f, outer, inner, weights, inputs)
    reached: set[str] = set()
    outs = evaluate(jaxpr, consts, [*weights, *inputs], Scope(report, taps, reached))
    _check_reached(set(taps) - reached if whole else set())
    handed_back = {id(weight): i for i, weight in enumerate(weights)}
    outs = [before[handed_back[id(v)]] if id(v) in handed_back else v for v in outs]
    outs = [v.materialize() if isinstance(v, Structured) else v for v in outs]
    return jax.tree.unflatten(out_tree, outs)


def _check_reached(missing: set[str]) -> None:
    if missing:
        raise ValueError(
            f"the adapter works at {sorted(missing)[0]!r}, which this call of the model never "
            "reaches. Call the model the way `init` did, or drop the rule that matches it."
        )


_compiled = jax.jit(_interpreted, static_argnums=(0, 1, 2, 3, 4))


def trace(
    f: Callable[..., Any], outer: Frame, inner: Frame, weights: Values, inputs: Values
) -> tuple[Any, Sequence[Any], Any]:
    """The jaxpr of the call with arrays in place of weights, its constants, its output's tree."""

    def flat(weights: Values, inputs: Values) -> Any:
        args, kwargs = inner.fill(inputs)
        return f(outer.fill(weights), *args, **kwargs)

    shapes = [placeholder(weight) for weight in weights]
    closed, out = jax.make_jaxpr(flat, return_shape=True)(shapes, inputs)
    jaxpr, consts = control.open_jaxpr(closed)
    return jaxpr, consts, jax.tree.structure(out)


@dataclasses.dataclass
class Scope:
    """What is known while one program is evaluated.

    Attributes:
        report: told of each weight that becomes dense.
        taps: methods at work at call boundaries, by name; of a stack inside a scan, one layer's.
        reached: collects the names of the boundaries that were met.
        handed: collects what boundaries hand to methods at other ones.
        source: the line that the program was called from, for equations without one.
        env: the program's values so far.
        broadcasts: the equations that broadcast a value, by result.
        memo: results that several weights share.
    """

    report: Report
    taps: dict[str, Tap] = dataclasses.field(default_factory=dict)
    reached: set[str] = dataclasses.field(default_factory=set)
    handed: control.Handed = dataclasses.field(default_factory=lambda: control.Handed({}, {}))
    source: str = ""
    env: dict[Any, Any] = dataclasses.field(default_factory=dict)
    broadcasts: dict[Any, Any] = dataclasses.field(default_factory=dict)
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def inner(self, eqn: Any) -> control.Inner:
        """How the programs that an equation holds are evaluated, and the methods at work there."""
        held = {boundary.name for boundary in inside(eqn)} if self.taps else set()

        def run_inside(
            jaxpr: Any, consts: Any, args: Any, taps: dict[str, Tap], handed: control.Handed
        ) -> Values:
            source = _source(eqn) or self.source
            scope = Scope(self.report, taps, self.reached, handed, source)
            return evaluate(jaxpr, consts, args, scope)

        taps = {name: tap for name, tap in self.taps.items() if name in held}
        return control.Inner(run_inside, taps, self.handed)

    def read(self, atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else self.env[atom]

    def meets_weight(self, eqn: Any) -> bool:
        return any(
            not isinstance(atom, jex.Literal) and isinstance(self.env.get(atom), Structured)
            for atom in eqn.invars
        )

    def once(self, atoms: Sequence[Any], name: Any, f: Callable[[], Any]) -> Any:
        key = (*atoms, name)
        if key not in self.memo:
            self.memo[key] = f()
        return self.memo[key]

    def factor(self, atom: Any) -> Any:
        """A scale before it was broadcast, and the axes it lies along; None if it is no such."""
        value = self.read(atom)
        if np.ndim(value) == 0 and not isinstance(value, Structured):
            return value, ()
        eqn = self.broadcasts.get(atom)
        source = eqn and self.read(eqn.invars[0])
        if eqn is None or isinstance(source, Structured):
            return None
        return source, tuple(eqn.params["broadcast_dimensions"])


def evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], scope: Scope) -> Values:
    """The outputs of `jaxpr`, where some of `args` are structured weights.

    Equations that no weight reaches wait, and run together when a result of theirs is needed.
    """
    scope.env.update(zip(jaxpr.constvars, consts, strict=True))
    scope.env.update(zip(jaxpr.invars, args, strict=True))
    waiting: list[Any] = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "broadcast_in_dim" and len(eqn.invars) == 1:
            scope.broadcasts[eqn.outvars[0]] = eqn
        if not (scope.meets_weight(eqn) or _tapped(eqn, scope)):
            waiting.append(eqn)
            continue
        _run_together(waiting, scope)
        waiting.clear()
        outs = _touched(eqn, [scope.read(atom) for atom in eqn.invars], scope)
        scope.env.update(zip(eqn.outvars, outs, strict=True))
    _run_together(waiting, scope)
    return [scope.read(atom) for atom in jaxpr.outvars]


_DEBUG = jex.DebugInfo("jaxpeft", "equations", (), ())


def _run_together(eqns: Sequence[Any], scope: Scope) -> None:
    """Equations on arrays, as one program: no knowledge of their primitives is needed."""
    if not eqns:
        return
    outvars = [v for eqn in eqns for v in eqn.outvars if not isinstance(v, jex.DropVar)]
    made = set(outvars)
    inputs = dict.fromkeys(
        atom
        for eqn in eqns
        for atom in eqn.invars
        if not isinstance(atom, jex.Literal) and atom not in made
    )
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    jaxpr = jex.Jaxpr((), list(inputs), outvars, list(eqns), effects, debug_info=_DEBUG)
    results = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))(*map(scope.read, inputs))
    scope.env.update(zip(outvars, results, strict=True))


def run(eqn: Any, values: Sequence[Any]) -> Values:
    """One equation, with these values in the places of its operands."""
    bound = {
        atom: value
        for atom, value in zip(eqn.invars, values, strict=True)
        if not isinstance(atom, jex.Literal)
    }
    scope = Scope(refuse, env=bound)
    _run_together([eqn], scope)
    return [scope.env.get(var) for var in eqn.outvars]


def _touched(eqn: Any, values: Values, scope: Scope) -> Values:
    """One equation that at least one structured weight reaches."""
    name = eqn.primitive.name
    if name == "tap":
        return [_at_tap(eqn, values, scope)]
    if name in control.RULES:
        outs = control.RULES[name](eqn, values, scope.inner(eqn))
    elif name in _LEAFWISE:
        outs = _LEAFWISE[name](values, eqn.params)
    else:
        weights = any(isinstance(value, Structured) for value in values)
        outs = _at_weight(eqn, values, scope) if weights else None
    if outs is None:
        _check_open(eqn, scope)
        return run(eqn, [_dense(eqn, value, scope) for value in values])
    return outs


def _tapped(eqn: Any, scope: Scope) -> bool:
    """Whether a method works at this equation or in a program that it holds."""
    if not scope.taps:
        return False
    if eqn.primitive.name == "tap":
        return eqn.params["name"] in scope.taps
    return any(boundary.name in scope.taps for boundary in inside(eqn))


def _at_tap(eqn: Any, values: Values, scope: Scope) -> Any:
    name = eqn.params["name"]
    if name not in scope.taps:
        return values[0]
    tap = scope.taps[name]
    scope.reached.add(name)
    seen, states = scope.handed
    unseen = [path for path in tap.reads if path not in seen]
    if unseen:
        raise ValueError(
            f"the method at {name!r} reads {unseen[0]!r}, which has not been computed there. "
            "A method reads boundaries that come before its own, outside of loops around both."
        )
    value, *others = (_dense(eqn, value, scope) for value in values)
    sources = dict(zip(eqn.params["sources"], others, strict=True))
    result, changed = tap(value, sources | {path: seen[path] for path in tap.reads}, states)
    states.update(changed)
    if tap.seen:
        seen[name] = result
    return result


def _check_open(eqn: Any, scope: Scope) -> None:
    """A method cannot work inside a program that is run as it is."""
    closed = [boundary.name for boundary in inside(eqn) if boundary.name in scope.taps]
    if closed:
        raise ValueError(
            f"the adapter works at {closed[0]!r}, which is inside `{eqn.primitive.name}`, where "
            "nothing can be changed. Choose a boundary around it."
        )


def _dense(eqn: Any, value: Any, scope: Scope) -> Any:
    if not isinstance(value, Structured):
        return value
    source = _source(eqn) or scope.source
    scope.report(Materialized(value.name, eqn.primitive.name, source))
    return value.materialize()


def _source(eqn: Any) -> str:
    """File and line of an equation; nothing for one that only JAX's own code is behind."""
    line = source_info_util.summarize(eqn.source_info)
    return line if ":" in line else ""


def _at_weight(eqn: Any, values: Values, scope: Scope) -> Values | None:
    """A view of the first weight among the operands, or a product with it."""
    side = next(i for i, value in enumerate(values) if isinstance(value, Structured))
    weight = values[side]
    values = [v if i == side else _dense(eqn, v, scope) for i, v in enumerate(values)]
    others = values[:side] + values[side + 1 :]
    atoms = [atom for i, atom in enumerate(eqn.invars) if i != side]

    def bind(array: Any, *given: Any) -> Any:
        rest = given or others
        return run(eqn, [*rest[:side], array, *rest[side:]])[0]

    name = eqn.primitive.name
    if name in contract.RULES:
        (var,) = eqn.outvars
        out = jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)
        once = functools.partial(scope.once, atoms)
        op = Contraction(name, eqn.params, side, tuple(others), out, bind, once)
        result = weight.contract(op)
        return None if result is None else [result]
    if name == "split":
        parts = [apply_view(weight, view) for view in views.pieces(eqn.params, weight.shape)]
        return None if any(part is None for part in parts) else parts
    kind = _view_of(eqn, weight, side, others, [scope.factor(atom) for atom in atoms])
    result = kind and weight.view(View(kind[0], kind[1], bind))
    return None if result is None else [result]


def _view_of(
    eqn: Any, weight: Structured, side: int, others: Values, factors: Sequence[Any]
) -> Any:
    """`(kind, args)` of the view that an equation takes of a weight; None if it is none."""
    name = eqn.primitive.name
    if name == "neg":
        return "scale", (np.asarray(-1, weight.dtype), ())
    if name in ("mul", "div"):
        return _scale(name, side, factors[0])
    return views.read(name, eqn.params, weight.shape, others) if side == 0 else None


def _scale(name: str, side: int, factor: Any) -> Any:
    """`w * v` and `w / v` for a scalar `v` or one that was broadcast; `v / w` is no scaling."""
    if factor is None or (name == "div" and side == 1):
        return None
    value, dimensions = factor
    return "scale", (1 / value if name == "div" else value, dimensions)


_LEAFWISE: dict[str, Callable[[Values, Any], Values]] = {
    "stop_gradient": lambda values, _: jax.tree.map(lax.stop_gradient, values),
    "optimization_barrier": lambda values, _: lax.optimization_barrier(values),
    "pvary": lambda values, params: vary(values, params["axes"]),
}
