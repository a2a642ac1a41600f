import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from jaxpeft import train

PEAK, STEPS = 3e-4, 40


def transformers_rates(name, warmup):
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    name = "constant_with_warmup" if name == "constant" else name
    rule = transformers.get_scheduler(name, sgd, num_warmup_steps=warmup, num_training_steps=STEPS)
    rates = []
    for _ in range(STEPS + 2):
        rates.append(rule.get_last_lr()[0])
        sgd.step()
        rule.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("name", train.SCHEDULES)
def test_schedules_equal_those_of_transformers(name, warmup):
    rate = train.schedule(name, PEAK, STEPS, warmup=warmup)
    actual = [float(rate(t)) for t in range(STEPS + 1)]
    np.testing.assert_allclose(
        actual, transformers_rates(name, warmup)[: STEPS + 1], rtol=1e-5, atol=1e-10
    )


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_decay_ends_at_end(name):
    rate = train.schedule(name, 1.0, 10, warmup=2, end=0.1)
    np.testing.assert_allclose([rate(2), rate(10), rate(50)], [1.0, 0.1, 0.1], rtol=1e-6)


def test_a_run_of_warmup_alone():
    assert float(train.schedule("cosine", 1.0, 4, warmup=4)(4)) == 1.0


@pytest.mark.parametrize("name", train.OPTIMIZERS)
def test_every_optimizer_descends(name):
    optimizer, x = train.optimizer(0.1, name=name), jnp.array([1.0, -2.0])
    updates, _ = optimizer.update(2 * x, optimizer.init(x), x)
    assert float(jnp.sum(optax.apply_updates(x, updates) ** 2)) < 5.0


@pytest.mark.parametrize("clip_norm", [None, 100.0])
def test_a_small_gradient_is_not_clipped(clip_norm):
    optimizer, x = train.optimizer(1.0, name="sgd", clip_norm=clip_norm), jnp.array([3.0, 4.0])
    np.testing.assert_array_equal(optimizer.update(x, optimizer.init(x), x)[0], -x)


def test_errors_name_the_choices():
    with pytest.raises(ValueError, match="'step'.*constant, linear, cosine"):
        train.schedule("step", 1.0, 10)
    with pytest.raises(ValueError, match=r"warmup=11 is outside \[0, steps=10\]"):
        train.schedule("linear", 1.0, 10, warmup=11)
    with pytest.raises(ValueError, match="'adagrad'.*adamw"):
        train.optimizer(0.1, name="adagrad")
