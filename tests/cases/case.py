"""What a case is: a small model in the style of some public code, and how LoRA fares on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Built(NamedTuple):
    """A model, its params, and the arguments of one call."""

    model: Any
    params: Any
    inputs: tuple[Any, ...]
    kwargs: Mapping[str, Any] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One row of the table.

    Attributes:
        name: what the model does, as the documentation shows it.
        group: the heading that it stands under.
        build: makes the model.
        fast: no weight becomes dense with LoRA on every linear map.
        reverse: the model can be differentiated in reverse mode (a `while_loop` cannot).
        tolerance: relative error allowed against the merged model.
        mapped: `jax.vmap` has rules for all of its operations.
        peers: results of other libraries on such a model, as measured (see `peers.py`).
    """

    name: str
    group: str
    build: Callable[[], Built]
    fast: bool = True
    reverse: bool = True
    tolerance: float = 1e-5
    mapped: bool = True
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
    """Random numbers from numpy, which compiles nothing."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return jnp.asarray(values)


def filled(shapes: Any) -> Any:
    """Arrays of small random numbers for a tree of `ShapeDtypeStruct`s."""
    leaves, tree = jax.tree.flatten(shapes)
    sized = enumerate(leaves)
    return tree.unflatten([(0.5 * normal(i, *leaf.shape)).astype(leaf.dtype) for i, leaf in sized])


def linen_case(module: Any, *inputs: Any, **kwargs: Any) -> Built:
    params = filled(jax.eval_shape(module.init, jax.random.key(0), *inputs))
    return Built(module, params, inputs, kwargs)


def nnx_case(make: Callable[[nnx.Rngs], nnx.Module], *inputs: Any, **kwargs: Any) -> Built:
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    return Built(model, filled(nnx.state(model)), inputs, kwargs)


def of_weight(f: Callable[..., Any], w: Any, *inputs: Any) -> Built:
    """A case of a function `f(w, *inputs)` of one weight."""
    return Built(lambda params, *xs: f(params["w"], *xs), {"w": w}, inputs)
