"""Generation of encoder-decoders against transformers' own `generate`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxpeft as jp
from jaxpeft.serve import generate_seq2seq
from tests.models.tiny_t5 import MASK, MODELS
from tests.models.tiny_t5 import pairs as pairs
from tests.models.tiny_t5 import t5 as t5

NEW = 8


def expected_tokens(torch_model, tokens, start=None, start_mask=None, **kw):
    """The new tokens of transformers' greedy search."""
    given = {} if start is None else dict(decoder_input_ids=torch.tensor(start))
    if start_mask is not None:
        given |= dict(decoder_attention_mask=torch.tensor(start_mask.astype(int)))
    with torch.no_grad():
        out = torch_model.generate(
            torch.tensor(tokens), attention_mask=torch.tensor(MASK.astype(int)), do_sample=False,
            max_new_tokens=NEW, **given, **kw,
        )  # fmt: skip
    new = out[:, 1 if start is None else start.shape[1] :].numpy()
    return np.pad(new, ((0, 0), (0, NEW - new.shape[1])))


def run(tiny, tokens, apply=None, state=None, slots=12, **kw):
    kw = dict(max_new_tokens=NEW, mask=MASK, eos_token_id=None) | kw
    cache = tiny.model.init_cache(2, slots)
    apply, state = apply or tiny.model.apply, state or (tiny.params,)
    return generate_seq2seq(apply, state, tokens, cache=cache, **kw)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_transformers(t5, pairs, name):
    expected = expected_tokens(t5(name).torch_model, pairs[0])
    assert len(np.unique(expected)) > 5
    np.testing.assert_array_equal(run(t5(name), pairs[0]), expected)


def test_a_beginning_is_continued_whatever_its_padding(t5, pairs):
    left = np.array([[0, 7, 9], [0, 0, 5]])
    left_mask = np.array([[True, True, True], [False, True, True]])
    expected = expected_tokens(t5("flan").torch_model, pairs[0], left, left_mask)
    right, right_mask = np.array([[0, 7, 9], [0, 5, 0]]), np.array([[1, 1, 1], [1, 1, 0]])
    for start, mask in ((left, left_mask), (right, right_mask)):
        actual = run(t5("flan"), pairs[0], decoder_tokens=start, decoder_mask=mask)
        np.testing.assert_array_equal(actual, expected)


def test_stops_at_end_tokens_and_pads(t5, pairs):
    free = expected_tokens(t5("flan").torch_model, pairs[0])
    ends = [int(free[0, 2]), int(free[1, 4])]
    expected = expected_tokens(t5("flan").torch_model, pairs[0], eos_token_id=ends)
    assert (expected == 0).any()
    np.testing.assert_array_equal(run(t5("flan"), pairs[0], eos_token_id=ends), expected)


def noisy(adapter):
    """An adapter that changes what the model says."""
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten(
        [0.5 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


TUNINGS = {
    "weights": jp.rules(("**/{q,k,v}/kernel", jp.lora(2))),
    "boundaries": jp.rules(("**/layer/*:delta", jp.bottleneck(2)), ("**/k:out", jp.bottleneck(2))),
    "prompt": jp.prompt_tuning(3),
    "prefix": jp.prefix_tuning(2),
    "prefix with positions": jp.prefix_tuning(2, shift=True),
}


@pytest.mark.parametrize("name", TUNINGS)
def test_a_tuned_model_continues_with_the_likeliest_token(t5, pairs, name):
    """Each new token is the argmax of a call without a cache on all that came before it."""
    tiny, tokens = t5("flan"), pairs[0]
    tuned = jp.transform(tiny.model, TUNINGS[name])
    adapter = noisy(tuned.init(jax.random.key(0), tiny.params, *pairs, mask=MASK))
    state, slots = (adapter, tiny.params), 9 + tuned.virtual_tokens
    new = run(tiny, tokens, tuned.apply, state, slots)
    written = np.concatenate([np.zeros((2, 1), int), new], axis=1)
    logits = jax.jit(tuned.apply)(*state, tokens, written[:, :-1], mask=MASK)
    np.testing.assert_array_equal(new, logits.argmax(-1))
    assert not np.array_equal(new, run(tiny, tokens))


def test_new_weights_and_keys_need_no_recompilation(t5, pairs):
    tiny, traced, seen, results = t5("flan"), [], [], []

    def apply(params, *inputs, **kw):
        traced.append(1)
        return tiny.model.apply(params, *inputs, **kw)

    params = tiny.params
    for seed, temperature in ((0, 0.7), (1, 1.3)):
        params = jax.tree.map(lambda x: x * 1.01, params)
        kw = dict(key=jax.random.key(seed), temperature=temperature, top_k=20, top_p=0.9)
        results.append(np.asarray(run(tiny, pairs[0], apply, (params,), **kw)))
        seen.append(len(traced))
    assert seen[0] == seen[1] and not np.array_equal(*results)


def test_what_is_read_is_encoded_once(t5, pairs):
    tiny, calls = t5("flan"), []

    def apply(params, tokens, *inputs, **kw):
        calls.append(tokens is None)
        return tiny.model.apply(params, tokens, *inputs, **kw)

    run(tiny, pairs[0], apply)
    assert calls[0] is False and all(calls[1:]) and len(calls) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=1.0), "jax.random.key"),
        (dict(slots=8), r"init_cache\(2, 9\)"),
        (dict(mask=np.ones((2, 3), bool)), r"mask has shape \(2, 3\) but tokens have \(2, 13\)"),
        (dict(decoder_tokens=jnp.zeros((2, 0))), r"decoder_tokens have shape \(2, 0\)"),
        (dict(decoder_tokens=jnp.zeros((3, 1))), "decoder_tokens are 3 sequences"),
    ],
)
def test_errors_name_the_setting(t5, pairs, settings, message):
    with pytest.raises(ValueError, match=message):
        run(t5("flan"), pairs[0], **settings)
