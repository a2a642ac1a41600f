"""Ladder side-tuning: a small network beside the model, which reads its layers' outputs.

u_i = m_i s_{i-1} + (1 - m_i) h_i D_i,   v_i = u_i + attention(norm(u_i)) or v_i = u_i

s_i = v_i + gelu(norm(v_i) A_i) B_i,   x' = x + s_L U
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpeft.core.method import Leaves, Method, Needs
from jaxpeft.core.sharding import vary, varying
from jaxpeft.core.site import Site
from jaxpeft.core.tap import Here
from jaxpeft.core.virtual import MASKS
from jaxpeft.methods.attend import attend, attention_leaves, visible

Array = jax.Array

# Of the sigmoid that mixes a layer's output into the side network.
_TEMPERATURE = 0.1


def ladder(
    width: int,
    layers: int,
    *,
    heads: int | None = None,
    causal: bool = True,
    mask: str | None = None,
    hidden: int | None = None,
    reads: str = "layers:out",
    dtype: Any = jnp.float32,
) -> Method:
    """Ladder side-tuning (LST): the model is tuned by a side network, and never differentiated.

    Layer i of the side network mixes its state `s`, which starts at zero, with the model's layer
    output `h_i`, with `m_i = sigmoid(a_i / 0.1)` and `D_i` from the model's width d to `width`;
    norm is a layer norm without parameters. The last state is added to the activations at the
    site, in front of the final norm for instance. The backward pass goes from there through the
    side network and stops at the layers' outputs: of the layers themselves nothing else is kept,
    and nothing is differentiated. With `heads` side layers are transformer blocks, as in the paper,
    which attend to the tokens before them (or all, `causal=False`, as an encoder's). Without, they
    work on each token by itself, have what the model's own layers gathered, and generate with a
    cache; attention refuses one. The paper's blocks are copies of the model's own, made smaller by
    pruning; these have no biases, no positions, and norms without parameters.

    Leaves: `mix` (layers,) zero, `down` (layers, d, width), `first` (layers, width, hidden) and
    `second` (layers, hidden, width), normal with a standard deviation of one over the root of their
    inputs, `up` (width, d) zero: `layers * (1 + width * (d + 2 hidden)) + width * d` parameters.
    With heads also `query`, `key`, `value` and `output` (layers, width, width), like the others:
    `4 * layers * width^2` more. A fresh adapter changes nothing.

    Args:
        width: of the side network; the paper's is the model's divided by 8.
        layers: of the side network, as many as there are outputs to read.
        heads: of the attention, among which the width is divided; None for none.
        causal: whether tokens see those before them alone, or all.
        mask: name of the argument of the model's call that says which tokens are no padding,
            `bool[B, T]`; by default the first of the usual names ("mask", "attention_mask", ...)
            that is given; "" for none. Padding is not seen.
        hidden: width of the layers' inner part; `4 * width` when absent.
        reads: glob over the call boundaries that are read: one that is stacked over a scan's
            layers, or one a layer. They lie in front of the site, outside of loops around it.
        dtype: of the leaves; products are computed in the dtype of the activations.

    Returns:
        A method for a call boundary, by rules.

    Raises:
        ValueError: if a number is out of range, here or when the outputs are not as many.

    Example:
        >>> import jaxpeft as jp
        >>> tuning = jp.rules(("norm:in", ladder(96, layers=30)))

    Reference:
        Sung et al. 2022, arXiv:2206.06522.
    """
    for name, value in (("width", width), ("layers", layers), ("hidden", hidden or 1)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is out of range. Use a positive int.")
    if heads is not None and (not isinstance(heads, int) or heads < 1 or width % heads):
        raise ValueError(f"heads={heads!r} do not divide width={width}. Use a divisor, or None.")
    inner = hidden or 4 * width

    def start(key: Array, site: Site, weight: Any) -> Leaves:
        del weight
        shapes = {
            "down": (layers, site.shape[-1], width),
            "first": (layers, width, inner),
            "second": (layers, inner, width),
        }
        keys = jax.random.split(key, len(shapes))
        leaves = {
            name: jax.random.normal(at, shape, dtype) / shape[1] ** 0.5
            for at, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        if heads:
            leaves |= attention_leaves(jax.random.fold_in(key, 1), (layers,), width, dtype)
        up = jnp.zeros((width, site.shape[-1]), dtype)
        return leaves | {"mix": jnp.zeros(layers, dtype), "up": up}

    def call(site: Site, leaves: Leaves, x: Array, here: Here) -> Array:
        seen = lax.stop_gradient(_outputs(site, x, here))
        if len(seen) != layers:
            raise ValueError(
                f"the ladder at {site.path!r} has {layers} layers and reads {len(seen)} outputs: "
                f"{', '.join(site.reads)}. Use ladder({width}, layers={len(seen)})."
            )
        leaves = {name: leaf.astype(x.dtype) for name, leaf in leaves.items()}
        side = {name: leaf for name, leaf in leaves.items() if name != "up"}
        zero = vary(jnp.zeros((*x.shape[:-1], width), x.dtype), tuple(varying(x)))
        keys = visible(x.shape[-2], causal, here.inputs["mask"]) if heads else None

        def step(state: Array, layer: tuple[Array, Leaves]) -> tuple[Array, None]:
            return _layer(state, *layer, heads, keys), None

        state, _ = lax.scan(step, zero, (seen, side))
        return x + state @ leaves["up"]

    return Method(
        "ladder",
        start,
        None,
        fits=lambda site: site.side in ("in", "out") and not site.sizes("stack"),
        bare=lambda site: False,
        options={
            "width": width, "layers": layers, "heads": heads, "causal": causal, "mask": mask,
            "hidden": hidden, "reads": reads,
        },
        call=call,
        needs=Needs(
            reads=(lambda site: (reads,),),
            mask=(MASKS if mask is None else (mask,)) if heads else (),
            sequence=bool(heads),
        ),
    )  # fmt: skip


def _outputs(site: Site, x: Array, here: Here) -> Array:
    """The layers' outputs (layers, ...), of a scan or one by one."""
    found = (here.sources[path] for path in site.reads)
    return jnp.concatenate([h if h.ndim > x.ndim else h[None] for h in found])


def _layer(
    state: Array, seen: Array, side: Mapping[str, Array], heads: int | None, keys: Array | None
) -> Array:
    mix = jax.nn.sigmoid(side["mix"] / _TEMPERATURE)
    mixed = mix * state + (1 - mix) * (seen @ side["down"])
    if heads and keys is not None:
        mixed = mixed + attend(side, _norm(mixed), heads, keys)
    return mixed + jax.nn.gelu(_norm(mixed) @ side["first"]) @ side["second"]


def _norm(x: Array) -> Array:
    return jax.nn.standardize(x.astype(jnp.float32)).astype(x.dtype)
