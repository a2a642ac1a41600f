"""`capture(fn, where)`: the activations at a model's call boundaries, instead of its outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxpeft.core.frame import frame
from jaxpeft.core.lift import Scope, evaluate, trace
from jaxpeft.core.report import warn
from jaxpeft.core.rules import Where, compile_pattern, unmatched
from jaxpeft.core.tap import Tap, boundaries


def capture(fn: Callable[..., Any], where: Where) -> Callable[..., dict[str, jax.Array]]:
    """A function that computes what a tapped function has at some of its call boundaries.

    Under `jit` nothing is computed that they do not need, the output head for instance.

    Args:
        fn: a function of `(params, *inputs, **kwargs)` with taps, such as `tuned.fn` of a tuning
            that works at boundaries.
        where: a glob over the names of boundaries, "**/mlp:out", or a predicate `(name, None)`.

    Returns:
        A function of the same signature that gives activations by name, stacked over the layers of
        the scans around them.

    Raises:
        ValueError: from its call, if no boundary matches, or one is where values cannot leave.

    Example:
        >>> import jaxpeft as jp, jax.numpy as jnp
        >>> def model(params, x):
        ...     return jax.lax.scan(lambda x, w: (jp.tap(x @ w, "w:out"), None), x, params)[0]
        >>> found = capture(model, "w:out")(jnp.ones((3, 4, 4)), jnp.ones((2, 4)))
        >>> {name: x.shape for name, x in found.items()}
        {'w:out': (3, 2, 4)}
    """
    matches = compile_pattern(where)

    def captured(params: Any, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
        weights, outer = frame(params)
        inputs, inner = frame((args, kwargs))
        jaxpr, consts, _ = trace(fn, outer, inner, weights, inputs)
        names = list(dict.fromkeys(boundary.name for boundary in boundaries(jaxpr)))
        found = [name for name in names if matches(name, None)]
        if not found:
            raise ValueError(unmatched(where, names, "boundaries"))
        scope = Scope(warn, {name: Tap(seen=True) for name in found})
        evaluate(jaxpr, consts, [*weights, *inputs], scope)
        lost = [name for name in found if name not in scope.handed.seen]
        if lost:
            raise ValueError(
                f"{lost[0]!r} is inside of a loop or a branch that hands nothing out but its "
                "results. Choose a boundary around it."
            )
        return {name: scope.handed.seen[name] for name in found}

    return captured
