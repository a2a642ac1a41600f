"""What a case is: a small model in the style of some public code, and how LoRA fares on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Built(NamedTuple):
    """A model, its params, and the arguments of one call."""

    model: Any
    params: Any
    inputs: tuple[Any, ...]
    kwargs: Mapping[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: what the model does, as the documentation shows it.
        group: the heading that it stands under.
        build: makes the model.
        fast: no weight becomes dense with LoRA on every linear map.
        reverse: the model can be differentiated in reverse mode (a `while_loop` cannot).
        tolerance: relative error allowed against the merged model.
        memory: the compiled step is checked for arrays of the weights' sizes.
        peers: results of other libraries on such a model, as measured (see `peers.py`).
    """

    name: str
    group: str
    build: Callable[[], Built]
    fast: bool = True
    reverse: bool = True
    tolerance: float = 1e-5
    memory: bool = True
    peers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.group}: {self.name}".replace("`", "")


def table() -> tuple[list[Case], Callable[..., Any]]:
    """An empty list of cases, and the decorator that adds the function under it."""
    cases: list[Case] = []

    def case(group: str, name: str, *, peers: Mapping[str, str] | None = None, **options: Any):
        def add(build: Callable[[], Built]) -> Callable[[], Built]:
            cases.append(Case(name, group, build, peers=peers or {}, **options))
            return build

        return add

    return cases, case


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def linen_case(module: Any, *inputs: Any, **kwargs: Any) -> Built:
    return Built(module, module.init(jax.random.key(0), *inputs), inputs, kwargs)


def of_weight(f: Callable[..., Any], w: Any, *inputs: Any) -> Built:
    """A case of a function `f(w, *inputs)` of one weight."""
    return Built(lambda params, *xs: f(params["w"], *xs), {"w": jnp.asarray(w)}, inputs)
