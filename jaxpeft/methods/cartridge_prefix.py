"""Prefixes from texts, and prefixes put one behind the other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.adapter import Adapter
from jaxpeft.core.capture import capture
from jaxpeft.core.method import Leaves
from jaxpeft.core.transform import Tuned
from jaxpeft.methods.cartridge import all_rows, split_rows
from jaxpeft.methods.prefix import flat_prefix, is_key_or_value

Array = jax.Array


def prefix_from_tokens(
    tuned: Tuned, adapter: Adapter, params: Any, tokens: Array, **kwargs: Any
) -> Adapter:
    """Starts a prefix at the keys and values that the frozen model has for a text.

    Behind such a prefix a causal model continues as behind the text's first tokens themselves.

    Args:
        tuned: of a tuning with `cartridge(n)` or a flat `prefix_tuning(n)`.
        adapter: from `tuned.init`; its sites of other methods stay as they are.
        params: the frozen params.
        tokens: `int32[1, T]`, the text; its first `n` tokens are taken, after reading all.
        **kwargs: keyword arguments of the model's call.

    Returns:
        The adapter with the text's keys and values.

    Raises:
        ValueError: if the text is too short or not one, or the prefix is not flat.
    """
    paths = [site.path for site in adapter.sites if is_key_or_value(site)]
    if tokens.shape[0] != 1:
        raise ValueError(f"tokens of shape {tokens.shape}: give one text, of shape (1, T).")
    if not paths or tuned.beside or any("prefix" not in adapter[path] for path in paths):
        raise ValueError(
            "prefix_from_tokens is for causal models with `cartridge` or a flat `prefix_tuning`."
        )
    read = jax.jit(capture(tuned.fn, lambda name, _: name in paths))
    found = read(params, tokens, **kwargs)
    return Adapter(
        {**adapter, **{p: _taken(adapter[p], found[p], p) for p in paths}}, adapter.sites
    )


def _taken(leaves: Leaves, found: Array, path: str) -> Leaves:
    count = all_rows(leaves).shape[-3]
    if found.shape[-3] < count:
        raise ValueError(
            f"the text has {found.shape[-3]} tokens at {path!r}, fewer than the prefix's {count}."
        )
    rows = found[..., 0, :count, :, :].astype(leaves["prefix"].dtype)
    return split_rows(rows, leaves["frozen"].shape[-3] if "frozen" in leaves else 0)


def compose_prefixes(first: Adapter, *others: Adapter) -> Adapter:
    """Prefixes one behind the other, as one prefix.

    Args:
        first: an adapter of `cartridge` or `prefix_tuning`, of `n` tokens.
        *others: of the same sites. What they keep frozen may be trained in the result.

    Returns:
        An adapter for the sum of their lengths: of `cartridge(n + ..., frozen=...)` with as many
        frozen tokens as `first` has, or of a flat `prefix_tuning(n + ...)` if it has none.

    Raises:
        ValueError: if the adapters have different sites.
    """
    paths = {site.path: site for site in first.sites if is_key_or_value(site)}
    if any(set(other) != set(paths) or set(first) != set(paths) for other in others) or not paths:
        raise ValueError("compose_prefixes takes prefixes at the same sites, and nothing else.")
    found = {}
    for path, site in paths.items():
        flat = [flat_prefix({"prefix": all_rows(leaves)} if "prefix" in leaves else leaves, site)
                for leaves in (adapter[path] for adapter in (first, *others))]  # fmt: skip
        rows = jnp.concatenate([leaves["prefix"] for leaves in flat], axis=-3)
        found[path] = split_rows(rows, first[path].get("frozen", rows[..., :0, :, :]).shape[-3])
    return Adapter(found, first.sites)
