"""P-tuning: the networks against PEFT's, and the prompt against prompt tuning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PromptEncoder, PromptEncoderConfig

import jaxpeft as jp
from jaxpeft.methods.p_tuning import flat_prompt, p_tuning

N, D, HIDDEN, VOCABULARY = 3, 4, 5, 7
TABLE = np.random.default_rng(0).standard_normal((VOCABULARY, D)).astype(np.float32)
IDS = jnp.array([[1, 2, 6], [0, 4, 3]])


def model(params, tokens):
    """Every position sees those before it, so that a prompt has an effect."""
    x = jnp.take(params["table"], tokens, axis=0)
    return jnp.tanh(jnp.cumsum(x, axis=1)) @ params["table"].T


def encoder(kind, layers):
    """PEFT's network, and its weights as our leaves."""
    config = PromptEncoderConfig(
        num_virtual_tokens=N, token_dim=D, num_transformer_submodules=1, encoder_hidden_size=HIDDEN,
        encoder_reparameterization_type=kind.upper(), encoder_num_layers=layers,
    )  # fmt: skip
    theirs = PromptEncoder(config).double().eval()
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    leaves = {"embedding": state["embedding.weight"]}
    for i, name in enumerate(n for n in state if n.startswith("mlp") and n.endswith("weight")):
        leaves[f"kernel_{i}"] = state[name].T
        leaves[f"bias_{i}"] = state[name.replace("weight", "bias")]
    for i in range(layers if kind == "lstm" else 0):
        both = [f"l{i}", f"l{i}_reverse"]
        for ours, name in (("input", "weight_ih"), ("state", "weight_hh")):
            leaves[f"{ours}_{i}"] = np.stack([state[f"lstm_head.{name}_{at}"].T for at in both])
        pairs = [[state[f"lstm_head.bias_{k}_{at}"] for k in ("ih", "hh")] for at in both]
        leaves[f"gates_{i}"] = np.array(pairs).sum(1)
    rows = theirs(torch.arange(N)[None])[0].detach().numpy()
    return {name: jnp.asarray(leaf, jnp.float32) for name, leaf in leaves.items()}, rows


@pytest.mark.parametrize(("kind", "layers"), [("mlp", 2), ("lstm", 1), ("lstm", 2)])
def test_the_network_is_peft_s_and_the_prompt_is_put_in_front(kind, layers):
    tuned = jp.transform(model, p_tuning(N, encoder=kind, hidden=HIDDEN, layers=layers))
    params = {"table": TABLE}
    fresh = jax.eval_shape(tuned.init, jax.random.key(0), params, IDS)
    leaves, rows = encoder(kind, layers)
    assert jax.tree.map(jnp.shape, leaves) == jax.tree.map(jnp.shape, dict(fresh["table"]))
    np.testing.assert_allclose(flat_prompt(leaves)["prompt"], rows, rtol=1e-5, atol=1e-6)
    adapter = jp.Adapter({"table": leaves}, fresh.sites)
    wide = np.asarray(TABLE, np.float64)
    x = np.concatenate([np.broadcast_to(rows, (2, N, D)), wide[IDS]], axis=1)
    want = (np.tanh(np.cumsum(x, 1)) @ wide.T)[:, N:]

    def loss(adapter):
        y = tuned.apply(adapter, params, IDS)
        return jnp.sin(y).sum(), y

    grads, got = jax.jit(jax.grad(loss, has_aux=True))(adapter)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_the_flat_prompt_is_that_of_prompt_tuning():
    params = {"table": TABLE}
    methods = p_tuning(N, hidden=HIDDEN), jp.prompt_tuning(N)
    tuned, plain = (jp.transform(model, method) for method in methods)
    adapter = jax.jit(tuned.init)(jax.random.key(0), params, IDS)
    flat = jp.Adapter({"table": flat_prompt(adapter["table"])}, adapter.sites)
    got = jax.jit(plain.apply)(flat, params, IDS)
    np.testing.assert_allclose(got, jax.jit(tuned.apply)(adapter, params, IDS), rtol=1e-5)
    assert flat_prompt(flat["table"]) is flat["table"]


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_the_numbers_of_parameters_are_the_formulas(kind):
    tuned = jp.transform(model, p_tuning(N, encoder=kind, hidden=HIDDEN, layers=3))
    shapes = jax.eval_shape(tuned.init, jax.random.key(0), {"table": TABLE}, IDS)
    h, d = HIDDEN, D
    want = N * d + h * (2 * d + h + 2) + d
    if kind == "lstm":
        want = N * d + 8 * h * (d + h + 1) + 2 * 8 * h * (3 * h + 1)
        want += 2 * h * (2 * h + 1) + d * (2 * h + 1)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == want


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"encoder": "gru"}, 'neither "mlp" nor "lstm"'),
        ({"hidden": 0}, "hidden=0 is out of range"),
        ({"layers": 1.5}, "layers=1.5 is out of range"),
    ],
)
def test_arguments_are_checked(options, says):
    with pytest.raises(ValueError, match=says):
        p_tuning(3, **options)
