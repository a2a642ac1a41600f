r"""What a bottleneck adapter computes.

x' = r + N(g * drop(s * depth(up(f(down(N(z)))))))

z is what it reads, r what it is added to; the norms N, the gate g and the scale s are optional.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.method import Leaves
from jaxpeft.core.site import Site
from jaxpeft.core.tap import Here
from jaxpeft.methods import parts
from jaxpeft.methods.maps import normal, uniform

Array = jax.Array

# The names of all leaves that there may be.
_LEAVES = "down up rule down_rule up_rule scale gate norm_in norm_out".split()
_PARTS = ("", "_bias", "_scale", "_left", "_right")
LEAVES = tuple(name + part for name in _LEAVES for part in _PARTS)


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """A bottleneck adapter's call; `update` alone is what AdapterFusion attends to.

    `residual` are names of activations and their weights; "read" is what the adapter reads.
    """

    maps: Any
    activation: Callable[[Array], Array]
    reads: tuple[str, ...]
    residual: tuple[tuple[str, float], ...]
    scale: float | str
    gate: str | None
    norm_in: bool
    norm_out: str | None
    dropout: float
    stochastic_depth: float

    def __call__(self, site: Site, leaves: Leaves, x: Array, here: Here) -> Array:
        z = self.read(site, x, here)
        y = parts.dropped(self.update(site, leaves, x, here), self.dropout, here.key)
        y = y * self._gate(leaves, z) if self.gate else y
        y = _norm(leaves, "norm_out", y) if self.norm_out == "update" else y
        y = self.rest(site, x, here) + y
        return _norm(leaves, "norm_out", y) if self.norm_out == "result" else y

    def update(self, site: Site, leaves: Leaves, x: Array, here: Here) -> Array:
        """`s * depth(up(f(down(N(z)))))`: before dropout, gate and the norm behind."""
        z = self.read(site, x, here)
        z = _norm(leaves, "norm_in", z) if self.norm_in else z
        y = self.maps.apply(leaves, "up", self.activation(self.maps.apply(leaves, "down", z)))
        rows = (*y.shape[:-2], 1, 1) if y.ndim > 1 else (1,)
        y = parts.dropped(y, self.stochastic_depth, parts.folded(here.key, 1), rows)
        scale = leaves["scale"].astype(y.dtype) if isinstance(self.scale, str) else self.scale
        return y if isinstance(scale, float) and scale == 1.0 else y * scale

    def read(self, site: Site, x: Array, here: Here) -> Array:
        """z, what the adapter reads."""
        name = parts.first_there(self.reads, ("x", *here.sources), site.path)
        return parts.value_at(name, x, here)

    def rest(self, site: Site, x: Array, here: Here) -> Array:
        """r, what the update is added to."""
        total = None
        for name, weight in self.residual:
            if name == "read":
                value = self.read(site, x, here)
            else:
                parts.first_there([name], ("x", *here.sources), site.path)
                value = parts.value_at(name, x, here)
            term = value if weight == 1.0 else weight * value
            total = term if total is None else total + term
        return jnp.zeros_like(x) if total is None else total

    def _gate(self, leaves: Leaves, z: Array) -> Array:
        score = z @ leaves["gate"].astype(z.dtype) + leaves["gate_bias"].astype(z.dtype)
        g = jax.nn.sigmoid(score)[..., None]
        return g.mean(axis=-2, keepdims=True) if self.gate == "sequence" else g

    def init(self, key: Array, site: Site, width: int | None, reduction: Any, dtype: Any) -> Leaves:
        """Fresh leaves at a site."""
        *stack, features = site.shape
        there = parts.widths(site)
        wide = there[parts.first_there(self.reads, there, site.path)]
        inner = max(1, int(wide // reduction)) if width is None else width
        keys = jax.random.split(key, 3)
        leaves = self.maps.init(keys[0], stack, (wide, inner, features), dtype)
        if isinstance(self.scale, str):
            size = [features] if self.scale == "channel" else []
            leaves["scale"] = jnp.ones((*stack, *size), dtype)
        if self.gate:
            plain = self.maps.start == "houlsby"
            start = uniform if plain else normal
            leaves["gate"] = start(keys[1], (*stack, wide), wide).astype(dtype)
            bias = uniform(keys[2], tuple(stack), wide) if plain else jnp.zeros(stack)
            leaves["gate_bias"] = bias.astype(dtype)
        norms = [("norm_in", wide)] * self.norm_in + [("norm_out", features)] * bool(self.norm_out)
        for name, count in norms:
            leaves[f"{name}_scale"] = jnp.ones((*stack, count), dtype)
            leaves[f"{name}_bias"] = jnp.zeros((*stack, count), dtype)
        return leaves


def _norm(leaves: Leaves, name: str, x: Array) -> Array:
    return parts.layer_norm(x, leaves[f"{name}_scale"], leaves[f"{name}_bias"])
