"""`mark_attention(fn)`: the attentions of a model that nobody prepared, marked with taps.

The program is traced, its attentions are found (`attention_find.py`), and it is evaluated again
with a tap on the operands and the result of each one's products. All else runs as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxpeft.core import control, lift
from jaxpeft.core.attention_axes import Attention
from jaxpeft.core.attention_find import Place, find, programs
from jaxpeft.core.frame import frame
from jaxpeft.core.report import refuse
from jaxpeft.core.tap import tap

Values = list[Any]


def mark_attention(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, with marks in every softmax attention, where methods may read and change it.

    For `softmax(q k^T + bias) v` in the Flax module at `path` (outside of any, `path` is empty):

    - "path:query", "path:context": `(batch..., T, N, H)`, the operand `q` as it enters its product,
      scaled if the model scales it before; the result per head, with the source `query`.
    - "path:key", "path:value": `(batch..., S, K, H)`; all of a cache.

    A second attention in one call of a module has "path:key_1" and so on. An attention is known by
    its two products and the softmax between them, in any layout, inside `jit`, `scan`, `while`,
    `cond` and `checkpoint` too. Both `q` and `k` must depend on the inputs. Kernels, custom
    derivatives and softmaxes that are divided after the second product are left alone, and so are
    modules that have such marks of their own.

    Args:
        fn: a pure function of `(params, *inputs, **kwargs)`, tapped if it has modules.

    Returns:
        A function of the same signature and with the same results.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxpeft.core.tap import boundaries
        >>> def model(params, x):
        ...     q, k, v = (x @ w for w in params)
        ...     return jax.nn.softmax(q @ k.T) @ v
        >>> program = jax.make_jaxpr(mark_attention(model))(jnp.ones((3, 4, 4)), jnp.ones((5, 4)))
        >>> [(mark.name, mark.shape) for mark in boundaries(program)]
        [(':query', (5, 1, 4)), (':key', (5, 1, 4)), (':value', (5, 1, 4)), (':context', (5, 1, 4))]
    """
    return _Marked(fn)


@dataclasses.dataclass(frozen=True)
class _Marked:
    """Equal for equal functions, so that a program compiled for one is found again."""

    fn: Callable[..., Any]

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        weights, outer = frame(params)
        inputs, inner = frame((args, kwargs))
        jaxpr, consts, tree = lift.trace(self.fn, outer, inner, weights, inputs)
        found = find(jaxpr, len(weights))
        outs = _Evaluation(found).run(jaxpr, consts, [*weights, *inputs], ())
        return jax.tree.unflatten(tree, outs)


class _Evaluation:
    """Runs a program with marks at the products that were found."""

    def __init__(self, found: dict[Place, Attention]):
        self.found = found
        self.around = {place[:depth] for place in found for depth in range(1, len(place) + 1)}
        self.queries: dict[Place, jax.Array] = {}

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], place: Place) -> Values:
        scope = lift.Scope(refuse)
        scope.env.update(zip(jaxpr.constvars, consts, strict=True))
        scope.env.update(zip(jaxpr.invars, args, strict=True))
        waiting: list[Any] = []
        for i, eqn in enumerate(jaxpr.eqns):
            if (*place, i) not in self.around:
                waiting.append(eqn)
                continue
            lift._run_together(waiting, scope)
            waiting.clear()
            outs = self.step(eqn, [scope.read(atom) for atom in eqn.invars], (*place, i))
            scope.env.update(zip(eqn.outvars, outs, strict=True))
        lift._run_together(waiting, scope)
        return [scope.read(atom) for atom in jaxpr.outvars]

    def step(self, eqn: Any, values: Values, place: Place) -> Values:
        attention = self.found.get(place)
        if attention is None:
            return self.inside(eqn, values, place)
        if place == attention.place:
            return self.first(eqn, values, attention)
        return self.second(eqn, values, attention)

    def inside(self, eqn: Any, values: Values, place: Place) -> Values:
        """A primitive that holds an attention; as it is, if its encoding is not known."""
        index = {id(program): i for i, program in enumerate(programs(eqn))}

        def run(jaxpr: Any, consts: Any, args: Any, *_: Any) -> Values:
            return self.run(jaxpr, consts, args, (*place, index[id(jaxpr)]))

        outs = control.RULES[eqn.primitive.name](
            eqn, values, control.Inner(run, {}, control.Handed({}, {}))
        )
        return lift.run(eqn, values) if outs is None else outs

    def first(self, eqn: Any, values: Values, attention: Attention) -> Values:
        at = attention.key
        query, key = values[1 - at], values[at]
        query, self.queries[attention.place] = _mark(query, "query", attention)
        key, _ = _mark(key, "key", attention)
        return [eqn.primitive.bind(*((key, query) if at == 0 else (query, key)), **eqn.params)]

    def second(self, eqn: Any, values: Values, attention: Attention) -> Values:
        at = attention.value
        values[at], _ = _mark(values[at], "value", attention)
        context = eqn.primitive.bind(*values, **eqn.params)
        query = self.queries.pop(attention.place)
        return [_mark(context, "context", attention, query=query)[0]]


def _mark(
    x: jax.Array, kind: str, attention: Attention, **sources: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """An array of an attention, tapped; as it stands in the program, and as the tap has it."""
    order = attention.orders[kind]
    marked = tap(order.arrange(x), attention.names[kind], **sources)
    return order.restore(marked, x.shape), marked
