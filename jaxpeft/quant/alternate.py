"""Alternation between a base, packed or dense, and the low-rank factors beside it.

    Q = pack(W - s A B),   s A B = svd_r(W - Q)

One layer of a stack after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpeft.core.method import Leaves, Method, tune_weight
from jaxpeft.core.sharding import gathered
from jaxpeft.core.site import Site
from jaxpeft.core.structured import dense, unstack
from jaxpeft.methods.lora import factor_axes
from jaxpeft.quant import formats
from jaxpeft.quant.formats import Format
from jaxpeft.quant.merge import before
from jaxpeft.quant.quantize import Axes, canonical
from jaxpeft.quant.svd import Svd
from jaxpeft.quant.weight import wrap

Array = jax.Array


Pair = tuple[Any, Leaves]  # the base as `Layer.rest` gives it, and the leaves


class Layer(NamedTuple):
    """One site, or one layer of it, while it is started.

    Attributes:
        exact: the weight, float32, with the axes that it has in the params.
        site: its roles, with those of fused maps as "batch".
        method: its LoRA.
        format: what the base is packed as; None for dense.
        axes: its stack, input and output axes when packed.
        dtype: of the base where it is dense.
        factors: shapes and dtypes of the leaves.
        svd: how triplets are found.
    """

    exact: Array
    site: Site
    method: Method
    format: Format | None
    axes: Axes
    dtype: Any
    factors: Mapping[str, Any]
    svd: Svd

    def update(self, leaves: Leaves) -> Array:
        """`s A B`, as the method itself makes it."""
        wide = {name: leaf.astype(jnp.float32) for name, leaf in leaves.items()}
        nothing = jnp.zeros(self.exact.shape, jnp.float32)
        return dense(tune_weight(self.method, self.site, wide, nothing), jnp.float32)

    def principal(self, weight: Array) -> Leaves:
        """The leaves whose `s A B` is the best approximation of a weight."""
        both, ins, outs = _split(self.site)
        matrix = canonical(weight, (both, ins, outs))
        rank = self.method.options["rank"]
        u, s, vt = self.svd(matrix, rank)
        root = jnp.sqrt(s / self.method.options["scale"])
        pair = {"a": jnp.swapaxes(u * root[..., None, :], -1, -2), "b": root[..., None] * vt}
        return {
            name: leaf.reshape(self.factors[name].shape).astype(self.factors[name].dtype)
            for name, leaf in pair.items()
        }

    def rest(self, leaves: Leaves) -> Any:
        """The base beside these leaves: packed arrays, or a dense array."""
        residual = self.exact - self.update(leaves)
        if self.format is None:
            return residual.astype(self.dtype)
        return formats.quantize(canonical(residual, self.axes), self.format)

    def unpacked(self, base: Any) -> Array:
        """The base in float32."""
        if self.format is None:
            return base.astype(jnp.float32)
        shape = self.exact.shape
        return wrap(base, self.format, shape, axes=self.axes, dtype=jnp.float32).materialize()

    def error(self, pair: Pair) -> Array:
        """`|W - Q - s A B|^2`."""
        return jnp.sum((self.exact - self.unpacked(pair[0]) - self.update(pair[1])) ** 2)


def pissa_first(layer: Layer) -> Pair:
    leaves = layer.principal(layer.exact)
    return layer.rest(leaves), leaves


def pissa_again(layer: Layer, pair: Pair) -> Pair:
    leaves = layer.principal(layer.exact - layer.unpacked(pair[0]))
    return layer.rest(leaves), leaves


def loftq_first(layer: Layer) -> Pair:
    nothing = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in layer.factors.items()}
    return loftq_again(layer, (None, nothing))


def loftq_again(layer: Layer, pair: Pair) -> Pair:
    base = layer.rest(pair[1])
    return base, layer.principal(layer.exact - layer.unpacked(base))


class Scheme(NamedTuple):
    """An order of the two equations: how a pair starts, and the one after it."""

    first: Callable[[Layer], Pair]
    again: Callable[[Layer, Pair], Pair]


PISSA = Scheme(pissa_first, pissa_again)
LOFTQ = Scheme(loftq_first, loftq_again)


def alternated(scheme: Scheme, layer: Layer, iterations: int) -> Pair:
    """The closest of the pairs that alternation gives, `|W - Q - s A B|` at its least."""
    start = scheme.first(layer)
    if iterations == 1 or layer.format is None:
        return start

    def step(_: Any, carry: Any) -> Any:
        now, best, least = carry
        now = scheme.again(layer, now)
        error = layer.error(now)
        best = jax.tree.map(lambda new, old: jnp.where(error < least, new, old), now, best)
        return now, best, jnp.minimum(error, least)

    return lax.fori_loop(1, iterations, step, (start, start, layer.error(start)))[1]


def by_layer(run: Callable[[Layer], Pair], layer: Layer) -> Pair:
    """`run`, one layer of a stack in front after the other."""
    weight, (stack, ins, outs) = layer.exact, layer.axes
    stacked = stack[:1] == (0,) and layer.site.roles[0] in ("stack", "batch")
    halves = unstack(weight) if stacked else None
    if halves is None:
        # A decomposition takes the whole matrix on each device.
        return run(layer._replace(exact=gathered(dense(weight, jnp.float32))))
    arrays, slice_of = halves
    site = layer.site
    inner = layer._replace(
        site=dataclasses.replace(site, shape=site.shape[1:], roles=site.roles[1:]),
        axes=(before(stack[1:]), before(ins), before(outs)),
        factors={
            name: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
            for name, leaf in layer.factors.items()
        },
    )
    return lax.map(lambda part: by_layer(run, inner._replace(exact=slice_of(part))), arrays)


def _split(site: Site) -> Axes:
    a_axes, b_axes = factor_axes(site)
    both = len(site.axes("stack", "batch"))
    return a_axes[:both], a_axes[both:], b_axes[both:]
