"""The door for Flax linen."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from flax import linen
from flax.core import DenyList

from jaxpeft.flax.mark import Marks, mark_call


def linen_function(module: linen.Module, marks: Marks | None = None) -> Callable[..., Any]:
    """`module.apply` as a function of `(variables, *inputs, **kwargs)`.

    With `marks`, the input and the output of every submodule's call are marked by its path,
    "layers/attn:in" and "layers/attn:out"; the module's own are ":in" and ":out".
    """

    def call(variables: Any, *inputs: Any, mutable: Any = False, **kwargs: Any) -> Any:
        out = module.apply(variables, *inputs, mutable=mutable, **kwargs)
        if mutable is False:
            return out
        # Parameters are frozen: they come back as they were given, not as the adapter has them.
        out, state = out
        return out, {name: variables[name] if name == "params" else state[name] for name in state}

    if marks is None:
        return call

    def call_marked(variables: Any, *inputs: Any, mutable: Any = False, **kwargs: Any) -> Any:
        with linen.intercept_methods(functools.partial(_marked_call, marks, [])):
            told = _apart(mutable, marks)
            out, state = call(variables, *inputs, mutable=told, **kwargs)
        return out if mutable is False else (out, state)

    return call_marked


def _apart(mutable: Any, marks: Any) -> Any:
    """The same filter of collections, but another one to `nn.jit`, which knows traces by it.

    It takes a trace of the call without marks, or with others, for one of this call otherwise.
    """
    if mutable is True:
        return DenyList(_apart(False, marks))
    if isinstance(mutable, DenyList):
        return DenyList(_apart(mutable.deny, marks))
    names = [] if mutable is False else [mutable] if isinstance(mutable, str) else mutable
    return (*names, marks)


def _marked_call(
    marks: Marks, running: list[str], run: Any, args: Any, kwargs: Any, context: Any
) -> Any:
    """A call, marked unless it is part of one at the same path: `super().__call__`, shared scopes.

    `running` are the paths of the calls around it.
    """
    path = "/".join(context.module.path)
    if context.method_name != "__call__" or path in running:
        return run(*args, **kwargs)
    running.append(path)
    try:
        return mark_call(run, path, args, kwargs, marks)
    finally:
        running.pop()
