"""The two maps of a bottleneck, as dense matrices.

down(z) = D z + b_D,   D: (m, d_in);   up(a) = a U + b_U,   U: (m, d_out)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.method import Leaves

Array = jax.Array
Start = Callable[[Array, tuple[int, ...], int], Array]


def zeros(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
    del key, fan_in
    return jnp.zeros(shape)


def normal(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
    del fan_in
    return 0.02 * jax.random.normal(key, shape)


def uniform(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def truncated(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
    del fan_in
    return 0.01 * jax.random.truncated_normal(key, -2.0, 2.0, shape)


# How the maps down and up start.
STARTS: Mapping[str, tuple[Start, Start]] = {
    "zero": (normal, zeros),
    "bert": (normal, normal),
    "mam": (uniform, zeros),
    "houlsby": (truncated, truncated),
}


@dataclasses.dataclass(frozen=True)
class Dense:
    """Leaves `down` (stack..., m, d_in), `up` (stack..., m, d_out), `down_bias`, `up_bias`."""

    bias: bool = True
    start: str = "zero"

    @property
    def fixed(self) -> tuple[str, ...]:
        return ()

    @property
    def shared(self) -> dict[str, Any]:
        return {}

    def init(self, key: Array, stack: Sequence[int], sizes: Sequence[int], dtype: Any) -> Leaves:
        """Fresh leaves for `sizes = (d_in, m, d_out)`."""
        wide, width, out = sizes
        down, up = STARTS[self.start]
        keys = jax.random.split(key)
        leaves = {
            "down": down(keys[0], (*stack, width, wide), wide).astype(dtype),
            "up": up(keys[1], (*stack, width, out), width).astype(dtype),
        }
        biases = {"down_bias": width, "up_bias": out} if self.bias else {}
        return leaves | {name: jnp.zeros((*stack, size), dtype) for name, size in biases.items()}

    def apply(self, leaves: Leaves, name: str, x: Array) -> Array:
        """The map `name`, "down" or "up", of `x`, in its dtype."""
        weight = leaves[name].astype(x.dtype)
        y = x @ (weight.T if name == "down" else weight)
        return y + leaves[f"{name}_bias"].astype(x.dtype) if self.bias else y
