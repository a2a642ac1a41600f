"""What a shadow's state starts as: a small network of the embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpeft.core.boundary import shared_leaves
from jaxpeft.core.capture import capture
from jaxpeft.core.method import Leaves, methods_of, resolve
from jaxpeft.core.rules import compile_pattern
from jaxpeft.core.tap import Here
from jaxpeft.core.transform import Adapter, Tuned
from jaxpeft.core.virtual import MASKS, mask_of
from jaxpeft.methods.maps import uniform

Array = jax.Array
STATE = "shadow"


class Backbone(NamedTuple):
    """A network between the embeddings and a shadow's first state.

    Attributes:
        init: `(key, d, dtype) -> leaves`, for embeddings of width d.
        call: `(leaves, x, mask) -> state`, of embeddings `(B, T, d)` and the tokens' mask, or None.
        options: what tells it from others, as JSON values.
        attends: whether tokens see each other in it, so that it needs the mask and no cache.
    """

    init: Callable[[Array, int, Any], Leaves]
    call: Callable[[Leaves, Array, Array | None], Array]
    options: Mapping[str, Any] = {}
    attends: bool = False


def tokenwise(blocks: int, width: int | None) -> Backbone:
    """Residual blocks on each token by itself; without any, the embeddings as they are."""

    def init(key: Array, d: int, dtype: Any) -> Leaves:
        return _fresh(key, d, width or d, blocks, dtype) if blocks else {}

    return Backbone(init, _by_token)


def _fresh(key: Array, d: int, width: int, blocks: int, dtype: Any) -> Leaves:
    keys = jax.random.split(key, 7)
    leaves = {
        "in": uniform(keys[0], (d, width), d), "in_bias": uniform(keys[1], (width,), d),
        "scale": jnp.ones((blocks, width)), "bias": jnp.zeros((blocks, width)),
        "first": uniform(keys[2], (blocks, width, width), width),
        "first_bias": uniform(keys[3], (blocks, width), width),
        "second": uniform(keys[4], (blocks, width, width), width),
        "second_bias": uniform(keys[5], (blocks, width), width),
    }  # fmt: skip
    if width != d:
        leaves["out"] = uniform(keys[6], (width, d), width)
    return {name: leaf.astype(dtype) for name, leaf in leaves.items()}


def _by_token(leaves: Leaves, x: Array, mask: Array | None) -> Array:
    del mask
    if not leaves:
        return x
    w = {name: leaf.astype(x.dtype) for name, leaf in leaves.items()}
    s = x @ w["in"] + w["in_bias"]
    for i in range(len(w["first"])):
        wide = jax.nn.standardize(s.astype(jnp.float32)).astype(s.dtype)
        inner = (wide * w["scale"][i] + w["bias"][i]) @ w["first"][i] + w["first_bias"][i]
        inner = jax.nn.gelu(inner, approximate=False)
        s = s + inner @ w["second"][i] + w["second_bias"][i]
    return s @ w["out"] if "out" in w else s


def shadow_start(tuned: Tuned, adapter: Adapter, params: Any, *inputs: Any, **kwargs: Any) -> Array:
    """The state in which a shadow starts, for the auxiliary loss on it.

    PEFT adds 0.05 times the model's own loss on what the output head makes of this state, so that
    the start alone learns the task too. It needs `blocks` or a `backbone`: nothing else there is
    trained.

    Args:
        tuned: a model with `shadow` as its tuning, or part of it.
        adapter: its adapter.
        params: the frozen params.
        *inputs: the model's inputs.
        **kwargs: keyword arguments of its call.

    Returns:
        The state, `(..., d)`. Under `jit` nothing of the layers is computed.

    Raises:
        ValueError: if there is no shadow.

    Example:
        >>> s = shadow_start(tuned, adapter, params, tokens)  # doctest: +SKIP
        >>> total = loss + 0.05 * cross_entropy(s @ head, labels)  # doctest: +SKIP
    """
    found = [m for m in methods_of(tuned.tuning) if STATE in m.needs.states]
    paths = [
        site.path for site in adapter.sites for m in found
        if site.boundary and compile_pattern(m.options["start"])(site.path, site)
    ]  # fmt: skip
    if not paths:
        raise ValueError("the adapter has no `shadow`. Use jp.transform(model, jp.shadow(8)).")
    chosen = resolve(tuned.tuning, adapter.sites, tuned.head, whole=False)
    site, method = next(s for s in adapter.sites if s.path == paths[0]), chosen[paths[0]]
    assert method.call is not None
    mask = mask_of(tuned.named_inputs(inputs, kwargs), MASKS, ())
    seen = capture(tuned.fn, site.path)(params, *inputs, **kwargs)[site.path]
    leaves = adapter[site.path] | shared_leaves(method, adapter)
    _, states = method.call(site, leaves, seen, Here(inputs={"mask": mask}))
    state: Array = states[STATE]
    return state
