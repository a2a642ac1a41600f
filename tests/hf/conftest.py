"""Fixtures for the tests of adapter files: tiny torch models as oracles, with peft on top."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from jaxpeft import models
from tests.models.tiny import make_model

# What peft and transformers say of their own doings, on purpose or by the versions' mismatch.
PEFT_WARNINGS = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "`is_gradient_checkpointing` is deprecated",
        "Setting `save_embedding_layers`",
        "fan_in_fan_out is set to True",
        "Model has `tie_word_embeddings=True`",
        "Could not find a config file",
        "Adapter .default.. .* LoRA tensor.s. have invalid shape",
    )
]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """`base(name)` gives a fresh torch model, and ours with its params, of the same weights."""
    made = {}

    def get(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            torch_model = make_model(name)
            torch_model.save_pretrained(directory)
            made[name] = (torch_model, *models.load(directory))
        torch_model, model, params = made[name]
        return copy.deepcopy(torch_model), model, params

    return get


@pytest.fixture(scope="session")
def tokens():
    return np.random.default_rng(1).integers(3, 64, (2, 6))


def randomize(torch_model, seed=0):
    """Random values for all that is trained, so that no factor is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in torch_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def torch_logits(torch_model, tokens):
    with torch.no_grad():
        return torch_model.eval()(torch.tensor(tokens)).logits.numpy()


def tune(torch_model, **options):
    """A peft model with random values, whose adapter differs from the base model."""
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]} | options
    tuned = peft.get_peft_model(torch_model, peft.LoraConfig(**options))
    randomize(tuned)
    return tuned


plain = functools.cache(lambda model: jax.jit(model.apply))


def merged_logits(model, tuned, adapter, params, tokens):
    """Logits of the plain model with merged weights."""
    return plain(model)(tuned.merge(adapter, params), tokens)


def check(actual, expected, rtol=1e-4):
    """Equal to `rtol` of the largest logit."""
    actual, scale = np.asarray(actual, jnp.float32), np.abs(expected).max()
    np.testing.assert_allclose(actual / scale, expected / scale, atol=rtol)
