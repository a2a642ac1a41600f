"""What LoRA learned since its start, as LoRA on the weights that were there before."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from jaxpeft.core.adapter import is_shared
from jaxpeft.core.method import Leaves, Method, resolve
from jaxpeft.core.transform import Adapter, Tuned
from jaxpeft.hf.paths import at_paths
from jaxpeft.methods.lora import is_plain, lora, rslora


def difference(tuned: Tuned, adapter: Adapter, start: Adapter) -> tuple[Tuned, Adapter]:
    """LoRA of twice the rank that says what changed: `s A B - s A0 B0 = s [A, A0] [B, -B0]`.

    `jaxpeft.pissa` and `jaxpeft.loftq` change the base. This is for programs that have the base as
    it was before, such as those that read PEFT's files. From a base that was packed on the way, the
    error of packing is then not there, and outputs differ by it.

    Args:
        tuned: the tuned model.
        adapter: a trained adapter.
        start: the adapter where its training started.

    Returns:
        `(tuned, adapter)` for the original params. Sites without LoRA are as they were.

    Raises:
        ValueError: if the two belong to different sites, or have LoRA in a chain.

    Example:
        >>> base, start = jp.pissa(tuned, fresh, params)  # doctest: +SKIP
        >>> plain_tuned, plain = jp.hf.difference(tuned, trained, start)  # doctest: +SKIP
        >>> jp.hf.save_adapter("adapter", plain_tuned, plain)  # doctest: +SKIP
    """
    if adapter.sites != start.sites:
        raise ValueError(
            "the adapters are of different sites. Give the one that training began at."
        )
    sites = {site.path: site for site in adapter.sites if not is_shared(site)}
    methods = resolve(tuned.tuning, list(sites.values()), tuned.head, whole=False)
    leaves = dict(adapter)
    for path, method in methods.items():
        if "lora" not in method.name.split("+"):
            continue
        methods[path] = _doubled(path, method)
        fused = method.options["fused"]
        axis = len(sites[path].axes("stack", "batch")) + len(fused)
        leaves[path] = _joined(leaves[path], start[path], axis)
    tuning = at_paths(methods)
    return dataclasses.replace(tuned, tuning=tuning), Adapter(leaves, adapter.sites)


def _doubled(path: str, method: Method) -> Method:
    """The same LoRA of twice the rank and the same scale."""
    options: dict[str, Any] = dict(method.options)
    if not is_plain(method):
        raise ValueError(
            f"{path!r} has {method.name} {options}; only of lora() and rslora() of all layers, "
            "alone at its site, is there a difference."
        )
    stabilized = options.pop("rslora", False)
    rank, alpha, _ = (options.pop(name) for name in ("rank", "alpha", "scale"))
    make, times = (rslora, math.sqrt(2)) if stabilized else (lora, 2)
    return make(2 * rank, alpha * times, **options)


def _joined(leaves: Leaves, start: Leaves, axis: int) -> Leaves:
    return {
        "a": jnp.concatenate([leaves["a"], start["a"]], axis),
        "b": jnp.concatenate([leaves["b"], -start["b"]], axis),
    }
