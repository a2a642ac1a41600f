"""The door for Flax nnx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx


def nnx_function(module: nnx.Module) -> Callable[..., Any]:
    """A module's call as a function of `(state, *inputs, **kwargs)`; its own arrays are not kept.

    `method` names another method, or is a function of the module; `mutable` (True or an nnx
    filter) asks for `(outputs, state)` with the state as the call left it.
    """
    graphdef = nnx.graphdef(module)

    def call(
        state: Any, *inputs: Any, method: Any = None, mutable: Any = False, **kwargs: Any
    ) -> Any:
        # A copy, or a call that counts (dropout keys, batch statistics) would write into `state`.
        live = nnx.merge(graphdef, state, copy=True)
        run = getattr(live, method) if isinstance(method, str) else method or type(live).__call__
        out = run(*inputs, **kwargs) if isinstance(method, str) else run(live, *inputs, **kwargs)
        if mutable is False:
            return out
        return out, nnx.state(live, ... if mutable is True else mutable)

    return call
