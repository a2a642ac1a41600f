"""Heads: what a task makes of an encoder's hidden states.

Letters in shapes: B texts, T tokens, D model, C classes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxpeft.models.bert_config import BertConfig
from jaxpeft.models.decoder import Linear
from jaxpeft.models.tasks import ANSWER, CLASSIFY, EMBED, REGRESS, TAG


class Pooler(nnx.Module):
    """`y = tanh(W x + b)` of the first token's state `x`, `[B, T, D]` to `[B, D]`."""

    def __init__(self, width: int, **kw: Any):
        self.dense = Linear((width, width), bias=True, **kw)

    def __call__(self, states: Array) -> Array:
        return jnp.tanh(self.dense(states[:, 0]))


class ClassificationHead(nnx.Module):
    """RoBERTa's: `logits = V tanh(W x + b) + c` of the first token, `[B, T, D]` to `[B, C]`."""

    def __init__(self, width: int, outputs: int, **kw: Any):
        self.dense = Linear((width, width), bias=True, **kw)
        self.out_proj = Linear((width, outputs), bias=True, **kw)

    def __call__(self, states: Array) -> Array:
        return self.out_proj(jnp.tanh(self.dense(states[:, 0])))


def head_modules(config: BertConfig) -> tuple[str, ...]:
    """The paths of the head's linear maps, which are their names in Hugging Face's files too.

    The last one gives the logits. BERT's pooler is part of the bare model.
    """
    if config.task == ANSWER:
        return ("qa_outputs",)
    if config.task in (CLASSIFY, REGRESS) and config.counts_tokens:
        return ("classifier/dense", "classifier/out_proj")
    if config.task in (CLASSIFY, REGRESS) and config.model_type == "distilbert":
        return ("pre_classifier", "classifier")
    return ("classifier",) if config.task in (CLASSIFY, REGRESS, TAG) else ()


def make_heads(config: BertConfig, **kw: Any) -> dict[str, nnx.Module]:
    """The modules behind the encoder, by their names in the model."""
    width, outputs = config.hidden_size, config.outputs
    made: dict[str, nnx.Module] = {}
    if config.has_pooler:
        made["pooler"] = Pooler(width, **kw)
    for module in head_modules(config):
        name = module.partition("/")[0]
        if "/" in module:
            made[name] = ClassificationHead(width, outputs, **kw)
        else:
            size = width if name == "pre_classifier" else outputs
            made[name] = Linear((width, size), bias=True, **kw)
    return made


def run_heads(model: Any, config: BertConfig, states: Array, mask: Array | None) -> Array:
    """What the model is for, of its last hidden states.

    Args:
        model: holds the modules of `make_heads`.
        config: its configuration.
        states: `[B, T, D]`.
        mask: `[B, T]`, False at padding; None where there is none.

    Returns:
        Logits `float32[B, C]` of texts or `float32[B, T, C]` of tokens; `float32[B, T, 2]` for
        the start and the end of an answer; embeddings `float32[B, D]` of length 1; or, without a
        task, the states as they are.
    """
    if config.task is None:
        return states
    if config.task == EMBED:
        return embed(states, mask, config.pooling)
    if config.task == ANSWER:
        return model.qa_outputs(states).astype(jnp.float32)
    if config.task in (CLASSIFY, REGRESS):
        if config.model_type == "bert":
            states = model.pooler(states)
        elif config.model_type == "distilbert":
            states = jax.nn.relu(model.pre_classifier(states[:, 0]))
    return model.classifier(states).astype(jnp.float32)


def embed(states: Array, mask: Array | None, pooling: str) -> Array:
    """`e = p / |p|`, `p` the mean of the states that are no padding, or the first token's state.

    Args:
        states: `[B, T, D]`.
        mask: `[B, T]`, False at padding.
        pooling: "mean" or "cls".

    Returns:
        `float32[B, D]`.

    Example:
        >>> states = jnp.array([[[3.0, 4.0], [3.0, 4.0], [9.0, 9.0]]])
        >>> embed(states, jnp.array([[True, True, False]]), "mean")
        Array([[0.6, 0.8]], dtype=float32)

    References: Reimers and Gurevych 2019 (arXiv 1908.10084).
    """
    states = states.astype(jnp.float32)
    if pooling == "cls":
        return _unit(states[:, 0])
    weights = jnp.ones(states.shape[:2]) if mask is None else mask.astype(jnp.float32)
    total = jnp.einsum("btd,bt->bd", states, weights, precision="highest")
    return _unit(total / jnp.maximum(weights.sum(axis=1, keepdims=True), 1e-9))


def _unit(x: Array) -> Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
