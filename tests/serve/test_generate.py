"""Generation against transformers' own `generate` on the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxpeft.models import load
from jaxpeft.serve import generate, stream
from jaxpeft.serve.sample import keep_top_k, keep_top_p, sample

NEW = 8
LEFT = np.ones((2, 12), bool)
LEFT[1, :5] = False


@pytest.fixture
def model_and_params(oracle):
    return load(oracle("llama")[1])


def expected_tokens(model, tokens, mask, **kw):
    """The new tokens of transformers' greedy search."""
    tokens, mask = torch.tensor(tokens), torch.tensor(mask.astype(int))
    with torch.no_grad():
        out = model.generate(
            tokens, attention_mask=mask, do_sample=False, max_new_tokens=NEW, pad_token_id=0, **kw
        )
    new = out[:, tokens.shape[1] :].numpy()
    return np.pad(new, ((0, 0), (0, NEW - new.shape[1])))


def run(oracle, name, tokens, **kw):
    model, params = load(oracle(name)[1])
    cache = model.init_cache(len(tokens), tokens.shape[1] + NEW)
    return generate(model.apply, (params,), tokens, cache=cache, max_new_tokens=NEW, **kw)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama3", "mistral", "qwen2"])
def test_greedy_equals_transformers(oracle, tokens, name):
    model, _ = oracle(name)
    model.generation_config.eos_token_id = None
    expected = expected_tokens(model, tokens, LEFT)
    np.testing.assert_array_equal(run(oracle, name, tokens, mask=LEFT), expected)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_right_padding_equals_left_padding(oracle, tokens, name):
    right = np.stack([tokens[0], np.roll(tokens[1], -5)])
    mask = np.stack([LEFT[0], np.roll(LEFT[1], -5)])
    model, _ = oracle(name)
    model.generation_config.eos_token_id = None
    expected = expected_tokens(model, tokens, LEFT)
    np.testing.assert_array_equal(run(oracle, name, right, mask=mask), expected)


def test_stops_at_end_tokens_and_pads(oracle, tokens):
    model, _ = oracle("llama")
    model.generation_config.eos_token_id = None
    free = expected_tokens(model, tokens, LEFT)
    ends = [int(free[0, 2]), int(free[1, 4])]
    expected = expected_tokens(model, tokens, LEFT, eos_token_id=ends)
    assert (expected == 0).any()
    actual = run(oracle, "llama", tokens, mask=LEFT, eos_token_id=ends, pad_token_id=0)
    np.testing.assert_array_equal(actual, expected)


def test_loop_stops_early(model_and_params, tokens):
    calls = []

    def apply(tokens, *, mask, cache):
        jax.debug.callback(lambda: calls.append(1))
        return jax.nn.one_hot(jnp.full(tokens.shape, 7), 10), cache

    generate(apply, (), tokens, cache={}, max_new_tokens=50, eos_token_id=7)
    jax.effects_barrier()
    assert len(calls) == 1


def test_stream_yields_what_generate_returns(model_and_params, tokens):
    model, params = model_and_params
    kw = dict(max_new_tokens=NEW, temperature=0.9, top_k=20, top_p=0.9, key=jax.random.key(0))
    whole = generate(model.apply, (params,), tokens, cache=model.init_cache(2, 20), **kw)
    steps = list(stream(model.apply, (params,), tokens, cache=model.init_cache(2, 20), **kw))
    np.testing.assert_array_equal(np.stack(steps, axis=1), whole)


def test_stream_ends_when_all_have_ended(model_and_params, tokens):
    model, params = model_and_params
    kw = dict(max_new_tokens=NEW)
    free = generate(model.apply, (params,), tokens, cache=model.init_cache(2, 20), **kw)
    ends = [int(free[0, 1]), int(free[1, 3])]
    first = [np.flatnonzero(np.isin(row, ends))[0] for row in np.asarray(free)]
    steps = list(
        stream(
            model.apply, (params,), tokens, cache=model.init_cache(2, 20), eos_token_id=ends, **kw
        )
    )
    assert len(steps) == max(first) + 1


def test_new_weights_temperature_and_key_need_no_recompilation(model_and_params, tokens):
    model, params = model_and_params
    traced = []

    def apply(params, *inputs, **kw):
        traced.append(1)
        return model.apply(params, *inputs, **kw)

    results = []
    for seed, temperature in ((0, 0.7), (1, 1.3)):
        params = jax.tree.map(lambda x: x * 1.01, params)
        kw = dict(key=jax.random.key(seed), temperature=temperature, max_new_tokens=NEW)
        cache = model.init_cache(2, 20)
        results.append(np.asarray(generate(apply, (params,), tokens, cache=cache, **kw)))
        list(stream(apply, (params,), tokens, cache=cache, **kw))
        if seed == 0:
            seen = len(traced)
    assert len(traced) == seen
    assert not np.array_equal(*results)


def test_top_k_and_top_p_keep_what_transformers_keeps():
    logits = np.random.default_rng(0).normal(size=(5, 50)).astype(np.float32) * 3
    for k in (1, 5, 80):
        warp = transformers.TopKLogitsWarper(k)
        expected = warp(None, torch.tensor(logits)).numpy()
        np.testing.assert_array_equal(keep_top_k(jnp.array(logits), k), expected)
    for p in (0.1, 0.5, 0.95):
        expected = transformers.TopPLogitsWarper(p)(None, torch.tensor(logits)).numpy()
        np.testing.assert_array_equal(keep_top_p(jnp.array(logits), p), expected)


def test_samples_follow_the_distribution():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    draws = sample(jax.random.key(0), jnp.tile(logits, (20000, 1)), temperature=0.5, top_k=3)
    expected = np.array([0.5, 0.3, 0.15, 0.0]) ** 2
    expected /= expected.sum()
    shares = np.bincount(draws, minlength=4) / 20000
    # Five standard deviations of a binomial share at most.
    np.testing.assert_allclose(shares, expected, atol=5 * np.sqrt(0.25 / 20000))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=-1.0), "temperature=-1.0"),
        (dict(temperature=1.0), "jax.random.key"),
        (dict(temperature=1.0, top_k=0), "top_k=0"),
        (dict(temperature=1.0, top_p=1.5), "top_p=1.5"),
        (dict(max_new_tokens=9), r"init_cache\(2, 21\)"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(mask=np.ones((2, 3), bool)), r"mask has shape \(2, 3\)"),
    ],
)
@pytest.mark.parametrize("function", [generate, stream])
def test_errors_name_the_setting(model_and_params, tokens, function, settings, message):
    model, params = model_and_params
    kw = dict(max_new_tokens=NEW, cache=model.init_cache(2, 20)) | settings
    with pytest.raises(ValueError, match=message):
        function(model.apply, (params,), tokens, **kw)
