import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxpeft.train import cross_entropy, next_token_loss

LOGITS = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32) * 4
TOKENS = np.random.default_rng(1).integers(0, 7, (3, 5))
TARGETS = np.random.default_rng(2).random((3, 5)) < 0.6


def test_cross_entropy_equals_the_formula_in_float64():
    x = LOGITS.astype(np.float64)
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    losses = -np.take_along_axis(log_p, TOKENS[..., None], -1)[..., 0]
    total, count = cross_entropy(LOGITS, TOKENS, TARGETS)
    np.testing.assert_allclose(total, losses[TARGETS].sum(), rtol=1e-6)
    assert float(count) == TARGETS.sum()


def test_next_token_loss_and_its_gradient_equal_torch():
    labels = np.where(TARGETS, TOKENS, -100)
    logits = torch.tensor(LOGITS, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 7), torch.tensor(labels[:, 1:].reshape(-1)), reduction="mean"
    )
    expected.backward()

    def mean(x):
        total, count = next_token_loss(x, jnp.asarray(TOKENS), jnp.asarray(TARGETS))
        return total / count

    loss, grad = jax.value_and_grad(mean)(jnp.asarray(LOGITS))
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(grad, logits.grad.numpy(), rtol=1e-5, atol=1e-8)


def test_labels_outside_the_vocabulary_do_not_matter_where_masked():
    labels = jnp.where(TARGETS, TOKENS, -100)
    loss = lambda x: cross_entropy(x, labels, jnp.asarray(TARGETS))[0]  # noqa: E731
    total, grad = jax.value_and_grad(loss)(jnp.asarray(LOGITS))
    assert float(total) == float(cross_entropy(LOGITS, TOKENS, TARGETS)[0])
    assert not np.asarray(grad)[~TARGETS].any()


def test_bfloat16_logits_are_summed_in_float32():
    logits = jnp.zeros((1, 4096, 3), jnp.bfloat16)
    total, count = cross_entropy(logits, jnp.zeros((1, 4096), int), jnp.ones((1, 4096), bool))
    assert total.dtype == count.dtype == jnp.float32
    np.testing.assert_allclose(total, 4096 * np.log(3), rtol=1e-5)
