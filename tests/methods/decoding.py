"""A decoder of two layers, made without computing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpeft.models.config import from_hf
from jaxpeft.models.decoder import Decoder

CONFIG = from_hf(
    dict(
        model_type="qwen2", vocab_size=11, hidden_size=8, intermediate_size=12,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    )
)  # fmt: skip
IDS = np.array([[1, 2, 3], [4, 5, 6]])


@functools.cache
def decoder():
    """The model, and random params."""
    model = nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))
    return model, filled(nnx.state(model))


def filled(shapes):
    """Random arrays of these shapes; of one axis, or layers of such, around one as of norms."""
    random = np.random.default_rng(0)

    def fill(leaf):
        values = random.standard_normal(leaf.shape) * (0.3 if leaf.ndim < 3 else 0.5)
        return jnp.asarray(values + (leaf.ndim == 1), leaf.dtype)

    return jax.tree.map(fill, shapes)
