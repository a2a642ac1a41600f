"""The methods of AdapterHub's files that the factories of `jaxpeft.methods` do not make.

Each is a plain `Method`, so an adapter that was read is trained and saved like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.method import SHARED, Leaves, Method, Needs
from jaxpeft.core.site import Site
from jaxpeft.core.tap import Here
from jaxpeft.methods import parts
from jaxpeft.methods.bottleneck import bottleneck
from jaxpeft.methods.inits import kaiming_uniform
from jaxpeft.methods.layers import in_layers
from jaxpeft.methods.prefix import prefix_tuning

Array = jax.Array


def somewhere(method: Method, layers: Sequence[bool]) -> Method:
    """A method in the layers of a stack that are marked; itself, if all are."""
    kept = tuple(i for i, on in enumerate(layers) if on)
    return method if all(layers) else in_layers(method, kept)


def uneven_bottleneck(widths: Sequence[int], **options: Any) -> Method:
    """A bottleneck adapter whose width differs by layer; 0 leaves a layer as it is.

    All layers have the largest width. The rows of `down` and `up` beyond a layer's own are zero,
    and stay so in training where the activation is zero at zero, as that of each is a product with
    the other.

    Args:
        widths: one for each layer.
        **options: of `bottleneck`.

    Returns:
        A method named "bottleneck".

    Raises:
        ValueError: if the activation is not zero at zero.
    """
    kept = [width for width in widths if width]
    most = max(kept)
    method = bottleneck(most, **options)
    if min(kept) < most:
        f, name = parts.activation_named(options.get("activation", "relu"))
        if f(jnp.zeros(())) != 0:
            raise ValueError(f"layers of several widths need f(0) = 0, which {name!r} has not.")
    inside = jnp.arange(most) < jnp.array(kept)[:, None]

    def start(key: Array, site: Site, weight: Any) -> Leaves:
        leaves = method.init(key, site, weight)
        for name in ("down", "up", "down_bias"):
            if name in leaves:
                mask = inside.reshape(inside.shape + (1,) * (leaves[name].ndim - 2))
                leaves[name] = leaves[name] * mask
        return leaves

    shown = {**method.options, "widths": list(widths)}
    uneven = method._replace(init=start, options=shown)
    return somewhere(uneven, [width > 0 for width in widths])


def hub_prefix(
    tokens: int,
    hidden: int | None = None,
    *,
    width: int,
    activation: str = "tanh",
    shared: str = "prefix",
    gate: bool = False,
    dropout: float = 0.0,
    shift: bool = False,
) -> Method:
    """AdapterHub's prefix tuning, whose reparameterization is one for all layers.

    All attentions have `embedding` (tokens, width), `down` (width, hidden) and `down_bias` in
    common, at "shared:...", and each has `up` (stack..., hidden, heads * head width) and `up_bias`
    for its keys and for its values. Without `hidden` and dropout it is `prefix_tuning`.

    Args:
        tokens: length of the prefix.
        hidden: width of the reparameterization's hidden layer; None for the flat form.
        width: of its embedding, and of the model.
        activation: of the hidden layer, a name as for `bottleneck`.
        shared: the name under which the common leaves stand.
        gate: as for `prefix_tuning`.
        dropout: share of the prefix's entries that are dropped, when a key is given.
        shift: as for `prefix_tuning`.

    Returns:
        A method for the sides ":key" and ":value" of attentions.
    """
    plain = prefix_tuning(tokens, width=width, gate=gate, shift=shift)
    if hidden is None and not dropout:
        return plain
    act, (f, name) = plain.call, parts.activation_named(activation)
    assert act is not None

    def start(key: Array, site: Site, weight: Any) -> Leaves:
        *stack, heads, size = site.shape
        leaves = plain.init(key, site, weight)
        if hidden is not None:
            del leaves["prefix"]
            up = kaiming_uniform(key, (*stack, hidden, heads * size), hidden, hidden)
            leaves |= {"up": up, "up_bias": jnp.zeros((*stack, heads * size))}
        return leaves

    def common(key: Array) -> Leaves:
        assert hidden is not None
        keys = jax.random.split(key)
        down = kaiming_uniform(keys[0], (width, hidden), width, hidden)
        embedding = jax.random.normal(keys[1], (tokens, width))
        return {"embedding": embedding, "down": down, "down_bias": jnp.zeros(hidden)}

    def call(site: Site, leaves: Leaves, x: Array, here: Here) -> Array:
        if hidden is None:
            rows = leaves["prefix"]
        else:
            one = leaves[SHARED][shared]
            rows = f(one["embedding"] @ one["down"] + one["down_bias"])
            rows = rows @ leaves["up"] + leaves["up_bias"]
        return act(site, leaves | {"prefix": parts.dropped(rows, dropout, here.key)}, x, here)

    options = {
        "tokens": tokens, "hidden": hidden, "width": width, "activation": name, "shared": shared,
        "gate": gate, "dropout": dropout, "shift": shift,
    }  # fmt: skip
    return plain._replace(
        name="hub_prefix",
        init=start,
        call=call,
        options=options,
        shared={} if hidden is None else {shared: common},
    )


def hub_prompt(tokens: int, *, pools: bool = False, module: str = "encoder") -> Method:
    """AdapterHub's prompt tuning: rows in front of the embeddings, which have no positions.

    At the input of the encoder the prompt is put in front, and at its output taken off again.
    Leaf `prompt` (tokens, d) at the input.

    Args:
        tokens: length of the prompt.
        pools: let the first row of the output be that of the prompt, for heads that read it there.
        module: the encoder's path.

    Returns:
        A method for the input and the output of the encoder.

    Reference:
        Lester et al. 2021, arXiv:2104.08691.
    """

    def start(key: Array, site: Site, weight: Any) -> Leaves:
        del weight
        if site.side == "out":
            return {}
        return {
            "prompt": jax.random.uniform(key, (tokens, site.shape[-1]), minval=-0.5, maxval=0.5)
        }

    def call(site: Site, leaves: Leaves, x: Array, here: Here) -> Array:
        del here
        if site.side == "in":  # the encoder makes room behind the sequence
            rows = jnp.broadcast_to(leaves["prompt"], (*x.shape[:-2], *leaves["prompt"].shape))
            return jnp.concatenate([rows.astype(x.dtype), x[..., :-tokens, :]], axis=-2)
        text = jnp.roll(x, -tokens, axis=-2)
        return text.at[..., 0, :].set(x[..., 0, :]) if pools else text

    return Method(
        "hub_prompt",
        start,
        None,
        fits=lambda site: site.path in (f"{module}:in", f"{module}:out"),
        bare=lambda site: site.path in (f"{module}:in", f"{module}:out"),
        options={"tokens": tokens, "pools": pools, "module": module},
        call=call,
        needs=Needs(grows=((module, tokens),)),
    )


def gated_ia3() -> Method:
    """(IA)^3 with a gate: `y' = g * l * y`, `g = mean(sigmoid(h . gate + gate_bias))`.

    h is what the linear map is given; the mean is over positions. Leaves `l` (stack..., out),
    `gate` (stack..., in) and `gate_bias` (stack...). A fresh adapter halves what it scales.

    Returns:
        A method for the outputs of linear maps, "**/key:out".

    Reference:
        Mao et al. 2021, arXiv:2110.07577, for the gate.
    """

    def start(key: Array, site: Site, weight: Any) -> Leaves:
        *stack, out = site.shape
        wide = parts.widths(site)["input"]
        gate = 0.02 * jax.random.normal(key, (*stack, wide))
        return {"l": jnp.ones((*stack, out)), "gate": gate, "gate_bias": jnp.zeros(tuple(stack))}

    def call(site: Site, leaves: Leaves, y: Array, here: Here) -> Array:
        del site
        score = here.sources["input"].astype(jnp.float32) @ leaves["gate"] + leaves["gate_bias"]
        return y * leaves["l"] * jax.nn.sigmoid(score).mean(axis=-1)[..., None, None]

    return Method(
        "gated_ia3", start, None, lambda site: site.side == "out", lambda site: False, call=call
    )
