"""The door for Flax nnx: pure functions of the state."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxpeft.flax.mark import Marks, Point, mark_call, mark_point


def nnx_function(module: nnx.Module, marks: Marks | None = None) -> Callable[..., Any]:
    """A module's call as a function of `(state, *inputs, **kwargs)`; its own arrays are not kept.

    `method` names another method, or is a function of the module; `mutable` (True or an nnx
    filter) asks for `(outputs, state)` with the state as the call left it. With `marks`, the
    input and the output of every submodule's call are marked by its path.
    """
    return _function_of(_Graph(nnx.graphdef(module)), marks)


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
def _function_of(graph: _Graph, marks: Marks | None) -> Callable[..., Any]:
    """One function a graph, so that a program compiled for it is found again."""
    graphdef = graph.graphdef

    def call(
        state: Any, *inputs: Any, method: Any = None, mutable: Any = False, **kwargs: Any
    ) -> Any:
        # A copy, or a call that counts (dropout keys, batch statistics) would write into `state`.
        live = nnx.merge(graphdef, state, copy=True)
        if marks:
            _mark_modules(live, marks)
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


def _mark_modules(live: nnx.Module, marks: Marks) -> None:
    """Gives every module of a functional copy a class whose call is marked with its path."""
    for path, module in list(nnx.iter_modules(live)):
        if callable(module):
            module.__class__ = _marked(type(module), "/".join(map(str, path)), marks)


@functools.cache
def _marked(cls: type, path: str, marks: Marks) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return mark_call(functools.partial(cls.__call__, self), path, args, kwargs, marks)

    def point(self: Any, x: jax.Array, **sources: Any) -> jax.Array:
        return mark_point(path, x, sources, marks)

    call = point if issubclass(cls, Point) else call
    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})
