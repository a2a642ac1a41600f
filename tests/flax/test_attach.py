"""The stateful nnx door gives what the pure functions give."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxpeft as jp

X = jax.random.normal(jax.random.key(0), (6, 4))
Y = jax.random.normal(jax.random.key(1), (6, 3))
TUNING = jp.rules(("first/kernel", jp.lora(2, dropout=0.5)), ("first:out", jp.bottleneck(2)))


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.drop, self.last = nnx.Dropout(0.2, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(self.norm(jnp.tanh(self.first(x)))))


def test_training_in_place_equals_training_by_pure_functions():
    attached = jp.nnx.attach(Net(), TUNING, X, key=jax.random.key(2))
    optimizer = nnx.Optimizer(attached, optax.adam(1e-2), wrt=jp.nnx.AdapterParam)
    wrt = nnx.DiffState(0, jp.nnx.AdapterParam)

    def loss_in_place(model, key):
        return ((model(X, dropout_key=key) - Y) ** 2).mean()

    tuned = jp.transform(Net(), TUNING)
    state = nnx.state(Net())
    adapter = tuned.init(jax.random.key(2), state, X)
    adam = optax.adam(1e-2)
    moments = adam.init(adapter)

    def loss_pure(adapter, state, key):
        y, state = tuned.apply(adapter, state, X, dropout_key=key, mutable=True)
        return ((y - Y) ** 2).mean(), state

    for step in range(3):
        key = jax.random.key(step)
        in_place, grads = nnx.value_and_grad(loss_in_place, argnums=wrt)(attached, key)
        optimizer.update(attached, grads)
        (pure, state), pure_grads = jax.value_and_grad(loss_pure, has_aux=True)(adapter, state, key)
        updates, moments = adam.update(pure_grads, moments)
        adapter = optax.apply_updates(adapter, updates)
        np.testing.assert_allclose(in_place, pure, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        attached.adapter,
        adapter,
    )
    ours, theirs = (nnx.filter_state(s, nnx.BatchStat) for s in (nnx.state(attached.base), state))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_optimizer_holds_state_for_the_adapter_alone_and_the_base_never_moves():
    base = Net()
    before = jax.tree.map(jnp.copy, nnx.state(base, nnx.Param))
    attached = jp.nnx.attach(base, TUNING, X, key=jax.random.key(2))
    optimizer = nnx.Optimizer(attached, optax.adam(1e-2), wrt=jp.nnx.AdapterParam)
    grads = nnx.grad(lambda m: (m(X) ** 2).sum(), argnums=nnx.DiffState(0, jp.nnx.AdapterParam))
    optimizer.update(attached, grads(attached))
    trained = sum(leaf.size for leaf in jax.tree.leaves(attached.adapter))
    held = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(optimizer.opt_state)))
    assert 2 * trained <= held <= 2 * trained + 2
    jax.tree.map(np.testing.assert_array_equal, nnx.state(base, nnx.Param), before)


def test_it_works_inside_nnx_jit():
    attached = jp.nnx.attach(Net(), TUNING, X, key=jax.random.key(2))
    attached.base.eval()
    expected = attached(X)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(attached, X), expected, rtol=1e-6)


def test_the_state_that_comes_back_has_the_frozen_params_not_the_tuned_ones():
    state = nnx.state(Net())
    tuned = jp.transform(Net(), TUNING)
    adapter = tuned.init(jax.random.key(2), state, X)
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
    for apply in (tuned.apply, jax.jit(lambda *args: tuned.apply(*args, mutable=True))):
        options = {"mutable": True} if apply == tuned.apply else {}
        _, after = apply(adapter, state, X, **options)
        before, now = (nnx.filter_state(s, nnx.Param) for s in (state, after))
        jax.tree.map(np.testing.assert_array_equal, before, now)
        assert after["drop"]["rngs"]["count"][...] == state["drop"]["rngs"]["count"][...] + 1
