"""Cartridges against PEFT's, and against the model that reads the text itself."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import CartridgeConfig, get_peft_model
from peft.tuners.cartridge.utils import prompt_embeddings_from_past_key_values

import jaxpeft as jp
from jaxpeft.core.capture import capture
from jaxpeft.methods.cartridge import cartridge
from jaxpeft.methods.cartridge_prefix import compose_prefixes, prefix_from_tokens
from tests.models.tiny import SIZES, make_model

LAYERS, HEADS = SIZES["num_hidden_layers"], SIZES["num_key_value_heads"]
RNG = np.random.default_rng(0)
TEXT, OTHER, IDS = (RNG.integers(3, 64, shape) for shape in ((1, 6), (1, 5), (2, 7)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    theirs = make_model("llama")
    theirs.save_pretrained(directory)
    return theirs, *jp.models.load(directory, dtype=jnp.float32)


@pytest.fixture(scope="module")
def started(llama):
    """Two texts' cartridges of 4 and 3 tokens, the first with 2 frozen ones."""
    _, model, params = llama
    found = []
    for tokens, frozen, text in ((4, 2, TEXT), (3, 1, OTHER)):
        tuned = jp.transform(model, cartridge(tokens, frozen=frozen))
        fresh = tuned.init(jax.random.key(0), params, IDS)
        found.append((tuned, prefix_from_tokens(tuned, fresh, params, text)))
    return found


def packed(adapter):
    """The leaves as PEFT writes them: (tokens, layers * 2 * heads * width)."""
    sides = [adapter[f"layers/self_attn:{side}"] for side in ("key", "value")]
    rows = [np.concatenate([s["frozen"], s["prefix"]], axis=1) for s in sides]
    return np.stack(rows, axis=1).transpose(2, 0, 1, 3, 4).reshape(rows[0].shape[1], -1)


def test_keys_and_values_of_a_text_are_those_of_peft(llama, started):
    theirs, _, _ = llama
    cache = theirs(torch.tensor(TEXT), use_cache=True).past_key_values
    legacy = [(layer.keys, layer.values) for layer in cache.layers]
    want = prompt_embeddings_from_past_key_values(legacy, num_virtual_tokens=4).detach()
    np.testing.assert_allclose(packed(started[0][1]), want, rtol=1e-4, atol=1e-5)


def test_behind_a_text_s_keys_and_values_the_model_is_behind_the_text(llama, started):
    _, model, params = llama
    tuned, adapter = started[0]
    both = np.concatenate([np.tile(TEXT[:, :4], (2, 1)), IDS], axis=1)
    want = jax.jit(model.apply)(params, both)[:, 4:]
    np.testing.assert_allclose(jax.jit(tuned.apply)(adapter, params, IDS), want, 1e-4, 1e-4)


def test_frozen_tokens_have_no_gradient_and_are_marked_fixed(llama, started):
    params = llama[2]
    tuned, adapter = started[0]
    grads = jax.jit(jax.grad(lambda a: jnp.sin(tuned.apply(a, params, IDS)).sum()))(adapter)
    marks = tuned.trainable(adapter)
    for path, leaves in grads.items():
        assert leaves["frozen"].shape[1] == 2 and not leaves["frozen"].any()
        assert (jnp.abs(leaves["prefix"]).max((0, 2, 3)) > 0).all()
        assert dict(marks[path]) == {"frozen": False, "prefix": True}


def test_composed_cartridges_are_peft_s(llama, started):
    theirs, model, params = llama
    composed = compose_prefixes(*(adapter for _, adapter in started))
    config = CartridgeConfig(num_virtual_tokens=7, num_frozen_tokens=2, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = get_peft_model(theirs, config).eval()
    rows = torch.tensor(np.concatenate([packed(adapter) for _, adapter in started]))
    theirs.prompt_encoder["default"].load_prompt_embeddings(rows)
    want = theirs(torch.tensor(IDS), attention_mask=torch.ones(IDS.shape, dtype=torch.int64)).logits
    tuned = jp.transform(model, cartridge(7, frozen=2))
    got = jax.jit(tuned.apply)(composed, params, IDS)
    np.testing.assert_allclose(got, want.detach(), rtol=1e-4, atol=1e-4)
    shapes = jax.eval_shape(tuned.init, jax.random.key(0), params, IDS)
    assert jax.tree.map(jnp.shape, dict(composed)) == jax.tree.map(jnp.shape, dict(shapes))


def test_reparameterized_prefixes_compose_to_a_flat_one(llama):
    _, model, params = llama
    methods = jp.prefix_tuning(2, hidden=3, width=4), jp.prefix_tuning(3)
    parts = [
        jp.transform(model, m).init(jax.random.key(i), params, IDS) for i, m in enumerate(methods)
    ]
    composed = compose_prefixes(*parts)
    (path, leaves), *_ = composed.items()
    site = next(site for site in parts[0].sites if site.path == path)
    first = jp.flat_prefix(parts[0][path], site)["prefix"]
    np.testing.assert_array_equal(leaves["prefix"][:, :2], first)
    np.testing.assert_array_equal(leaves["prefix"][:, 2:], parts[1][path]["prefix"])
    assert leaves["prefix"].shape == (LAYERS, 5, HEADS, 8)


def test_what_cannot_be_is_said(llama, started):
    _, model, params = llama
    tuned, adapter = started[0]
    with pytest.raises(ValueError, match="has 3 tokens at .* fewer than the prefix's 4"):
        prefix_from_tokens(tuned, adapter, params, TEXT[:, :3])
    with pytest.raises(ValueError, match=r"shape \(2, 7\): give one text"):
        prefix_from_tokens(tuned, adapter, params, IDS)
    lora = jp.transform(model, jp.lora(2))
    other = jax.eval_shape(lora.init, jax.random.key(0), params, IDS)
    with pytest.raises(ValueError, match="causal models with `cartridge`"):
        prefix_from_tokens(lora, other, params, TEXT)
    with pytest.raises(ValueError, match="prefixes at the same sites"):
        compose_prefixes(adapter, other)
    with pytest.raises(ValueError, match="frozen=4 is not a part of 4 tokens"):
        cartridge(4, frozen=4)
    with pytest.raises(ValueError, match="matched none of the .* boundaries"):
        capture(tuned.fn, "**:nowhere")(nnx.eval_shape(lambda: params), TEXT)
