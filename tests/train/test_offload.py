"""Optimizer state in host memory: equal steps, and where it is before and after them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpeft import train
from jaxpeft.core import memory

BATCH = np.random.default_rng(0).standard_normal((8, 16), np.float32)
W = np.random.default_rng(1).standard_normal((16, 512), np.float32)


def loss(adapter, params, batch, key):
    return jnp.sum((batch @ adapter["w"]) ** 2), jnp.float32(batch.shape[0])


def run(optimizer, place=jnp.asarray, steps=3, state=None):
    state = state or train.init_state({"w": place(W)}, optimizer, jax.random.key(0))
    step = train.make_step(loss, optimizer)
    kinds = [kinds_of(state)]
    for _ in range(steps):
        state, _ = step(state, {}, BATCH)
        kinds.append(kinds_of(state))
    return state, kinds


def kinds_of(state):
    return {x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state) if x.ndim}


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert jnp.array_equal(memory.to_device(x), memory.to_device(y))


@pytest.mark.parametrize("make", [optax.adamw, train.adam8bit], ids=["adamw", "adam8bit"])
def test_steps_and_state_are_the_same_to_the_bit_and_the_state_stays_on_the_host(make, tmp_path):
    offloaded = optax.chain(optax.clip_by_global_norm(1.0), train.offload(make(1e-2)))
    plain = optax.chain(optax.clip_by_global_norm(1.0), make(1e-2))
    (state, kinds), (expected, _) = run(offloaded), run(plain)
    assert kinds == 4 * [{"pinned_host"}]
    equal(state, expected)
    train.save(tmp_path, 3, state)
    fresh = train.init_state({"w": jnp.asarray(W)}, offloaded, jax.random.key(1))
    again, kinds = run(offloaded, state=train.restore(tmp_path, fresh), steps=1)
    assert kinds == 2 * [{"pinned_host"}]
    equal(again, run(plain, state=expected, steps=1)[0])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_state_on_the_host_is_split_over_a_mesh(kind):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(kind,))
    sharding = NamedSharding(mesh, P(None, "model"))
    expected, _ = run(optax.adamw(1e-2))
    with jax.set_mesh(mesh):
        state, kinds = run(train.offload(optax.adamw(1e-2)), lambda w: jax.device_put(w, sharding))
    assert kinds == 4 * [{"pinned_host"}]
    np.testing.assert_allclose(state.adapter["w"], expected.adapter["w"], rtol=1e-5)
    assert state.opt_state[0].mu["w"].sharding.spec == P(None, "model")


def test_a_loop_of_ones_own_gets_the_state_back_on_the_host():
    optimizer, w = train.offload(optax.adam(0.1)), jnp.ones((4, 4))
    updates, state = jax.jit(optimizer.update)(w, optimizer.init(w))
    assert state[0].nu.sharding.memory_kind == "pinned_host"
    assert updates.sharding.memory_kind == "device"


def test_devices_without_host_memory_are_named(monkeypatch):
    monkeypatch.setattr(memory, "KIND", "punched_cards")
    with pytest.raises(memory.NoHostMemoryError, match="no 'punched_cards' memory; it has"):
        train.offload(optax.adam(0.1)).init(jnp.ones((4, 4)))
