"""Adapters of compositions: put together from others, and the penalty of AdapterFusion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.adapter import Adapter
from jaxpeft.core.method import SHARED

Array = jax.Array


def join_adapters(fresh: Adapter, adapters: Sequence[Adapter]) -> Adapter:
    """An adapter of a composition whose parts are adapters that were trained apart.

    For `chain`, `fuse`, `split`, `batch_split` and `average`, whose parts stand under "0", "1", ...
    at each site.

    Args:
        fresh: from `init` of the composition, or of the shapes of one.
        adapters: one for each part, in order, each trained with that part alone.

    Returns:
        `fresh` with the leaves of `adapters` in their places; what is the composition's own, such
        as the maps of a fusion, stays.

    Raises:
        ValueError: if an adapter has other sites or shapes than its part, or two have leaves under
            one name that all of their sites share.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft as jp
        >>> def model(params, x):
        ...     return jp.tap(x @ params, "w:out")
        >>> inputs = jnp.ones((3, 3)), jnp.ones((1, 3))
        >>> tuning = jp.rules(("w:out", jp.bottleneck(2)))
        >>> one, two = jp.transform(model, tuning), jp.transform(model, jp.chain(tuning, tuning))
        >>> adapters = [one.init(jax.random.key(seed), *inputs) for seed in (1, 2)]
        >>> stack = join_adapters(two.init(jax.random.key(0), *inputs), adapters)
        >>> stack["w:out"]["1"] is adapters[1]["w:out"]
        True
    """
    common = {path: leaves for path, leaves in fresh.items() if path.startswith(f"{SHARED}:")}
    joined, taken = dict(fresh), set[str]()
    for i, adapter in enumerate(adapters):
        own = {path: leaves[str(i)] for path, leaves in fresh.items() if str(i) in leaves}
        shared = {path: leaves for path, leaves in common.items() if path in adapter}
        if taken & shared.keys():
            raise ValueError(
                f"two adapters have leaves of their own at {sorted(taken & shared.keys())[0]!r}. "
                'Train them under different names, such as phm(shared="english").'
            )
        _check(i, own | shared, adapter)
        joined |= {path: joined[path] | {str(i): adapter[path]} for path in own}
        joined |= {path: adapter[path] for path in shared}
        taken |= shared.keys()
    return Adapter(joined, fresh.sites)


def fusion_penalty(adapter: Adapter, weight: float = 0.01) -> Array:
    """`weight * sum ||I - V||^2` over all layers and places of AdapterFusion, to add to the loss.

    Args:
        adapter: one with `fuse` in its tuning.
        weight: of the penalty.

    Returns:
        A scalar, zero where nothing is fused.

    Example:
        >>> import jax.numpy as jnp, jaxpeft as jp
        >>> leaves = {"0": {}, "value": jnp.zeros((2, 3, 3))}
        >>> float(fusion_penalty(jp.Adapter({"mlp:delta": leaves}, ()), weight=1.0))
        6.0

    Reference:
        Pfeiffer et al. 2021, arXiv:2005.00247.
    """
    values = [value for leaves in adapter.values() for value in _values(leaves)]
    total = sum(jnp.sum((jnp.eye(v.shape[-1], dtype=v.dtype) - v) ** 2) for v in values)
    return weight * jnp.asarray(total)


def _values(leaves: Any) -> Iterator[Array]:
    if isinstance(leaves, Mapping):
        if {"0", "value"} <= leaves.keys():
            yield leaves["value"]
        for inner in leaves.values():
            yield from _values(inner)


def _check(number: int, wanted: Mapping[str, Any], adapter: Adapter) -> None:
    """That an adapter has the sites of its part, and there leaves of the same shapes."""
    if wanted.keys() != adapter.keys():
        odd = sorted(wanted.keys() ^ adapter.keys())[0]
        has = "the adapter" if odd in adapter else "the composition"
        raise ValueError(f"adapter {number} does not fit its part: only {has} has {odd!r}.")
    for path, leaves in wanted.items():
        shapes = [
            {jax.tree_util.keystr(keys): leaf.shape for keys, leaf in found}
            for found in map(jax.tree_util.tree_leaves_with_path, (leaves, adapter[path]))
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"adapter {number} does not fit its part at {path!r}: leaves {shapes[1]}, where "
                f"the composition has {shapes[0]}."
            )
