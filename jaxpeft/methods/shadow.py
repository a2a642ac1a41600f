r"""Shadow tuning: a state beside the model's layers, which corrects what goes into each of them.

h'_i = h_i + a * up_i(down_i(h_i - s_i)),   s_{i+1} = (1 - g_i) s_i + g_i t_i

t_i = T_i(o_i), g_i = sigmoid(G_i(o_i)): two-layer networks of what layer i returns
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.method import Leaves, Method, Needs
from jaxpeft.core.rules import compile_pattern
from jaxpeft.core.site import Site
from jaxpeft.core.tap import Here
from jaxpeft.core.virtual import MASKS
from jaxpeft.methods import parts
from jaxpeft.methods.maps import uniform, zeros
from jaxpeft.methods.shadow_backbone import Backbone, tokenwise

Array = jax.Array

STATE = "shadow"


def shadow(
    rank: int,
    *,
    alpha: float = 0.1,
    dropout: float = 0.0,
    hidden: int | None = None,
    blocks: int = 0,
    width: int | None = None,
    backbone: Backbone | None = None,
    layers: str = "layers",
    start: str = "*embed*:out",
    dtype: Any = jnp.float32,
) -> Method:
    """ShadowPEFT: `h' = h + alpha * up(down(h - s))` in front of each layer, `s` a state beside it.

    The state starts from the embeddings and passes from layer to layer, through a scan too. Behind
    each layer a gate mixes it with what a network makes of the layer's output: `s' = (1 - g) s +
    g t`, `t = T(o)`, `g = sigmoid(G(o))`, T and G two-layer networks with GELU. With `blocks=0` it
    starts as the embeddings themselves; else as what residual blocks make of each token by itself,
    `e + W gelu(V norm(e))` in a `width` of their own, as in PEFT for models that it cannot mirror.
    `jaxpeft.models.mirror(model)` gives a `backbone` as PEFT has it for those that it can: a layer
    of the model's own kind. Gradients go through the model's layers, as in PEFT.

    Leaves, d the model's width: at the input of layers `down`, `up` (stack..., rank, d), `up` zero;
    at their output `candidate` and `gate`, each `down` (stack..., hidden, d), `down_bias`, `up`
    (stack..., hidden, d) and `up_bias`: `2 rank d + 2 (2 hidden d + hidden + d)` parameters a
    layer; with blocks, at the start, `in` (d, width), `in_bias`, for each block `scale`, `bias`,
    `first` (blocks, width, width), `first_bias`, `second`, `second_bias`, and `out` (width, d) if
    the widths differ. A fresh adapter changes nothing. The gates are trained once `up` is not zero.

    Args:
        rank: of the correction.
        alpha: its strength.
        dropout: share of the entries of `h - s` that it does not see, when a key is given; PEFT's
            default is 0.2.
        hidden: inner width of T and G; `rank` when absent.
        blocks: of the network between the embeddings and the first state.
        width: of that network; the model's when absent.
        backbone: another network in its place.
        layers: glob over the modules that are the layers: one that a scan stacks, or several.
        start: glob over the boundary where the state begins, outside of loops.
        dtype: of the leaves.

    Returns:
        A method that as a bare tuning goes to the start, and to the inputs and outputs of layers.

    Raises:
        ValueError: if a number is out of range; from `init`, if `layers` or `start` fits nothing;
            in the call, if no state begins before the layers.

    Example:
        >>> import jaxpeft as jp
        >>> method = jp.shadow(8, dropout=0.2)
        >>> looped = jp.shadow(8, layers="block_*", start="wte:out")

    Reference:
        PEFT's SHADOW, of version 0.21.
    """
    for name, value in (("rank", rank), ("hidden", hidden), ("width", width)):
        absent = value is None and name != "rank"
        if not absent and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} is out of range. Use a positive int.")
    if not isinstance(blocks, int) or blocks < 0:
        raise ValueError(f"blocks={blocks!r} is out of range. Use an int of 0 or more.")
    parts.check_share(dropout=dropout)
    first = backbone or tokenwise(blocks, width)
    is_layer, begins = compile_pattern(layers), compile_pattern(start)

    def init(key: Array, site: Site, weight: Any) -> Leaves:
        del weight
        *stack, d = site.shape
        keys = jax.random.split(key)
        if begins(site.path, site):
            return first.init(key, d, dtype)
        if site.side == "in":
            down = uniform(keys[0], (*stack, rank, d), d).astype(dtype)
            return {"down": down, "up": zeros(keys[1], (*stack, rank, d), rank).astype(dtype)}
        names = ("candidate", "gate")
        return {
            n: _two(k, stack, d, hidden or rank, dtype) for n, k in zip(names, keys, strict=True)
        }

    def call(site: Site, leaves: Leaves, x: Array, here: Here) -> tuple[Array, dict[str, Any]]:
        if begins(site.path, site):
            return x, {STATE: first.call(leaves, x, here.inputs.get("mask"))}
        s = here.state(STATE, site.path)
        if site.side == "out":
            return x, {STATE: _updated(leaves, x, s)}
        gap = parts.dropped(x - s, dropout, here.key)
        low = gap @ leaves["down"].astype(x.dtype).T
        return x + alpha * (low @ leaves["up"].astype(x.dtype)), {}

    def is_place(site: Site) -> bool:
        module, _, side = site.path.rpartition(":")
        at_layer = side in ("in", "out") and is_layer(module, site)
        return site.boundary and (at_layer or bool(begins(site.path, site)))

    options = {
        "rank": rank, "alpha": alpha, "dropout": dropout, "hidden": hidden, "blocks": blocks,
        "width": width, "layers": layers, "start": start,
        "backbone": backbone and dict(backbone.options),
    }  # fmt: skip
    mask = MASKS if first.attends else ()
    present = (("layers", layers), ("start", start))
    needs = Needs(states=(STATE,), mask=mask, sequence=first.attends, present=present)
    return Method("shadow", init, None, is_place, is_place, options=options, call=call, needs=needs)


def _two(key: Array, stack: Any, d: int, hidden: int, dtype: Any) -> Leaves:
    keys = jax.random.split(key, 4)
    shapes = {
        "down": ((*stack, hidden, d), d), "down_bias": ((*stack, hidden), d),
        "up": ((*stack, hidden, d), hidden), "up_bias": ((*stack, d), hidden),
    }  # fmt: skip
    pairs = zip(keys, shapes.items(), strict=True)
    return {name: uniform(k, shape, fan).astype(dtype) for k, (name, (shape, fan)) in pairs}


def _network(leaves: Mapping[str, Array], x: Array) -> Array:
    w = {name: leaf.astype(x.dtype) for name, leaf in leaves.items()}
    inner = jax.nn.gelu(x @ w["down"].T + w["down_bias"], approximate=False)
    return inner @ w["up"] + w["up_bias"]


def _updated(leaves: Leaves, x: Array, s: Array) -> Array:
    gate = jax.nn.sigmoid(_network(leaves["gate"], x))
    return (1 - gate) * s + gate * _network(leaves["candidate"], x)
