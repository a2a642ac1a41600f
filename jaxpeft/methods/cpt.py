"""Context-aware prompt tuning: worked examples as a prompt, whose embeddings move a little.

x' = [c + d; x],   |d_i| <= eps_i,   c: embeddings of the context (n, width)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.adapter import Adapter
from jaxpeft.core.method import Leaves, Method
from jaxpeft.core.site import Site
from jaxpeft.methods.prompt import first_rows, prompt_method

Array = jax.Array

# The radius of tokens that do not move, which keeps the projection free of zero by zero.
_STILL = 1e-10


def cpt(
    ids: Sequence[int],
    types: Sequence[int],
    *,
    epsilon: float = 0.1,
    format_epsilon: float = 0.1,
    names: Mapping[str, str] | None = None,
    dtype: Any = jnp.float32,
) -> Method:
    """Context-aware prompt tuning (CPT): the tokens of worked examples in front, slightly moved.

    A token's type `t` says what it is by `t mod 4`: 1 for the template of the input, 2 for the
    input, 3 for the template of the output, 0 for a label, and `t div 4` counts the examples; the
    tokens of a first example are 1, 2, 3, 4, of a second 5, 6, 7, 8; a type 0 is padding. Row i is
    `c_i + d_i`, with `d_i` brought back to the ball of radius `eps sqrt(width / 2048)` where it has
    left it: `eps` is `epsilon` for inputs, `format_epsilon` for templates; labels do not move.
    The gradient of `d` is that of the row. `project_cpt` brings the adapter itself back after each
    step of an optimizer, as PEFT does, and `cpt_loss` is the loss over the context's labels too.

    Leaves: `context` (n, width) and `radius` (n,), which are fixed, and `delta` (n, width), zero:
    `n * width` trained parameters. A fresh adapter is the model with the context in front.

    Args:
        ids: token ids of the context.
        types: of its tokens.
        epsilon: how far inputs move.
        format_epsilon: how far templates move.
        names: the model's arguments where they have unusual names: keys "tokens", "mask" and
            "positions".
        dtype: of the leaves.

    Returns:
        A method for the table that the tokens index. As a bare tuning it goes there by itself.

    Raises:
        ValueError: if there are no ids, or not as many types.

    Example:
        >>> method = cpt([5, 17, 3, 9], [1, 2, 3, 4], epsilon=0.05)

    Reference:
        Blau et al. 2024, arXiv:2410.17222.
    """
    ids, types = [int(i) for i in ids], [int(t) for t in types]
    if not ids or len(ids) != len(types):
        raise ValueError(f"{len(ids)} ids and {len(types)} types: give one type for each id.")
    moves = jnp.array([t % 4 != 0 for t in types])[:, None]

    def start(key: Array, site: Site, weight: Any) -> Leaves:
        context = first_rows(key, site, weight, len(ids), ids).astype(dtype)
        by_kind = (_STILL, format_epsilon, epsilon, format_epsilon)
        scale = math.sqrt(site.shape[1] / 2048)
        radius = [by_kind[t % 4] * (scale if t % 4 else 1.0) for t in types]
        return {
            "context": context,
            "delta": jnp.zeros_like(context),
            "radius": jnp.array(radius, dtype),
        }

    def rows(leaves: Leaves) -> Array:
        delta = jnp.where(moves, leaves["delta"], jax.lax.stop_gradient(leaves["delta"]))
        # The projection changes the value, and the gradient passes by it.
        return delta + jax.lax.stop_gradient(moved_context(leaves) - delta)

    options = {
        "ids": ids, "types": types, "epsilon": epsilon, "format_epsilon": format_epsilon,
        "names": dict(names or {}),
    }  # fmt: skip
    return prompt_method(
        "cpt", start, rows, len(ids), options, names=names, fixed=("context", "radius")
    )


def moved_context(leaves: Leaves) -> Array:
    """The prompt `(n, width)` that the leaves of `cpt` stand for."""
    return leaves["context"] + _projected(leaves)


def project_cpt(adapter: Adapter) -> Adapter:
    """The adapter with every `delta` of `cpt` inside its ball; run it after each update.

    Args:
        adapter: with leaves of `cpt` at some sites; others stay as they are.

    Returns:
        An adapter of the same form and with the same outputs.
    """
    found = {
        path: {**leaves, "delta": _projected(leaves)}
        for path, leaves in adapter.items()
        if {"context", "delta", "radius"} <= set(leaves)
    }
    return Adapter({**adapter, **found}, adapter.sites)


def _projected(leaves: Leaves) -> Array:
    """`d * r / max(|d|, r)`, row by row."""
    delta, radius = leaves["delta"], leaves["radius"][:, None]
    norm = jnp.linalg.norm(delta, axis=1, keepdims=True)
    return delta * (radius / jnp.maximum(norm, radius))
