"""The two maps of a bottleneck as parameterized hypercomplex products; the options are `phm`'s."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.method import SHARED, Leaves
from jaxpeft.methods.phm import Phm, phm

Array = jax.Array


def phm_maps(given: Phm | Mapping[str, Any], bias: bool, start: str) -> PhmMaps:
    """The maps for options as `phm` gives them, or as a file has them."""
    return PhmMaps(phm(**(given._asdict() if isinstance(given, Phm) else given)), bias, start)


@dataclasses.dataclass(frozen=True)
class PhmMaps:
    """Down and up, each `y = x sum_i kron(C_i, W_i) + b`; some of the leaves are shared."""

    phm: Phm
    bias: bool
    start: str

    def options(self) -> dict[str, Any]:
        sizes = self.phm.sizes
        return self.phm._asdict() | {"sizes": list(sizes) if sizes else None}

    @property
    def fixed(self) -> tuple[str, ...]:
        if self.phm.learn_rule:
            return ()
        places = ("down_", "up_", f"{SHARED}:{self.phm.shared}/")
        return tuple(place + rule for place in places for rule in _names("rule"))

    @property
    def shared(self) -> dict[str, Callable[[Array], Leaves]]:
        return {} if self.phm.shared is None else {self.phm.shared: self._common}

    def _common(self, key: Array) -> Leaves:
        leaves = self._rule(key, "rule", (), self.phm.spread)
        if self.phm.sizes:
            wide, inner = self.phm.sizes
            leaves |= self._weights(jax.random.fold_in(key, 1), (), (wide, inner, wide))
        return leaves

    def init(self, key: Array, stack: Sequence[int], sizes: Sequence[int], dtype: Any) -> Leaves:
        """Fresh leaves of one site for `sizes = (d_in, m, d_out)`."""
        if any(size % self.phm.n for size in sizes):
            raise ValueError(
                f"n={self.phm.n} does not divide the sizes {tuple(sizes)} of its maps."
            )
        wide, inner, out = sizes
        if self.phm.sizes not in (None, (wide, inner)) or (self.phm.sizes and out != wide):
            raise ValueError(f"sizes={self.phm.sizes} are shared, but a site has {tuple(sizes)}.")
        leaves = {} if self.phm.sizes else self._weights(key, stack, sizes)
        if self.phm.shared is None:
            for i, name in enumerate(("down_rule", "up_rule")):
                leaves |= self._rule(jax.random.fold_in(key, 2 + i), name, stack, self.phm.spread)
        if self.bias:
            leaves |= {"down_bias": jnp.zeros((*stack, inner)), "up_bias": jnp.zeros((*stack, out))}
        return {name: leaf.astype(dtype) for name, leaf in leaves.items()}

    def _rule(self, key: Array, name: str, stack: Sequence[int], spread: float) -> Leaves:
        n, rank = self.phm.n, self.phm.rule_rank
        if rank is None:
            return {name: spread * jax.random.normal(key, (*stack, n, n, n))}
        halves = jax.random.split(key)
        return {
            f"{name}_left": spread * jax.random.normal(halves[0], (*stack, n, n, rank)),
            f"{name}_right": spread * jax.random.normal(halves[1], (*stack, n, rank, n)),
        }

    def _weights(self, key: Array, stack: Sequence[int], sizes: Sequence[int]) -> Leaves:
        """Xavier normal in each of the `n` slices; `up` at zero, in its last factor, for "zero"."""
        n, rank = self.phm.n, self.phm.rank
        leaves: Leaves = {}
        for i, name in enumerate(("down", "up")):
            p, q = sizes[i] // n, sizes[i + 1] // n
            shapes = {name: (p, q)}
            if rank is not None:
                shapes = {f"{name}_left": (p, rank), f"{name}_right": (rank, q)}
            last = [*shapes][-1]
            for j, (leaf, shape) in enumerate(shapes.items()):
                spread = 0.0 if self.start == "zero" and leaf == last and i else 1.0
                spread *= math.sqrt(2 / sum(shape))
                at_leaf = jax.random.fold_in(key, 2 * i + j)
                leaves[leaf] = spread * jax.random.normal(at_leaf, (*stack, n, *shape))
        return leaves

    def apply(self, leaves: Leaves, name: str, x: Array) -> Array:
        """The map `name`, "down" or "up", of `x`, in its dtype."""
        common = leaves[SHARED][self.phm.shared] if self.phm.shared else {}
        rule = _factors(common, "rule") or _factors(leaves, f"{name}_rule")
        weight = _factors(common, name) or _factors(leaves, name)
        spec = ("ias,isj" if len(rule) > 1 else "iaj") + ","
        spec += "ikr,irl" if len(weight) > 1 else "ikl"
        blocks = x.reshape(*x.shape[:-1], self.phm.n, -1)
        y = jnp.einsum(f"...ak,{spec}->...jl", blocks, *(f.astype(x.dtype) for f in rule + weight))
        y = y.reshape(*x.shape[:-1], -1)
        return y + leaves[f"{name}_bias"].astype(x.dtype) if self.bias else y


def _names(name: str) -> tuple[str, ...]:
    return name, f"{name}_left", f"{name}_right"


def _factors(leaves: Leaves, name: str) -> tuple[Array, ...]:
    """An array by name, or its two factors."""
    return tuple(leaves[found] for found in _names(name) if found in leaves)
