"""The names of a model's arguments."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Names:
    """The names of positional arguments, where no keyword argument changes them."""

    names: tuple[str, ...]

    def __call__(self, kwargs: Mapping[str, Any]) -> tuple[str, ...]:
        return self.names


@functools.lru_cache(maxsize=256)
def argument_names(fn: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's positional arguments; none where Python cannot tell."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return ()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in kinds)
