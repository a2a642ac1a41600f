"""Prompts, prefixes and side networks give the same tokens with a cache as without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpeft as jp
from jaxpeft.models.decoder import Decoder
from tests.methods.decoding import CONFIG, decoder, filled

MODEL, PARAMS = decoder()
# The second sequence has padding in front.
IDS = np.array([[1, 2, 3, 4], [0, 0, 5, 6]])
MASK = IDS > 0
NEW = 3
METHODS = {
    "prompt_tuning": jp.prompt_tuning(2),
    "prefix_tuning": jp.prefix_tuning(2, hidden=3),
    "p_tuning": jp.p_tuning(2, hidden=3),
    "llama_adapter": jp.llama_adapter(2),
    "prompt and prefix": jp.chain(jp.prompt_tuning(2), jp.prefix_tuning(1)),
    "ladder": jp.rules(("norm:in", jp.ladder(2, 2))),
    "layers": jp.layers(jp.chain(jp.houlsby(width=2), jp.llama_adapter(2)), [1]),
}


@pytest.mark.parametrize("name", METHODS)
def test_greedy_tokens_are_those_without_a_cache(name):
    tuned = jp.transform(MODEL, METHODS[name])
    adapter = filled(jax.eval_shape(tuned.init, jax.random.key(0), PARAMS, IDS))
    slots = IDS.shape[1] + NEW + tuned.virtual_tokens
    new = jp.serve.generate(
        tuned.apply, (adapter, PARAMS), IDS, mask=MASK, max_new_tokens=NEW,
        cache=MODEL.init_cache(2, slots, jnp.float32),
    )  # fmt: skip
    # All the tokens at once, without a cache: each is the likeliest after those before it.
    text = np.concatenate([IDS, new], 1)
    mask = np.concatenate([MASK, np.ones_like(new, bool)], 1)
    logits, plain = jax.jit(
        lambda text, mask: (
            tuned.apply(adapter, PARAMS, text, mask=mask), MODEL.apply(PARAMS, text, mask=mask)
        )
    )(text, mask)  # fmt: skip
    np.testing.assert_array_equal(new, logits[:, IDS.shape[1] - 1 : -1].argmax(-1))
    assert np.abs(logits - plain)[mask].max() > 1e-2


@pytest.mark.parametrize("name", ["prefix_tuning", "prompt_tuning", "llama_adapter"])
def test_remat_changes_neither_outputs_nor_gradients(name):
    nothing = jax.checkpoint_policies.nothing_saveable
    models = [
        nnx.eval_shape(lambda remat=remat: Decoder(CONFIG, remat=remat, rngs=nnx.Rngs(0)))
        for remat in (None, nothing)
    ]
    tuned = [jp.transform(model, METHODS[name]) for model in models]
    adapter = filled(jax.eval_shape(tuned[0].init, jax.random.key(0), PARAMS, IDS))

    def loss(one):
        def of(adapter):
            y = one.apply(adapter, PARAMS, IDS, mask=MASK)
            return jnp.sin(y).sum(), y

        return jax.value_and_grad(of, has_aux=True)

    kept, again = jax.jit(lambda adapter: [loss(one)(adapter) for one in tuned])(adapter)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(kept[1]))
