"""Cartridges: a long text kept as learned keys and values, which can be put one after another.

Attn(q, [P_K; K], [P_V; V]),   P = [frozen rows; trained rows],   started at a text's own
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.method import Leaves, Method
from jaxpeft.core.site import Site
from jaxpeft.core.tap import Here
from jaxpeft.methods.prefix import prefix_tuning

Array = jax.Array


def cartridge(
    tokens: int,
    *,
    frozen: int = 1,
    place: str = "",
    names: Mapping[str, str] | None = None,
    dtype: Any = jnp.float32,
) -> Method:
    """A cartridge: prefix tuning whose first tokens stay as they are.

    Many models attend to the first token of a sequence whatever it is, so its key and value are
    kept. `prefix_from_tokens` starts a cartridge at the keys and values of a text, which is then
    trained to answer as the model does that reads the whole text; `compose_prefixes` puts several
    behind one another.

    Leaves, at the keys and at the values of each attention: `frozen` (stack..., frozen, heads, head
    width), which is fixed, and `prefix` (stack..., tokens - frozen, heads, head width).

    Args:
        tokens: length, with the frozen ones.
        frozen: how many at the start are not trained.
        place: as for `prefix_tuning`.
        names: the model's arguments where they have unusual names: keys "tokens", "mask" and
            "positions".
        dtype: of the leaves.

    Returns:
        A method for the sides ":key" and ":value" of attentions. As a bare tuning it goes to all of
        them.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> method = cartridge(1024, frozen=1)

    Reference:
        Eyuboglu et al. 2025, arXiv:2506.06266.
    """
    whole = prefix_tuning(tokens, place=place, names=names, dtype=dtype)
    if not isinstance(frozen, int) or not 0 <= frozen < tokens:
        raise ValueError(f"frozen={frozen!r} is not a part of {tokens} tokens.")

    def start(key: Array, site: Site, weight: Any) -> Leaves:
        return split_rows(whole.init(key, site, weight)["prefix"], frozen)

    def call(site: Site, leaves: Leaves, x: Array, here: Here) -> Array:
        assert whole.call is not None
        kept = {n: jax.lax.stop_gradient(v) if n == "frozen" else v for n, v in leaves.items()}
        return whole.call(site, {"prefix": all_rows(kept)}, x, here)

    options = {"tokens": tokens, "frozen": frozen, "place": place, "names": dict(names or {})}
    return whole._replace(
        name="cartridge", init=start, call=call, options=options, fixed=("frozen",)
    )


def split_rows(rows: Array, frozen: int) -> Leaves:
    """The leaves of a cartridge, or with nothing frozen those of a flat prefix."""
    kept = {"frozen": rows[..., :frozen, :, :]} if frozen else {}
    return kept | {"prefix": rows[..., frozen:, :, :]}


def all_rows(leaves: Leaves) -> Array:
    """The keys or values (stack..., tokens, heads, head width), frozen ones first."""
    parts = [leaves[name] for name in ("frozen", "prefix") if name in leaves]
    return jnp.concatenate(parts, axis=-3)
