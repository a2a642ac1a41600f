"""The few variants of `lora` and `full` that a PEFT file can hold and a user has no need to write.

Each is a plain `Method`, so an adapter that was read is trained, merged and saved like any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.method import Leaves, Method, tune_weight
from jaxpeft.core.site import Site
from jaxpeft.core.structured import dense
from jaxpeft.methods.full import full
from jaxpeft.methods.lora import lora
from jaxpeft.methods.lora import rslora as stabilized


def lora_by_layer(
    ranks: Sequence[int],
    alphas: Sequence[float],
    *,
    dropout: float = 0.0,
    rslora: bool = False,
) -> Method:
    """LoRA over a stack of layers, each with its own rank and alpha; rank 0 leaves a layer alone.

    One pair of leaves holds all layers at the largest rank. The rows of `a` and `b` beyond a
    layer's rank are zero, and stay so in training, as the gradient of either is a product with the
    other. `b` is scaled by layer where it is used, so that the leaves are those of the file.

    Args:
        ranks: one for each layer, or a single one.
        alphas: as many.
        dropout: as for `lora`.
        rslora: divide alpha by the root of the rank.

    Returns:
        A method named "lora".

    Example:
        >>> lora_by_layer([2, 0, 4], [8, 1, 8]).options["rank"]
        4
    """
    make = stabilized if rslora else lora
    top = max(range(len(ranks)), key=lambda layer: ranks[layer])
    method = make(ranks[top], alphas[top], dropout=dropout)
    uniform = len(set(zip(ranks, alphas, strict=True))) == 1
    if uniform:
        return method
    sizes = {"rslora": rslora, "ranks": list(ranks), "alphas": list(alphas)}
    options = {**method.options, **sizes}
    scales = [
        scale_of(r, alpha, rslora) if r else method.options["scale"]
        for r, alpha in zip(ranks, alphas, strict=True)
    ]
    ratios = [scale / method.options["scale"] for scale in scales]

    def start(key: jax.Array, site: Site, weight: Any) -> Leaves:
        inside = jnp.arange(max(ranks)) < jnp.array(ranks)[:, None]
        leaves = method.init(key, site, weight)
        return {name: leaf * _spread(inside, leaf) for name, leaf in leaves.items()}

    def tuned(site: Site, leaves: Leaves, weight: Any, key: jax.Array | None) -> Any:
        b = leaves["b"] * _spread(jnp.array(ratios, leaves["b"].dtype), leaves["b"])
        return tune_weight(method, site, {"a": leaves["a"], "b": b}, weight, key)

    return method._replace(init=start, weight=tuned, options=options)


def scale_of(rank: int, alpha: float, rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if rslora else rank)


def _spread(values: jax.Array, leaf: jax.Array) -> jax.Array:
    """Values along the first axes of a leaf, to multiply it with."""
    return values.reshape(values.shape + (1,) * (leaf.ndim - values.ndim)).astype(leaf.dtype)


def _along(site: Site, values: jax.Array) -> jax.Array:
    """Values along the stack axis of a parameter."""
    return values.reshape(
        [-1 if axis in site.axes("stack") else 1 for axis in range(len(site.shape))]
    )


def full_by_layer(layers: Sequence[int], count: int) -> Method:
    """`full()` in some layers of a stack: `W' = value` there, `W` elsewhere.

    Args:
        layers: the layers.
        count: how many there are.

    Returns:
        A method named "full"; its leaf `value` has the shape of the whole weight.
    """
    method = full()
    if len(layers) == count:
        return method

    def tuned(site: Site, leaves: Leaves, weight: Any, key: jax.Array | None) -> jax.Array:
        value = tune_weight(method, site, leaves, weight, key)
        mask = jnp.zeros(count, bool).at[jnp.array(layers)].set(True)
        return jnp.where(_along(site, mask), value, dense(weight))

    return method._replace(weight=tuned, options={"layers": list(layers), "count": count})


def stored_base(layers: Sequence[int], count: int) -> Method:
    """A base weight that came with the adapter: as `full_by_layer`, but not trained.

    Args:
        layers: the layers.
        count: how many there are.

    Returns:
        A method named "base".
    """
    options = {"layers": list(layers), "count": count}
    method = full_by_layer(layers, count)
    return method._replace(name="base", fixed=("value",), options=options)


def token_rows(rows: Sequence[int]) -> Method:
    """Trains some rows of an embedding (or columns of a head): `W'[rows] = value`.

    Args:
        rows: token ids.

    Returns:
        A method named "token_rows" with one leaf `value` of shape (rows, width).

    Reference:
        PEFT's `trainable_token_indices`.
    """
    index = jnp.array(rows)

    def start(key: jax.Array, site: Site, weight: Any) -> Leaves:
        del key
        return {"value": jnp.moveaxis(dense(weight), _vocabulary(site), 0)[index].astype("float32")}

    def tuned(site: Site, leaves: Leaves, weight: Any, key: jax.Array | None) -> jax.Array:
        del key
        array = jnp.moveaxis(dense(weight), _vocabulary(site), 0)
        array = array.at[index].set(leaves["value"].astype(array.dtype))
        return jnp.moveaxis(array, 0, _vocabulary(site))

    fits = lambda site: site.linear and len(site.shape) == 2  # noqa: E731
    return Method("token_rows", start, tuned, fits, lambda site: False, {"rows": list(rows)})


def _vocabulary(site: Site) -> int:
    return site.axes("in" if site.table else "out")[0]


def lora_bias(scales: Sequence[float]) -> Method:
    """The bias of LoRA's second factor, PEFT's `lora_bias`: `bias' = bias + scale * b`.

    Args:
        scales: one for each layer, or a single one.

    Returns:
        A method named "lora_bias" with one leaf `b` of the bias's shape.
    """
    factors = list(scales)

    def start(key: jax.Array, site: Site, weight: Any) -> Leaves:
        del key
        return {"b": jnp.zeros(weight.shape, jnp.float32)}

    def tuned(site: Site, leaves: Leaves, weight: Any, key: jax.Array | None) -> jax.Array:
        del key
        scale = factors[0] if len(factors) == 1 else _along(site, jnp.array(factors))
        return (dense(weight) + scale * leaves["b"]).astype(weight.dtype)

    return Method(
        "lora_bias", start, tuned, lambda site: True, lambda site: False, {"scales": factors}
    )
