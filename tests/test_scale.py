"""Large models by their shapes alone: counts, no memory, and no surprise in the trace."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxpeft as jp
from jaxpeft.models import Decoder, DecoderConfig
from jaxpeft.models.config import from_hf

TOKENS = jax.ShapeDtypeStruct((1, 8), jnp.int32)
LLAMA_2_7B = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False,
)  # fmt: skip
LLAMA_3_8B = LLAMA_2_7B | dict(
    vocab_size=128256, intermediate_size=14336, num_key_value_heads=8, rope_theta=5e5
)


def described(config: dict) -> tuple[Decoder, nnx.State]:
    shapes: DecoderConfig = from_hf({"model_type": "llama", **config})
    model = nnx.eval_shape(lambda: Decoder(shapes, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    return model, nnx.state(model)


def test_rank_8_on_q_and_v_of_llama_2_7b_adds_4194304_parameters():
    model, params = described(LLAMA_2_7B)
    tuned = jp.transform(model, jp.rules(("**/{q,v}_proj/kernel", jp.lora(8))))
    adapter = tuned.init(jax.random.key(0), params, TOKENS)
    # 32 layers x 2 maps x 8 x (4096 + 4096), as Hu et al. 2021 count.
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter)) == 4_194_304


def test_an_8b_model_is_tuned_by_its_shapes_without_a_weight():
    model, params = described(LLAMA_3_8B)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == pytest.approx(8.03e9, rel=1e-3)
    tuned = jp.transform(model, jp.lora(8))
    adapter = jax.eval_shape(tuned.init, jax.random.key(0), params, TOKENS)
    logits = jax.eval_shape(tuned.apply, adapter, params, TOKENS)
    assert logits.shape == (1, 8, 128256)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    real = tuned.init(jax.random.key(0), params, TOKENS)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(real))
