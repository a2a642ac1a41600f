"""The doors for Flax nnx: pure functions of the state, and a module to train in place."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxpeft.core.method import at_boundaries
from jaxpeft.core.transform import Adapter, Tuned
from jaxpeft.core.transform import transform as transform_function
from jaxpeft.flax.mark import Point, mark_call, mark_point


def nnx_function(module: nnx.Module, *, tapped: bool = False) -> Callable[..., Any]:
    """A module's call as a function of `(state, *inputs, **kwargs)`; its own arrays are not kept.

    `method` names another method, or is a function of the module; `mutable` (True or an nnx
    filter) asks for `(outputs, state)` with the state as the call left it. With `tapped`, the
    input and the output of every submodule's call are marked by its path.
    """
    return _function_of(_Graph(nnx.graphdef(module)), tapped)


@dataclasses.dataclass(frozen=True, eq=False)
class _Graph:
    """A graph as a key. Its modules may hold values without a hash: configs, most of all."""

    graphdef: Any

    def __hash__(self) -> int:
        try:
            return hash(self.graphdef)
        except TypeError:
            return len(self.graphdef.nodes)

    def __eq__(self, other: object) -> bool:
        try:
            return isinstance(other, _Graph) and bool(self.graphdef == other.graphdef)
        except ValueError:  # Arrays in a config, which have no one answer: another graph.
            return False


@functools.lru_cache(maxsize=128)
def _function_of(graph: _Graph, tapped: bool) -> Callable[..., Any]:
    """One function a graph, so that a program compiled for it is found again."""
    graphdef = graph.graphdef

    def call(
        state: Any, *inputs: Any, method: Any = None, mutable: Any = False, **kwargs: Any
    ) -> Any:
        # A copy, or a call that counts (dropout keys, batch statistics) would write into `state`.
        live = nnx.merge(graphdef, state, copy=True)
        if tapped:
            _mark_modules(live)
        run = getattr(live, method) if isinstance(method, str) else functools.partial(
            method or type(live).__call__, live
        )  # fmt: skip
        out = run(*inputs, **kwargs)
        if mutable is False:
            return out
        # Parameters are frozen: they come back as they were given, not as the adapter has them.
        nnx.update(live, nnx.filter_state(state, nnx.Param))
        return out, nnx.state(live, ... if mutable is True else mutable)

    return call


def _mark_modules(live: nnx.Module) -> None:
    """Gives every module of a functional copy a class whose call is marked with its path."""
    for path, module in list(nnx.iter_modules(live)):
        if callable(module):
            module.__class__ = _marked(type(module), "/".join(map(str, path)))


@functools.cache
def _marked(cls: type, path: str) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return mark_call(functools.partial(cls.__call__, self), path, args, kwargs)

    def point(self: Any, x: jax.Array, **sources: Any) -> jax.Array:
        return mark_point(path, x, sources)

    call = point if issubclass(cls, Point) else call
    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


class AdapterParam(nnx.Param):
    """A leaf of an adapter: `nnx.Optimizer(model, tx, wrt=AdapterParam)` trains these alone."""


class Attached(nnx.Module):
    """A module with an adapter, called like the module itself. Made by `attach`."""

    def __init__(self, base: nnx.Module, tuned: Tuned, adapter: Adapter):
        self.base = base
        self.tuned = tuned
        self.structure = jax.tree.structure(adapter)
        self.leaves = nnx.data(jax.tree.map(AdapterParam, dict(adapter)))

    @property
    def adapter(self) -> Adapter:
        """The adapter as it is now, for `save`, `merge` and the pure functions."""
        leaves = jax.tree.leaves(self.leaves, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        return jax.tree.unflatten(self.structure, [leaf[...] for leaf in leaves])

    def __call__(self, *inputs: Any, dropout_key: Any = None, **kwargs: Any) -> Any:
        # The graph as it is now: `train()` and `eval()` change it.
        fn = nnx_function(self.base, tapped=at_boundaries(self.tuned.tuning))
        state = nnx.state(self.base)
        out, state = dataclasses.replace(self.tuned, fn=fn).apply(
            self.adapter, state, *inputs, dropout_key=dropout_key, mutable=_MUTABLE, **kwargs
        )
        nnx.update(self.base, state)
        return out


_MUTABLE = nnx.Not(nnx.Param)


def attach(
    model: nnx.Module,
    tuning: Any,
    *inputs: Any,
    key: jax.Array,
    strict: bool = False,
    **kwargs: Any,
) -> Attached:
    """An adapter on an nnx module that is trained in place: the stateful door.

    The same results as the pure functions: a call is `tuned.apply`, and what the base changes in
    its own state (batch statistics, RNG counters) stays in the base.

    Args:
        model: the base module; it is kept, not copied, and its `nnx.Param`s are never changed.
        tuning: a method, `rules(...)` or `chain(...)`.
        *inputs: example inputs of the call.
        key: PRNG key of the fresh adapter.
        strict: raise where a tuned weight would become dense.
        **kwargs: keyword arguments of the example call.

    Returns:
        An nnx module whose new leaves are `AdapterParam` variables.

    Example:
        >>> import jax.numpy as jnp, optax, jaxpeft as jp
        >>> x = jnp.ones((2, 4))
        >>> model = jp.nnx.attach(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jp.lora(2), x,
        ...                       key=jax.random.key(0))
        >>> optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=jp.nnx.AdapterParam)
        >>> wrt = nnx.DiffState(0, jp.nnx.AdapterParam)
        >>> grads = nnx.grad(lambda model: (model(x) ** 2).sum(), argnums=wrt)(model)
        >>> _ = optimizer.update(model, grads)
    """
    fn = nnx_function(model, tapped=at_boundaries(tuning))
    tuned = transform_function(fn, tuning, strict=strict, head=getattr(model, "output_head", None))
    adapter = tuned.init(key, nnx.state(model), *inputs, **kwargs)
    return Attached(model, tuned, adapter)
