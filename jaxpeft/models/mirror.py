"""A small decoder of a model's own kind, for the state of `jaxpeft.shadow` to start from."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpeft.core.method import Leaves
from jaxpeft.methods.shadow_backbone import Backbone
from jaxpeft.models.decoder import Decoder, count

Array = jax.Array


def mirror(
    model: Decoder, layers: int = 1, *, intermediate: int | None = None, heads: int | None = None
) -> Backbone:
    """PEFT's "mirror": `s = norm(layers(embeddings))`, fresh layers of the model's own kind.

    Leaves: `layers` and `norm`, named as the model's own parameters: as many parameters as that
    many of its layers have.

    Args:
        model: a decoder of `jaxpeft.models`, whose widths and constants it has.
        layers: how many it has itself.
        intermediate: width of its feed-forward networks; the model's when absent.
        heads: number of its query heads, of the model's width; the model's when absent.

    Returns:
        A backbone for `jaxpeft.shadow(rank, backbone=...)`. Its tokens see each other, so that
        calls with a cache are refused.

    Raises:
        TypeError: if the model is no decoder.
        ValueError: if a number is no positive int.

    Example:
        >>> method = jp.shadow(8, backbone=jp.models.mirror(model))  # doctest: +SKIP
    """
    if not isinstance(model, Decoder):
        raise TypeError(
            f"{type(model).__name__} is no decoder of jaxpeft.models. Use jaxpeft.shadow(rank, "
            "blocks=1), whose network works on each token by itself."
        )
    for name, value in (("layers", layers), ("intermediate", intermediate), ("heads", heads)):
        absent = value is None and name != "layers"
        if not absent and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} is out of range. Use a positive int.")
    changes = {
        "vocab_size": 1,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate or model.config.intermediate_size,
        "num_attention_heads": heads or model.config.num_attention_heads,
    }
    config = dataclasses.replace(model.config, **changes, tie_word_embeddings=True)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))

    def init(key: Array, d: int, dtype: Any) -> Leaves:
        del d
        state = nnx.state(Decoder(config, dtype=dtype, rngs=nnx.Rngs(params=key)))
        leaves: Leaves = nnx.to_pure_dict(state)
        return {name: leaves[name] for name in ("layers", "norm")}

    def call(leaves: Leaves, x: Array, mask: Array | None) -> Array:
        unused = {"embed_tokens": {"embedding": jnp.zeros((1, x.shape[-1]))}}
        values = jax.tree.map(lambda leaf: leaf.astype(x.dtype), leaves | unused)
        state = jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(values))
        net = nnx.merge(graph, state)
        mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
        return net.norm(net.layered(x, count(mask), mask))

    options = {"mirror": layers, "intermediate": intermediate, "heads": heads}
    return Backbone(init, call, options, attends=True)
