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
from jaxpeft.train import chunks

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
    """Where the large arrays of the optimizer's state are; the scales of blocks are not large."""
    return {x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state) if x.nbytes >= W.size}


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


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2),
    "adam8bit": lambda: train.adam8bit(1e-2, weight_decay=0.1),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-2)),
    "lamb": lambda: optax.lamb(1e-2),  # needs the norm of each leaf's direction
    "masked": lambda: optax.masked(optax.adam(1e-2), {"a": True, "b": False, "c": True}),
    "multi": lambda: optax.MultiSteps(optax.chain(optax.clip(0.5), optax.adam(1e-2)), 2),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(1e-2),
}
PAGED = {"a": (3, 64, 256), "b": (100, 128), "c": (5, 300)}  # layers, no whole tiles, odd blocks


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_that_comes_in_chunks_gives_the_same_steps(name, monkeypatch):
    monkeypatch.setattr(chunks, "SIZE", 2**10)
    monkeypatch.setattr(chunks, "SMALL", 2**8)
    random = np.random.default_rng(2)
    params = {n: random.standard_normal(s, np.float32) for n, s in PAGED.items()}
    plain, paged = OPTIMIZERS[name](), train.offload(OPTIMIZERS[name]())

    def steps(optimizer):
        def step(carry, scale):
            params, state = carry
            grads = jax.tree.map(lambda x: scale * jnp.sin(9 * x), params)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        step, carry = jax.jit(step), (params, optimizer.init(params))
        for scale in (1.0, 0.1, 3.0, 1.0):
            carry = step(carry, scale)
        return carry

    found, expected = steps(paged), steps(plain)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7),
        memory.to_device(found[0]), expected[0],
    )  # fmt: skip
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(found[1]) if x.size > 8000}
    assert kinds == {"pinned_host"}


def test_a_step_that_is_not_finite_leaves_the_state_where_and_as_it_is():
    optimizer = train.offload(train.adam8bit(1e-2))
    before, _ = run(optimizer)
    kept = jax.tree.map(jnp.copy, memory.to_device(before._replace(key=None)))
    after, metrics = train.make_step(loss, optimizer)(before, {}, BATCH * np.nan)
    assert not jnp.isfinite(metrics.loss)
    assert kinds_of(after) == {"pinned_host"}
    equal(after._replace(key=None), kept)


@pytest.mark.parametrize("name", ["adamw", "adam8bit", "clipped"])
def test_only_chunks_are_moved_to_the_device(name, monkeypatch):
    monkeypatch.setattr(chunks, "SIZE", 2**15)
    monkeypatch.setattr(chunks, "SMALL", 2**8)
    optimizer, params = train.offload(OPTIMIZERS[name]()), {"w": jnp.ones((4, 2048, 1024))}
    state = optimizer.init(params)
    moved = list(moves(jax.make_jaxpr(optimizer.update)(params, state, params).jaxpr))
    assert moved
    room = 2**15 * jax.device_count()
    assert max(aval.size for aval in moved) <= room < params["w"].size / 30


def moves(jaxpr):
    """What a program moves to the device or the host, loops included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "device_put":
            yield from (var.aval for var in eqn.outvars)
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from moves(inner)


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
