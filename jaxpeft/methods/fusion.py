r"""AdapterFusion: attention over what several adapters, trained apart, would add.

x' = r + sum_i a_i V u_i,   a = softmax_i((Q z + b_Q) . (K u_i + b_K) / T)

u_i is the update of adapter i; r and z are what the last adapter adds to and reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.method import SHARED, Leaves, Method
from jaxpeft.core.site import Site
from jaxpeft.core.tap import Here
from jaxpeft.methods import parts
from jaxpeft.methods.bottleneck_form import LEAVES, Bottleneck
from jaxpeft.methods.composed import Stages, made_of, stage

Array = jax.Array
MAPS = ("query", "key", "value")


def fuse(
    *methods: Method,
    maps: Sequence[str] = MAPS,
    query: str = "read",
    of: str = "update",
    temperature: float = 1.0,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Method:
    """AdapterFusion: `x' = r + sum_i a_i V u_i`, `a = softmax_i((Q z + b) . (K u_i + c) / T)`.

    Leaves: those of the adapters under "0", "1", ..., which are not trained, and the fusion's
    `query` (stack..., d, d), `query_bias`, `key`, `key_bias`, normal with standard deviation 0.02,
    and `value` (stack..., d, d), which starts near the identity: `3 d^2 + 2 d` parameters a layer.
    `join_adapters` puts adapters that were trained apart into it, and `fusion_penalty` keeps
    `value` near the identity. With fresh adapters it changes nothing.

    Args:
        *methods: bottleneck adapters, as they were trained.
        maps: which of "query", "key" and "value" are learned; the others are the identity.
        query: what `Q` maps: "read", `z` as the last adapter reads it, or an activation by name.
        of: "update": the adapters' updates are fused and then added to `r`; "result": their
            results `r + u_i` are.
        temperature: `T`.
        dropout: share of the scores that are set to zero, when a key is given.
        dtype: of the fusion's leaves.

    Returns:
        A method that goes where the adapters go.

    Raises:
        TypeError: if one is no bottleneck adapter.
        ValueError: if an option is out of range or unknown.

    Example:
        >>> from jaxpeft.methods.adapters import pfeiffer
        >>> method = fuse(pfeiffer(), pfeiffer(reduction=8))

    Reference:
        Pfeiffer et al. 2021, arXiv:2005.00247.
    """
    _check(methods, maps, of, temperature, dropout)

    def init(key: Array, site: Site) -> Leaves:
        *stack, features = site.shape
        there = parts.widths(site)
        names = _form(methods[-1]).reads if query == "read" else (query,)
        wide = there[parts.first_there(names, there, site.path)]
        return _fresh(key, stack, wide, features, maps, dtype)

    def call(stages: Stages, site: Site, leaves: Leaves, x: Array, here: Here) -> Array:
        *_, last = forms = [_form(m) for m in stages.values()]
        rest = last.rest(site, x, here)
        updates = []
        for name, form in zip(stages, forms, strict=True):
            own, there = stage(leaves, name, here)
            updates.append(form.update(site, own, x, there))
        u = jnp.stack(updates, axis=-2) + (rest[..., None, :] if of == "result" else 0)
        z = last.read(site, x, here) if query == "read" else parts.value_at(query, x, here)
        q, k = _mapped(leaves, "query", z), _mapped(leaves, "key", u)
        scores = jnp.einsum("...d,...nd->...n", q, k)
        scores = parts.dropped(scores.astype(jnp.float32), dropout, here.key) / temperature
        mixed = jnp.einsum("...n,...nd->...d", jax.nn.softmax(scores).astype(x.dtype), u)
        mixed = _mapped(leaves, "value", mixed)
        return mixed if of == "result" else rest + mixed

    options = {
        "maps": list(maps), "query": query, "of": of, "temperature": temperature,
        "dropout": dropout,
    }  # fmt: skip
    method = made_of("fuse", methods, call, options, init)
    inner = tuple(f"{i}/{leaf}" for i in range(len(methods)) for leaf in LEAVES)
    common = tuple(f"{SHARED}:{name}/{leaf}" for name in method.shared for leaf in LEAVES)
    return method._replace(fixed=(*inner, *common))


def _mapped(leaves: Leaves, name: str, x: Array) -> Array:
    if name not in leaves:
        return x
    y = x @ leaves[name].astype(x.dtype)
    return y + leaves[f"{name}_bias"].astype(x.dtype) if f"{name}_bias" in leaves else y


def _fresh(key: Array, stack: Any, wide: int, features: int, maps: Any, dtype: Any) -> Leaves:
    leaves: Leaves = {}
    for i, (name, rows) in enumerate((("query", wide), ("key", features))):
        if name in maps:
            normal = 0.02 * jax.random.normal(jax.random.fold_in(key, i), (*stack, rows, features))
            leaves[name] = normal.astype(dtype)
            leaves[f"{name}_bias"] = jnp.zeros((*stack, features), dtype)
    if "value" in maps:
        near = jnp.full((features, features), 1e-6).at[jnp.diag_indices(features)].set(1.0)
        leaves["value"] = jnp.broadcast_to(near, (*stack, *near.shape)).astype(dtype)
    return leaves


def _check(methods: Any, maps: Any, of: str, temperature: float, dropout: float) -> None:
    parts.check_share(dropout=dropout)
    for method in methods:
        _form(method)
    if not methods or not set(maps) <= set(MAPS) or of not in ("update", "result"):
        raise ValueError(
            f"fuse() of {len(methods)} methods with maps={maps!r}, of={of!r}: give adapters, maps "
            f"among {MAPS}, and of 'update' or 'result'."
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r} must be positive.")


def _form(method: Any) -> Bottleneck:
    if isinstance(method, Method) and isinstance(method.call, Bottleneck):
        return method.call
    shown = method.name if isinstance(method, Method) else method
    raise TypeError(f"fuse() is made of bottleneck adapters, not of {shown!r}.")
