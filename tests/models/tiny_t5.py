"""Tiny random T5s of transformers, saved as Hugging Face directories: the oracle for ours."""

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
import transformers

from jaxpeft.models import load

SIZES = dict(
    vocab_size=64,
    d_model=32,
    d_kv=6,
    d_ff=48,
    num_layers=3,
    num_decoder_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=10,
    decoder_start_token_id=0,
)
# `model_type`, options, and whether the head is untied.
MODELS = {
    "t5": ("t5", dict(feed_forward_proj="relu"), False),
    "flan": ("t5", dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False), True),
    "mt5": ("mt5", dict(feed_forward_proj="gated-gelu"), True),
}
MASK = np.ones((2, 13), bool)
MASK[0, 10:] = MASK[1, :4] = False
DECODER_MASK = np.ones((2, 12), bool)
DECODER_MASK[0, 9:] = False


class Tiny(NamedTuple):
    """A model of transformers, where it is saved, and ours of the same weights."""

    torch_model: Any
    directory: Any
    model: Any
    params: Any
    apply: Any


def make_t5(name):
    """A random model in float32 whose attention and norms matter, its text not one token alone."""
    model_type, options, untied = MODELS[name]
    config = transformers.AutoConfig.for_model(model_type, **SIZES | options)
    torch.manual_seed(4)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if tensor.ndim == 1:
                tensor.add_(0.3 * torch.randn_like(tensor))
            else:
                tensor.mul_(0.5 if "shared" in key else 1.5)
        if untied:
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.generation_config.eos_token_id = None
    return model.eval()


@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    """`t5(name)` gives a `Tiny`."""
    made = {}

    def get(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            torch_model = make_t5(name)
            torch_model.save_pretrained(directory)
            model, params = load(directory)
            made[name] = Tiny(torch_model, directory, model, params, jax.jit(model.apply))
        return made[name]

    return get


@pytest.fixture
def pairs():
    """Two rows of tokens to read, and two of tokens written, which start with 0."""
    rng = np.random.default_rng(0)
    tokens, decoder_tokens = rng.integers(2, 64, (2, 13)), rng.integers(2, 64, (2, 12))
    decoder_tokens[:, 0] = 0
    return tokens, decoder_tokens


def reference(model, tokens, decoder_tokens, mask=MASK, decoder_mask=DECODER_MASK):
    """The outputs of the transformers model."""
    arrays = (tokens, decoder_tokens, mask.astype(int), decoder_mask.astype(int))
    ids, decoder_ids, attention, decoder_attention = map(torch.tensor, arrays)
    with torch.no_grad():
        return model(
            input_ids=ids,
            decoder_input_ids=decoder_ids,
            attention_mask=attention,
            decoder_attention_mask=decoder_attention,
        )


def check(actual, expected, rtol=1e-5):
    """Equal to `rtol` of the largest value."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual) / scale, expected / scale, atol=rtol)
