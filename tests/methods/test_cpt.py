"""Context-aware prompt tuning against PEFT's module: rows, gradients, projection and loss."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from peft import CPTConfig
from peft.tuners.cpt import CPTEmbedding

import jaxpeft as jp
from jaxpeft.methods.cpt import cpt, moved_context, project_cpt
from jaxpeft.methods.cpt_loss import cpt_loss

D, VOCABULARY, RATE, STEPS = 4, 11, 0.05, 3
CONTEXT, KINDS = [5, 1, 2, 7, 9, 1, 3, 7, 10], [1, 2, 2, 3, 4, 5, 6, 7, 8]
TABLE = np.random.default_rng(0).standard_normal((VOCABULARY, D)).astype(np.float32)
PARAMS = {"table": TABLE}
IDS = np.array([[1, 2, 6], [0, 4, 3]])
OPTIONS = {"epsilon": 0.9, "format_epsilon": 0.4}


def model(params, tokens):
    x = jnp.take(params["table"], tokens, axis=0)
    return jnp.tanh(jnp.cumsum(x, axis=1)) @ params["table"].T


def config(**options):
    made = CPTConfig(
        cpt_token_ids=CONTEXT, cpt_mask=[1] * len(CONTEXT), cpt_tokens_type_mask=KINDS,
        opt_projection_epsilon=0.9, opt_projection_format_epsilon=0.4, task_type="CAUSAL_LM",
        **options,
    )  # fmt: skip
    made.token_dim = D
    return made


def peft_steps():
    """Some steps of SGD with PEFT's module; losses, deltas as each forward left them, the end."""
    table = torch.nn.Embedding(VOCABULARY, D, _weight=torch.tensor(TABLE))
    module = CPTEmbedding(config(), table)
    optimizer = torch.optim.SGD([module.delta_embedding.weight], lr=RATE)
    found = []
    for _ in range(STEPS):
        rows = module(torch.arange(len(CONTEXT))).expand(2, -1, -1)
        x = torch.cat([rows, torch.tensor(TABLE)[torch.tensor(IDS)]], 1)
        y = torch.tanh(torch.cumsum(x, 1)) @ torch.tensor(TABLE).T
        loss = torch.sin(y[:, len(CONTEXT) :]).sum()
        found.append((loss.item(), module.delta_embedding.weight.detach().numpy().copy()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module(torch.arange(len(CONTEXT)))
    return found, module.delta_embedding.weight.detach().numpy()


def test_training_with_the_projection_is_peft_s():
    tuned = jp.transform(model, cpt(CONTEXT, KINDS, **OPTIONS))
    adapter = tuned.init(jax.random.key(0), PARAMS, IDS)
    assert not adapter["table"]["delta"].any()
    np.testing.assert_array_equal(adapter["table"]["context"], TABLE[CONTEXT])
    optimizer = optax.masked(optax.sgd(RATE), tuned.trainable)
    state = optimizer.init(adapter)

    @jax.jit
    def step(adapter, state):
        value, grads = jax.value_and_grad(
            lambda a: jnp.sin(tuned.apply(a, PARAMS, IDS)).sum()
        )(adapter)  # fmt: skip
        updates, state = optimizer.update(grads, state, adapter)
        moved = optax.apply_updates(adapter, updates)
        return moved, project_cpt(moved), state, value

    theirs, end = peft_steps()
    for loss, delta in theirs:
        np.testing.assert_allclose(adapter["table"]["delta"], delta, rtol=1e-4, atol=1e-6)
        loose, adapter, state, value = step(adapter, state)
        assert float(value) == pytest.approx(loss, rel=1e-4)
        # Outputs are those of the projected adapter whether or not it was projected.
        rows = moved_context(loose["table"])
        np.testing.assert_allclose(rows, moved_context(adapter["table"]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(adapter["table"]["delta"], end, rtol=1e-4, atol=1e-6)
    norms = np.linalg.norm(end, axis=1) / np.sqrt(D / 2048)
    assert norms.max() == pytest.approx(0.9, rel=1e-3)  # some row has reached its ball
    np.testing.assert_array_equal(adapter["table"]["context"], TABLE[CONTEXT])


def test_labels_have_no_gradient_and_the_mask_says_what_is_trained():
    tuned = jp.transform(model, cpt(CONTEXT, KINDS, **OPTIONS))
    adapter = tuned.init(jax.random.key(0), PARAMS, IDS)
    grads = jax.jit(jax.grad(lambda a: tuned.apply(a, PARAMS, IDS).sum()))(adapter)["table"]
    moves = np.array(KINDS) % 4 != 0
    np.testing.assert_array_equal(np.abs(grads["delta"]).max(1) > 0, moves)
    assert not grads["context"].any() and not grads["radius"].any()
    assert dict(tuned.trainable(adapter)["table"]) == {
        "context": False,
        "delta": True,
        "radius": False,
    }


def test_a_fresh_adapter_is_the_model_with_the_context_in_front():
    tuned = jp.transform(model, cpt(CONTEXT, KINDS))
    adapter = tuned.init(jax.random.key(0), PARAMS, IDS)
    both = np.concatenate([np.broadcast_to(CONTEXT, (2, len(CONTEXT))), IDS], axis=1)
    want = model(PARAMS, both)
    np.testing.assert_allclose(tuned.apply(adapter, PARAMS, IDS), want[:, len(CONTEXT) :], 1e-5)
    kept = tuned.apply(adapter, PARAMS, IDS, virtual="keep")
    np.testing.assert_allclose(kept, want, rtol=1e-5)


@pytest.mark.parametrize("decay", [1.0, 0.7])
@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_is_peft_s(decay, padded):
    logits = np.random.default_rng(1).standard_normal((2, len(CONTEXT) + 5, VOCABULARY))
    labels = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]])
    given = np.array([[1, 2, 3, 4, 4], [2, 3, 4, 0, 0]]) if padded else np.full((2, 5), 4)
    labels = np.where(given == 0, -100, labels)
    kinds = np.concatenate([np.tile(KINDS, (2, 1)), np.where(given > 0, given + max(KINDS), 0)], 1)
    targets = np.concatenate([np.tile(CONTEXT, (2, 1)), labels], 1)
    targets = np.where((kinds > 0) & (kinds % 4 == 0), targets, -100)
    theirs = CPTEmbedding.calculate_loss(
        types.SimpleNamespace(logits=torch.tensor(logits)), torch.tensor(targets),
        torch.tensor(kinds), config(opt_weighted_loss_type="decay", opt_loss_decay_factor=decay),
    )  # fmt: skip
    options = {"input_types": jnp.asarray(given)} if padded else {}
    ours = jax.jit(lambda x, y: cpt_loss(x, y, CONTEXT, KINDS, decay=decay, **options))
    total, count = ours(logits, labels)
    assert float(total / count) == pytest.approx(float(theirs.loss), rel=1e-5)


def test_every_token_has_a_type():
    with pytest.raises(ValueError, match="2 ids and 1 types: give one type for each id"):
        cpt([1, 2], [1])
    with pytest.raises(ValueError, match="0 ids"):
        cpt([], [])
