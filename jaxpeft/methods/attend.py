"""Self-attention of small networks beside a model.

y = concat_h(softmax(Q_h x (K_h x)^T / sqrt(H)) V_h x) O
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.method import Leaves

Array = jax.Array
MAPS = ("query", "key", "value", "output")


def attention_leaves(key: Array, stack: Sequence[int], width: int, dtype: Any) -> Leaves:
    """The four maps, each (stack..., width, width), normal by one over the root of the width."""
    shape = (*stack, width, width)
    keys = jax.random.split(key, len(MAPS))
    pairs = zip(MAPS, keys, strict=True)
    return {name: jax.random.normal(k, shape, dtype) / width**0.5 for name, k in pairs}


def visible(length: int, causal: bool, mask: Array | None) -> Array:
    """Which keys a query sees, `bool[..., 1, T, T]`; `mask` is `bool[..., T]`."""
    seen = jnp.ones((1, length, length), bool)
    seen = jnp.tril(seen) if causal else seen
    return seen if mask is None else seen & mask[..., None, None, :]


def attend(leaves: Mapping[str, Array], x: Array, heads: int, seen: Array) -> Array:
    """The attention of `x` (..., T, width) to itself."""
    split = (*x.shape[:-1], heads, x.shape[-1] // heads)
    q, k, v = ((x @ leaves[name]).reshape(split) for name in MAPS[:3])
    scores = jnp.einsum("...tnh,...snh->...nts", q, k).astype(jnp.float32) / split[-1] ** 0.5
    shares = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min))
    y = jnp.einsum("...nts,...snh->...tnh", shares.astype(v.dtype), v)
    return y.reshape(x.shape) @ leaves["output"]
