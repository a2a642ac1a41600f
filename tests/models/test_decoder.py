"""Decoders against transformers on the same random weights."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx

import jaxpeft as jp
from jaxpeft.models import Decoder, load
from tests.models.tiny import MODELS

PADDING = np.ones((2, 12), bool)
PADDING[1, :4] = False


def reference(model, tokens, **kw):
    """Logits of the transformers model as float32[B, T, V]."""
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens)), **kw).logits.numpy()


def check(actual, expected, rtol=1e-4):
    """Equal to `rtol` of the largest logit."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual) / scale, expected / scale, atol=rtol)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(oracle, tokens, name):
    torch_model, directory = oracle(name)
    model, params = load(directory)
    logits = model.apply(params, tokens)
    assert logits.dtype == jnp.float32
    check(logits, reference(torch_model, tokens))


@pytest.mark.parametrize("name", ["llama", "mistral", "llama3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(oracle, tokens, name, side):
    torch_model, directory = oracle(name)
    model, params = load(directory)
    mask = PADDING if side == "left" else PADDING[:, ::-1]
    logits = model.apply(params, tokens, mask=mask)
    # What transformers' own generate passes: positions counted over the real tokens.
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    expected = reference(
        torch_model,
        tokens,
        attention_mask=torch.tensor(mask.astype(int)),
        position_ids=torch.tensor(positions),
    )
    check(np.asarray(logits)[mask], expected[mask])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_a_bare_method_goes_where_peft_puts_all_linear(oracle, tokens, name):
    torch_model, directory = oracle(name)
    model, params = load(directory)
    adapter = jax.eval_shape(
        jp.transform(model, jp.lora(2)).init, jax.random.key(0), params, tokens
    )
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(copy.deepcopy(torch_model), config)
    trained, _ = wrapped.get_nb_trainable_parameters()
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter)) == trained


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2-tied"])
def test_cached_equals_uncached(oracle, tokens, name):
    model, params = load(oracle(name)[1])
    whole = model.apply(params, tokens)
    cache = model.init_cache(2, 16)
    parts = []
    for piece in (tokens[:, :7], tokens[:, 7:8], tokens[:, 8:]):
        logits, cache = model.apply(params, piece, cache=cache)
        parts.append(logits)
    check(jnp.concatenate(parts, axis=1), np.asarray(whole), rtol=1e-5)


def test_cache_after_left_padding(oracle, tokens):
    torch_model, directory = oracle("mistral")
    model, params = load(directory)
    logits, cache = model.apply(
        params, tokens[:, :8], mask=PADDING[:, :8], cache=model.init_cache(2, 12)
    )
    later, cache = model.apply(params, tokens[:, 8:], cache=cache)
    alone = reference(torch_model, tokens[1:, 4:])
    check(np.concatenate([logits[1:, 4:], later[1:]], axis=1), alone)
    np.testing.assert_array_equal(cache["count"], [12, 8])


def test_explicit_positions_shift_nothing_by_themselves(oracle, tokens):
    torch_model, directory = oracle("llama")
    model, params = load(directory)
    positions = np.arange(12)[None] * 2 + np.array([[0], [3]])
    expected = reference(torch_model, tokens, position_ids=torch.tensor(positions))
    check(model.apply(params, tokens, positions=positions), expected)


def test_gradient_equals_torch_whatever_is_recomputed(oracle, tokens):
    torch_model, directory = oracle("llama-tied")
    model, params = load(directory)
    torch_model.zero_grad()
    labels = torch.tensor(tokens)
    logits = torch_model(labels).logits
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    ).backward()
    expected = torch_model.model.layers[1].self_attn.q_proj.weight.grad.numpy().T
    table = torch_model.model.embed_tokens.weight.grad.numpy()
    torch_model.zero_grad()

    def loss(params, model):
        scores = jax.nn.log_softmax(model.apply(params, tokens)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1))

    policies = jax.checkpoint_policies
    for remat in (model.remat, policies.nothing_saveable, None):
        model.remat = remat
        grads = jax.grad(loss)(params, model)
        check(grads["layers"]["self_attn"]["q_proj"]["kernel"][...][1], expected)
        check(grads["embed_tokens"]["embedding"][...], table)


def test_bfloat16_stays_close_to_transformers_in_bfloat16(oracle, tokens):
    torch_model, directory = oracle("llama")
    model, params = load(directory, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    logits = model.apply(params, tokens)
    assert logits.dtype == jnp.float32
    # bfloat16 keeps 8 bits; three layers of random signs lose a little more than one of them.
    check(logits, reference(torch_model, tokens), rtol=5e-2)


def test_shapes_are_known_without_weights(oracle):
    model, params = load(oracle("qwen2")[1])
    abstract = nnx.split(model)[1]
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    assert jax.tree.structure(abstract) == jax.tree.structure(params)
    shapes = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, abstract, params)
    assert all(jax.tree.leaves(shapes))


def test_compiles_once_and_is_deterministic(oracle, tokens):
    model, params = load(oracle("llama")[1])
    step = jax.jit(model.apply)
    first, second = step(params, tokens), step(params, tokens + 1)
    assert step._cache_size() == 1
    assert not np.array_equal(first, second)


def test_random_weights_follow_the_seed(oracle):
    config = load(oracle("llama")[1])[0].config
    a, b, c = (nnx.state(Decoder(config, rngs=nnx.Rngs(seed))) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))
    kernel = lambda state: state["layers"]["mlp"]["up_proj"]["kernel"][...]  # noqa: E731
    assert not (kernel(a) == kernel(c)).all()
    assert float(kernel(a).std()) == pytest.approx(config.initializer_range, rel=0.05)
