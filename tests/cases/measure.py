"""Runs one method on one case, once, for all of the laws: two compiled programs a pair."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft as jp
from tests.cases.case import Built, Case, normal

RATE = 0.1


@dataclasses.dataclass(frozen=True)
class Setting:
    """A method on a case, before anything is compiled."""

    case: Case
    built: Built
    tuned: jp.Tuned
    shapes: Any

    def apply(self, adapter: Any, params: Any, inputs: Any) -> Any:
        return self.tuned.apply(adapter, params, *inputs, **self.built.kwargs)

    def merged(self, adapter: Any, params: Any, inputs: Any) -> Any:
        return self.base(self.tuned.merge(adapter, params), inputs)

    def base(self, params: Any, inputs: Any) -> Any:
        return self.tuned.fn(params, *inputs, **self.built.kwargs)

    def init(self, params: Any, inputs: Any) -> Any:
        return self.tuned.init(jax.random.key(0), params, *inputs, **self.built.kwargs)

    def derivative(self, f: Callable[..., Any], adapter: Any, params: Any, inputs: Any) -> Any:
        """The gradient of a loss of `f`; along one direction where there is no reverse mode."""

        def of_adapter(adapter: Any) -> Any:
            return loss(f(adapter, params, inputs))

        if self.case.reverse:
            return jax.grad(of_adapter)(adapter)
        return jax.jvp(of_adapter, (adapter,), (jax.tree.map(jnp.cos, adapter),))[1]


@functools.cache
def build(case: Case) -> Built:
    return case.build()


@functools.cache
def setting(case: Case, tuning: Callable[[], Any]) -> Setting:
    """With `strict=True` wherever the case is said to be fast: a dense weight is an error."""
    built = build(case)
    tuned = jp.transform(built.model, tuning(), strict=case.fast)
    init = functools.partial(tuned.init, **built.kwargs)
    shapes = jax.eval_shape(init, jax.random.key(0), built.params, *built.inputs)
    return Setting(case, built, tuned, shapes)


def loss(outputs: Any) -> jax.Array:
    """A number that depends on every floating-point output, and not linearly."""
    floats = [y for y in jax.tree.leaves(outputs) if jnp.issubdtype(y.dtype, jnp.floating)]
    return sum(jnp.sum(jnp.sin(y.astype(jnp.float32) + 0.3)) for y in floats)


def noise(shapes: Any) -> Any:
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten([0.3 * normal(90 + i, *leaf.shape) for i, leaf in enumerate(leaves)])


def quiet(case: Case) -> Any:
    """Lets warnings of dense weights pass where the case says that there are some."""
    guard = warnings.catch_warnings()
    return guard if case.fast else _ignoring(guard)


@contextlib.contextmanager
def _ignoring(guard: Any) -> Any:
    with guard:
        warnings.simplefilter("ignore", jp.MaterializeWarning)
        yield


@functools.cache
def values(case: Case, tuning: Callable[[], Any]) -> dict[str, Any]:
    """Everything that the laws compare, from one program."""
    here = setting(case, tuning)

    @jax.jit
    def program(params: Any, inputs: Any, change: Any) -> dict[str, Any]:
        fresh = here.init(params, inputs)
        adapter = jax.tree.map(jnp.add, fresh, change)
        both = jax.tree.map(lambda *leaves: jnp.stack(leaves), fresh, adapter)
        args = adapter, params, inputs
        mapped = jax.vmap(lambda adapter: here.apply(adapter, params, inputs))
        return {
            "fresh": fresh,
            "adapter": adapter,
            "base": here.base(params, inputs),
            "unchanged": here.apply(fresh, params, inputs),
            "applied": here.apply(*args),
            "merged": here.merged(*args),
            "merged params": here.tuned.merge(adapter, params),
            "gradient": here.derivative(here.apply, *args),
            "merged gradient": here.derivative(here.merged, *args),
            "mapped": mapped(both) if case.mapped else None,
        }

    with quiet(case):
        return program(here.built.params, here.built.inputs, noise(here.shapes))


def step(f: Callable[..., Any]) -> Callable[..., Any]:
    """One step of gradient descent."""

    def descend(adapter: Any, params: Any, inputs: Any) -> tuple[Any, Any]:
        value, slope = jax.value_and_grad(lambda a: loss(f(a, params, inputs)))(adapter)
        return jax.tree.map(lambda a, g: a - RATE * g, adapter, slope), value

    return descend


@functools.cache
def compiled_step(case: Case, tuning: Callable[[], Any], through: str = "apply") -> Any:
    """The compiled step of the adapter, on the product path or through the merged weights."""
    here = setting(case, tuning)
    with quiet(case):
        lowered = jax.jit(step(getattr(here, through))).lower(
            here.shapes, here.built.params, here.built.inputs
        )
    return lowered.compile()


@functools.cache
def compiled_base(case: Case) -> Any:
    """A step of the model's own inputs: what it makes of its weights there is no work of ours.

    Loops keep the layers that they have picked out of a stack for the way back, for instance.
    """
    built = build(case)
    fn = functools.partial(jp.transform(built.model, jp.full()).fn, **built.kwargs)
    numbers = [i for i, x in enumerate(built.inputs) if jnp.issubdtype(x.dtype, jnp.floating)]

    def of_inputs(floats: Any, params: Any, inputs: Any) -> Any:
        given = dict(zip(numbers, floats, strict=True))
        return loss(fn(params, *(given.get(i, x) for i, x in enumerate(inputs))))

    floats = [built.inputs[i] for i in numbers]
    step = jax.jit(jax.value_and_grad(of_inputs))
    return step.lower(floats, built.params, built.inputs).compile()


def difference(got: Any, want: Any) -> float:
    """The largest error over all float leaves, relative to the largest number in them."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    got, want = (_numbers(tree) for tree in (got, want))
    return float(np.abs(got - want).max() / np.abs(want).max())


def _numbers(tree: Any) -> Any:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in floats])
