"""LLaMA-Adapter against PEFT's adaption prompt on a Llama, and against its formula elsewhere."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import AdaptionPromptConfig, get_peft_model

import jaxpeft as jp
from jaxpeft.methods.llama_adapter import llama_adapter
from tests.models.tiny import make_model

TOKENS, LAYERS, SITE = 4, 2, "layers/self_attn:context"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Ours and its params, loaded from what transformers saved, which PEFT then changes."""
    directory = tmp_path_factory.mktemp("llama")
    theirs = make_model("llama")
    theirs.save_pretrained(directory)
    model, params = jp.models.load(directory, dtype=jnp.float32)
    config = AdaptionPromptConfig(adapter_len=TOKENS, adapter_layers=LAYERS, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = get_peft_model(theirs, config).eval()
    found = [m for m in theirs.modules() if hasattr(m, "adaption_gate")]
    assert len(found) == LAYERS
    for i, module in enumerate(found):
        module.adaption_gate.data.fill_(0.7 - 1.5 * i)
    return theirs, found, model, params


@pytest.fixture(scope="module")
def tuned(llama):
    """Our tuning of the last layers, and the adapter with PEFT's leaves."""
    _, found, model, params = llama
    tuned = jp.transform(model, llama_adapter(TOKENS, layers=LAYERS))
    fresh = tuned.init(jax.random.key(0), params, jnp.ones((1, 3), jnp.int32))
    assert list(fresh) == [SITE] and not fresh[SITE]["gate"].any()
    prompts = [module.adaption_prompt[0].detach().numpy() for module in found]
    gates = [module.adaption_gate.item() for module in found]
    leaves = {
        "prompt": fresh[SITE]["prompt"].at[-LAYERS:].set(jnp.array(prompts)),
        "gate": jnp.array([0.3, *gates]),
        "on": fresh[SITE]["on"],
    }
    return tuned, fresh, jp.Adapter({SITE: leaves}, fresh.sites)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(3, 64, (2, 12))


def test_a_fresh_adapter_changes_nothing(llama, tuned, ids):
    _, _, model, params = llama
    method, fresh, _ = tuned
    expected = jax.jit(model.apply)(params, ids)
    np.testing.assert_allclose(jax.jit(method.apply)(fresh, params, ids), expected, 1e-5, 1e-5)


def test_outputs_and_gradients_are_peft_s(llama, tuned, ids):
    theirs, found, _, params = llama
    method, _, adapter = tuned
    logits = theirs(torch.tensor(ids)).logits
    torch.sin(logits).sum().backward()

    def loss(adapter):
        y = method.apply(adapter, params, ids)
        return jnp.sin(y).sum(), y

    grads, got = jax.jit(jax.grad(loss, has_aux=True))(adapter)
    np.testing.assert_allclose(got, logits.detach().numpy(), rtol=1e-4, atol=1e-4)
    assert np.abs(got - jax.jit(method.fn)(params, ids)).max() > 0.1
    for layer, module in enumerate(found, start=1):
        want = module.adaption_prompt.grad[0].numpy(), module.adaption_gate.grad.item()
        np.testing.assert_allclose(grads[SITE]["prompt"][layer], want[0], rtol=1e-2, atol=1e-3)
        assert float(grads[SITE]["gate"][layer]) == pytest.approx(want[1], rel=1e-3)
    # The first layer has no prompt: its leaves do not count, and do not move.
    assert not grads[SITE]["prompt"][0].any() and not grads[SITE]["gate"][0].any()
    assert not grads[SITE]["on"].any()


def test_the_number_of_layers_and_the_width_are_checked(llama, ids):
    _, _, model, params = llama
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"layers=9: .* has a stack of \(3,\) layers"):
        jp.transform(model, llama_adapter(4, layers=9)).init(key, params, ids)
    wrong = jp.transform(model, llama_adapter(4, width=5))
    adapter = wrong.init(key, params, ids)
    with pytest.raises(ValueError, match=r"has width 5, and .* Use llama_adapter\(4, width=32\)"):
        wrong.apply(adapter, params, ids)
    with pytest.raises(ValueError, match="layers=0 is out of range"):
        llama_adapter(4, layers=0)


class Attending(nn.Module):
    """Flax's own attention, which scales its queries and has kernels with an axis of heads."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = x + nn.MultiHeadDotProductAttention(num_heads=2, name=f"attn_{i}")(x)
        return x


def test_it_works_on_attentions_of_models_that_nobody_prepared():
    x = jax.random.normal(jax.random.key(1), (2, 5, 6))
    variables = Attending().init(jax.random.key(2), x)
    noise = jax.random.normal(jax.random.key(3), (6,))
    variables["params"]["attn_1"]["key"]["bias"] += noise.reshape(2, 3)
    rule = llama_adapter(3, keys="key", values="value", scale=1.0)
    tuned = jp.transform(Attending(), jp.rules(("attn_1:context", rule)))
    adapter = tuned.init(jax.random.key(4), variables, x)
    prompt, gate = adapter["attn_1:context"]["prompt"], 0.8
    leaves = {"prompt": prompt, "gate": jnp.array(gate)}
    got = jax.jit(tuned.apply)(jp.Adapter({"attn_1:context": leaves}, adapter.sites), variables, x)

    def linear(x, p, equation):
        return np.einsum(equation, x, np.asarray(p["kernel"], np.float64)) + np.asarray(p["bias"])

    def softmax(scores):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    want = np.asarray(x, np.float64)
    for name, learned in (("attn_0", None), ("attn_1", np.asarray(prompt, np.float64))):
        p = variables["params"][name]
        q, k, v = (linear(want, p[n], "btd,dnh->btnh") for n in ("query", "key", "value"))
        read = np.einsum("bnts,bsnh->btnh", softmax(np.einsum("btnh,bsnh->bnts", q, k) / 3**0.5), v)
        if learned is not None:
            k, v = (linear(learned, p[n], "sd,dnh->snh") for n in ("key", "value"))
            weights = softmax(np.einsum("btnh,snh->bnts", q, k) / 3**0.5)
            read = read + gate * np.einsum("bnts,snh->btnh", weights, v)
        want = want + linear(read, p["out"], "btnh,nhd->btd")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
