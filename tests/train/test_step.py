import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jaxpeft import train


def run(tiny, optimizer, *, micro_batches=1, steps=1, key=0, dropout=False):
    state = train.init_state(
        tiny.adapter(dropout), optimizer, jax.random.key(key), trainable=tiny.trainable
    )
    step = train.make_step(
        tiny.loss_fn, optimizer, trainable=tiny.trainable, micro_batches=micro_batches
    )
    batches, history = tiny.batches(), []
    for i in range(steps):
        state, metrics = step(state, tiny.params, batches(i))
        history.append(metrics)
    return state, history, step


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_give_the_large_batch(tiny, micro_batches):
    # The rows hold different numbers of targets, so a mean of means would differ.
    (whole, [expected], _), (parts, [actual], _) = (
        run(tiny, optax.sgd(1.0), micro_batches=n) for n in (1, micro_batches)
    )
    for a, b in zip(jax.tree.leaves(parts.adapter), jax.tree.leaves(whole.adapter), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-7)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_gradient_is_that_of_the_mean_in_float64(tiny):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), tiny.params)
        batch, adapter = tiny.batches()(0), tiny.adapter()
        h = params["embedding"][batch.tokens] * batch.mask[..., None]
        h = h.cumsum(1) / batch.mask.cumsum(1)[..., None]
        w = params["kernel"] + np.float64(adapter["proj"]["a"]) @ np.float64(adapter["proj"]["b"])
        logits = torch.tensor(h @ w @ params["embedding"].T)
    labels = torch.tensor(np.where(batch.targets, batch.tokens, -100))[:, 1:].long()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 11), labels.reshape(-1))
    _, [metrics], _ = run(tiny, optax.sgd(1.0))
    np.testing.assert_allclose(metrics.loss, expected.item(), rtol=1e-6)
    assert float(metrics.tokens) == batch.targets[:, 1:].sum()


def test_steps_equal_torch_adamw_with_clipping(tiny):
    """The same gradients through `clip_grad_norm_` and `AdamW`, over three steps."""
    rate, decay, clip = 0.05, 0.1, 0.3
    weights = {k: torch.tensor(np.asarray(v), requires_grad=True) for k, v in _proj(tiny).items()}
    scale = torch.ones(8, requires_grad=True)
    leaves = [*weights.values(), scale]
    adamw = torch.optim.AdamW(leaves, lr=rate, weight_decay=decay, eps=1e-8)
    optimizer = train.optimizer(rate, weight_decay=decay, clip_norm=clip)
    norms = []
    for i in range(3):
        adamw.zero_grad()
        _torch_loss(tiny, weights, scale, tiny.batches()(i)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(leaves, clip)))
        adamw.step()
    state, history, _ = run(tiny, optimizer, steps=3)
    np.testing.assert_allclose([m.grad_norm for m in history], norms, rtol=1e-5)
    assert min(norms) > clip
    for name, x in weights.items():
        np.testing.assert_allclose(state.adapter["proj"][name], x.detach(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.adapter["head"]["scale"], scale.detach(), rtol=1e-5)


def _proj(tiny):
    return tiny.adapter()["proj"]


def _torch_loss(tiny, weights, scale, batch):
    params = {k: torch.tensor(np.asarray(v)) for k, v in tiny.params.items()}
    mask = torch.tensor(batch.mask).float()
    h = params["embedding"][torch.tensor(batch.tokens).long()] * mask[..., None]
    h = h.cumsum(1) / mask.cumsum(1)[..., None]
    h = h @ params["kernel"] + h @ weights["a"] @ weights["b"]
    logits = (h * scale) @ params["embedding"].T
    labels = torch.tensor(np.where(batch.targets, batch.tokens, -100))[:, 1:].long()
    return torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 11), labels.reshape(-1))


def test_fixed_leaves_stay_and_have_no_optimizer_state(tiny):
    optimizer = optax.adamw(0.1, weight_decay=0.5)
    state, _, _ = run(tiny, optimizer, steps=2)
    assert state.adapter["head"]["dropout"].dtype == bool  # not even differentiable
    shapes = [x.shape for x in jax.tree.leaves(state.opt_state)]
    assert sorted(shapes) == sorted([(), *2 * [(8,), (8, 2), (2, 8)]])


def test_labels_give_groups_their_own_rate(tiny):
    labels = {"proj": {"a": "slow", "b": "fast"}, "head": {"scale": "none", "dropout": "none"}}
    rules = {"slow": optax.sgd(0.1), "fast": optax.sgd(1.6), "none": optax.set_to_zero()}
    grouped, _, _ = run(tiny, optax.partition(rules, labels))
    plain, _, _ = run(tiny, optax.sgd(0.1))
    moved = [
        jax.tree.map(lambda x, y: np.asarray(x - y), s.adapter["proj"], _proj(tiny))
        for s in (grouped, plain)
    ]
    np.testing.assert_allclose(moved[0]["a"], moved[1]["a"])
    np.testing.assert_allclose(moved[0]["b"], 16 * moved[1]["b"], rtol=1e-3, atol=1e-6)
    assert (np.asarray(grouped.adapter["head"]["scale"]) == 1).all()


def test_one_trace_a_length(tiny):
    traced = []

    def loss_fn(adapter, params, batch, dropout_key):
        traced.append(batch.tokens.shape[1])
        return tiny.loss_fn(adapter, params, batch, dropout_key)

    key, batches = jax.random.key(0), tiny.batches(lengths=(8, 24))
    state = train.init_state(tiny.adapter(), tiny.optimizer, key, trainable=tiny.trainable)
    step = train.make_step(loss_fn, tiny.optimizer, trainable=tiny.trainable)
    for i in range(6):
        state, _ = step(state, tiny.params, batches(i))
    assert sorted(traced) == [8, 24]


def test_state_is_donated_and_the_callers_adapter_is_not(tiny):
    optimizer, adapter, key = optax.adam(0.1), tiny.adapter(), jax.random.key(0)
    state = train.init_state(adapter, optimizer, key, trainable=tiny.trainable)
    step = train.make_step(tiny.loss_fn, optimizer, trainable=tiny.trainable)
    step(state, tiny.params, tiny.batches()(0))
    assert state.adapter["proj"]["a"].is_deleted()
    assert not adapter["proj"]["a"].is_deleted()
    assert jax.random.uniform(key).shape == ()


def test_a_loss_that_is_not_finite_changes_nothing(tiny):
    optimizer = optax.adam(0.1)
    state = train.init_state(tiny.adapter(), optimizer, jax.random.key(0), trainable=tiny.trainable)
    before = jax.tree.map(np.asarray, state._replace(key=0))
    step = train.make_step(tiny.loss_fn, optimizer, trainable=tiny.trainable)
    params = jax.tree.map(lambda x: x * jnp.nan, tiny.params)
    state, metrics = step(state, params, tiny.batches()(0))
    assert np.isnan(metrics.loss)
    jax.tree.map(np.testing.assert_array_equal, state._replace(key=0), before)


def test_dropout_differs_by_step_and_repeats_by_key(tiny):
    same = [run(tiny, optax.sgd(0.0), steps=2, key=k, dropout=True)[1] for k in (0, 0, 1)]
    losses = [[float(m.loss) for m in history] for history in same]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    optimizer = optax.sgd(0.0)
    step = train.make_step(tiny.loss_fn, optimizer, trainable=tiny.trainable)
    state = train.init_state(
        tiny.adapter(True), optimizer, jax.random.key(0), trainable=tiny.trainable
    )
    state, first = step(state, tiny.params, tiny.batches()(0))
    state, second = step(state, tiny.params, tiny.batches()(0))
    assert float(first.loss) != float(second.loss)


def test_evaluation_is_the_mean_over_all_tokens(tiny):
    evaluation = train.make_evaluation(tiny.loss_fn)
    parts = train.evaluate(evaluation, tiny.adapter(), tiny.params, tiny.batches(3))
    whole = train.evaluate(evaluation, tiny.adapter(), tiny.params, tiny.batches(10))
    np.testing.assert_allclose(parts, whole, rtol=1e-6)


def test_errors_say_what_to_do(tiny):
    with pytest.raises(ValueError, match="4 rows cannot be split into micro_batches=3"):
        run(tiny, optax.sgd(0.1), micro_batches=3)
    with pytest.raises(ValueError, match="hold no target token"):
        train.evaluate(train.make_evaluation(tiny.loss_fn), {}, {}, [])
