"""The door for Flax linen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import linen


def linen_function(module: linen.Module) -> Callable[..., Any]:
    """`module.apply` as a function of `(variables, *inputs, **kwargs)`."""

    def call(variables: Any, *inputs: Any, **kwargs: Any) -> Any:
        return module.apply(variables, *inputs, **kwargs)

    return call
