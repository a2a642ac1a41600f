"""The methods of AdapterHub's files that the factories of `jaxpeft.methods` do not make.

Each is a plain `Method`, so an adapter that was read is trained and saved like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.method import Leaves, Method
from jaxpeft.core.site import Site
from jaxpeft.core.tap import Here
from jaxpeft.methods import parts
from jaxpeft.methods.bottleneck import bottleneck
from jaxpeft.methods.inits import kaiming_uniform
from jaxpeft.methods.prefix import prefix_tuning

Array = jax.Array


def in_layers(method: Method, layers: Sequence[bool]) -> Method:
    """A method on activations in some layers of a stack; the others stay as they are.

    Args:
        method: what is done there.
        layers: for each layer whether it is.

    Returns:
        The method, with a further leaf `on` (stack...) that is not trained; itself, if it is
        everywhere.
    """
    if all(layers):
        return method
    act = method.call
    assert act is not None

    def start(key: Array, site: Site, weight: Any) -> Leaves:
        return method.init(key, site, weight) | {"on": jnp.array(layers, jnp.float32)}

    def call(site: Site, leaves: Leaves, x: Array, here: Here) -> Array:
        return jnp.where(leaves["on"] > 0, act(site, leaves, x, here), x)

    options = {**method.options, "layers": [bool(on) for on in layers]}
    fixed = (*method.fixed, "on")
    return method._replace(init=start, call=call, options=options, fixed=fixed)


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
    most = max(widths)
    method = bottleneck(most, **options)
    kept = [width for width in widths if width]
    if min(kept) < most:
        f, name = parts.activation_named(options.get("activation", "relu"))
        if f(jnp.zeros(())) != 0:
            raise ValueError(f"layers of several widths need f(0) = 0, which {name!r} has not.")
    inside = jnp.arange(most) < jnp.array(widths)[:, None]

    def start(key: Array, site: Site, weight: Any) -> Leaves:
        leaves = method.init(key, site, weight)
        for name in ("down", "up", "down_bias"):
            if name in leaves:
                mask = inside.reshape(inside.shape + (1,) * (leaves[name].ndim - 2))
                leaves[name] = leaves[name] * mask
        return leaves

    shown = {**method.options, "widths": list(widths)}
    uneven = method._replace(init=start, options=shown)
    return in_layers(uneven, [width > 0 for width in widths])


def hub_prefix(
    tokens: int,
    *,
    hidden: int | None = None,
    width: int | None = None,
    activation: str = "tanh",
    shared: str = "prefix",
    gated: bool = False,
    dropout: float = 0.0,
) -> Method:
    """AdapterHub's prefix tuning: its reparameterization is one for all layers, and it has gates.

    Flat leaves, at the keys and the values of each attention: `prefix` (stack..., tokens, heads,
    head width). With `hidden`, all attentions have `embedding` (tokens, width), `down` (width,
    hidden) and `down_bias` in common, at "shared:...", and each has `up` (stack..., hidden, heads *
    head width) and `up_bias`. With gates, `gate` (stack..., d) and `gate_bias` (stack...).

    Args:
        tokens: length of the prefix.
        hidden: width of the reparameterization's hidden layer; None for the flat form.
        width: of its embedding, and of the model.
        activation: of the hidden layer, a name as for `bottleneck`.
        shared: the name under which the common leaves stand.
        gated: scale the prefix by `g = mean(sigmoid(h . gate + gate_bias))`, h being what the
            attention is given, and the mean over all of its positions, padding included.
        dropout: share of the prefix's entries that are dropped, when a key is given.

    Returns:
        A method for the sides ":key" and ":value" of attentions.
    """
    plain = prefix_tuning(tokens)
    f, name = parts.activation_named(activation)

    def start(key: Array, site: Site, weight: Any) -> Leaves:
        *stack, heads, size = site.shape
        keys = jax.random.split(key)
        leaves = plain.init(key, site, weight)
        if hidden is not None:
            up = kaiming_uniform(keys[0], (*stack, hidden, heads * size), hidden, hidden)
            leaves = {"up": up, "up_bias": jnp.zeros((*stack, heads * size))}
        if gated:
            leaves["gate"] = 0.02 * jax.random.normal(keys[1], (*stack, width or heads * size))
            leaves["gate_bias"] = jnp.zeros(tuple(stack))
        return leaves

    def common(key: Array) -> Leaves:
        keys = jax.random.split(key)
        assert hidden is not None and width is not None
        down = kaiming_uniform(keys[0], (width, hidden), width, hidden)
        embedding = jax.random.normal(keys[1], (tokens, width))
        return {"embedding": embedding, "down": down, "down_bias": jnp.zeros(hidden)}

    def call(site: Site, leaves: Leaves, x: Array, here: Here) -> Array:
        if hidden is None:
            rows = leaves["prefix"]
        else:
            one = leaves["shared"][shared]
            rows = f(one["embedding"] @ one["down"] + one["down_bias"])
            rows = rows @ leaves["up"] + leaves["up_bias"]
        rows = parts.dropped(rows.reshape(tokens, *x.shape[-2:]), dropout, here.key)
        if gated:
            h = here.sources[_input_of(site)]
            rows = _gate(leaves, h)[..., None, None, None] * rows
        return x.at[..., :tokens, :, :].set(rows.astype(x.dtype))

    options = {
        "tokens": tokens, "hidden": hidden, "width": width, "activation": name, "shared": shared,
        "gated": gated, "dropout": dropout,
    }  # fmt: skip
    needs = plain.needs
    if gated:
        needs = needs._replace(reads=(lambda site: (_input_of(site),),))
    return plain._replace(
        name="hub_prefix",
        init=start,
        call=call,
        options=options,
        shared={} if hidden is None else {shared: common},
        needs=needs,
    )


def _input_of(site: Site) -> str:
    return f"{site.path.rpartition(':')[0]}:in"


def _gate(leaves: Leaves, h: Array) -> Array:
    """`mean(sigmoid(h . gate + gate_bias))` over positions, one for each sequence."""
    score = h @ leaves["gate"].astype(h.dtype) + leaves["gate_bias"].astype(h.dtype)
    return jax.nn.sigmoid(score).mean(axis=-1)


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
        return y * leaves["l"] * _gate(leaves, here.sources["input"])[..., None, None]

    return Method(
        "gated_ia3", start, None, lambda site: site.side == "out", lambda site: False, call=call
    )


def invertible(
    reduction: float = 2.0, *, activation: str = "relu", layers: int | None = None
) -> Method:
    """An invertible adapter in the form of NICE: `y1 = x1 + F(x2)`, `y2 = x2 + G(y1)`.

    x1 and x2 are the halves of the features; F and G have one hidden layer each, leaves `f_down`,
    `f_down_bias`, `f_up`, `f_up_bias` and so on for `g`.

    Args:
        reduction: width of a half over that of the hidden layers.
        activation: of the hidden layers, a name as for `bottleneck`.
        layers: of a stack, at whose first layer's input it is; None for a place that is not
            stacked, such as "embeddings:out".

    Returns:
        A method for call boundaries.

    Reference:
        Pfeiffer et al. 2020, arXiv:2005.00052; Dinh et al. 2014, arXiv:1410.8516.
    """
    f, name = parts.activation_named(activation)

    def start(key: Array, site: Site, weight: Any) -> Leaves:
        *stack, features = site.shape
        half = features // 2
        leaves: Leaves = {}
        for part, wide, out in (("f", features - half, half), ("g", half, features - half)):
            inner = int(wide // reduction)
            for step, shape in (("down", (wide, inner)), ("up", (inner, out))):
                key, use = jax.random.split(key)
                leaves[f"{part}_{step}"] = 0.02 * jax.random.normal(use, (*stack, *shape))
                leaves[f"{part}_{step}_bias"] = jnp.zeros((*stack, shape[1]))
        return leaves

    def net(leaves: Leaves, part: str, x: Array) -> Array:
        for step in ("down", "up"):
            weight, bias = leaves[f"{part}_{step}"], leaves[f"{part}_{step}_bias"]
            x = x @ weight.astype(x.dtype) + bias.astype(x.dtype)
            x = f(x) if step == "down" else x
        return x

    def call(site: Site, leaves: Leaves, x: Array, here: Here) -> Array:
        del here
        half = site.shape[-1] // 2
        first = x[..., :half] + net(leaves, "f", x[..., half:])
        second = x[..., half:] + net(leaves, "g", first)
        return jnp.concatenate([first, second], axis=-1)

    method = Method(
        "invertible", start, None, parts.has_features, lambda site: False,
        {"reduction": reduction, "activation": name}, call=call,
    )  # fmt: skip
    return method if layers is None else in_layers(method, [i == 0 for i in range(layers)])
