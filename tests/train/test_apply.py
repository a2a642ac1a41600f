"""Rounding of updates: unbiased with a key, and float32 leaves as they were."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpeft import train

N = 4096


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rounding_is_to_a_neighbour_and_right_on_average(dtype):
    random = np.random.default_rng(0)
    values = (random.standard_normal(24) * 10.0 ** random.uniform(-4, 3, 24)).astype(np.float32)
    x = jnp.asarray(values).astype(dtype)
    u = np.asarray(x, np.float32) * random.uniform(-(2.0**-8), 2.0**-8, 24).astype(np.float32)
    exact = np.asarray(x, np.float64) + u
    keys = jax.random.split(jax.random.key(0), N)
    rounded = jax.jit(jax.vmap(lambda key: train.apply_updates(x, u, key)))(keys)
    assert rounded.dtype == dtype
    rounded = np.asarray(rounded, np.float64)
    lo, hi = rounded.min(0), rounded.max(0)
    assert all(len(set(column)) <= 2 for column in rounded.T)
    assert (lo <= exact).all() and (exact <= hi).all()
    chance = (exact - lo) / np.where(hi > lo, hi - lo, 1)
    error = np.sqrt(chance * (1 - chance) / N) * (hi - lo)
    assert (np.abs(rounded.mean(0) - exact) <= 4.5 * error + 1e-9 * np.abs(exact)).all()
    assert ((hi > lo).sum() > 20) and (np.abs(u) > 0).all()


def test_small_updates_are_lost_to_nearest_and_not_with_a_key():
    """1000 updates of 2^-12 to ones in bfloat16, whose half unit is 2^-9 below and 2^-8 above 1."""

    def many(keys):
        def body(x, key):
            return train.apply_updates(x, jnp.full(256, 2.0**-12), key), None

        return jax.lax.scan(body, jnp.ones(256, jnp.bfloat16), keys, length=1000)[0]

    keys = jax.random.split(jax.random.key(0), 1000)
    assert (jax.jit(many)(None) == 1).all()
    moved = np.asarray(jax.jit(many)(keys), np.float64).mean() - 1
    # A walk of 1000 steps of size 2^-7 with chance 2^-5: its deviation, over 256 of them.
    deviation = 2.0**-7 * np.sqrt(1000 * 2.0**-5 * (1 - 2.0**-5) / 256)
    assert abs(moved - 1000 * 2.0**-12) < 4 * deviation


def test_wide_leaves_and_what_is_not_finite_are_as_without_a_key():
    x = {"wide": jnp.linspace(-1, 1, 99), "narrow": jnp.array([jnp.inf, jnp.nan, 1], jnp.bfloat16)}
    u = {"wide": jnp.full(99, 1e-3), "narrow": jnp.array([1.0, 1, 1])}
    for updates in (u, jax.tree.map(jnp.zeros_like, u)):
        expected, actual = (
            jax.tree.map(lambda leaf: leaf.astype("float32"), tree)
            for tree in (
                optax.apply_updates(x, updates),
                train.apply_updates(x, updates, jax.random.key(0)),
            )
        )
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_rounding_is_the_same_on_a_mesh(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    x, u, key = jnp.ones((16, 4), jnp.bfloat16), jnp.full((16, 4), 2.0**-9), jax.random.key(0)
    expected = train.apply_updates(x, u, key)
    with jax.set_mesh(mesh):
        x, u = jax.device_put((x, u), NamedSharding(mesh, P("data")))
        actual = jax.jit(train.apply_updates)(x, u, key)
    np.testing.assert_array_equal(actual, expected)
    assert actual.sharding.is_equivalent_to(x.sharding, 2)


def test_leaves_of_one_byte_are_refused_by_name():
    x = {"w": jnp.ones(4, jnp.float8_e4m3fn)}
    with pytest.raises(ValueError, match="leaves of float8_e4m3fn cannot be trained: .*bfloat16"):
        train.apply_updates(x, {"w": jnp.ones(4)}, jax.random.key(0))
    with pytest.raises(ValueError, match="leaves of float8_e4m3fn cannot be trained"):
        train.init_state(x, optax.adam(1.0), jax.random.key(0))


def narrow_run(tiny, state, step, steps):
    batches = tiny.batches()
    for _ in range(steps):
        state, _ = step(state, tiny.params, batches(int(state.step)))
    return state


def test_a_run_with_narrow_leaves_resumes_bitwise(tiny, tmp_path):
    optimizer = optax.adam(1e-3)  # less than half of the last place of a one
    narrow = {name: jax.tree.map(lambda x: x.astype("bfloat16") if x.dtype == jnp.float32 else x, t)
              for name, t in tiny.adapter().items()}  # fmt: skip
    make = lambda key: train.init_state(  # noqa: E731
        narrow, optimizer, jax.random.key(key), trainable=tiny.trainable
    )
    step, plain = (
        train.make_step(tiny.loss_fn, optimizer, trainable=tiny.trainable, stochastic_rounding=s)
        for s in (True, False)
    )
    state = narrow_run(tiny, make(0), step, 2)
    train.save(tmp_path, 2, state)
    whole = narrow_run(tiny, state, step, 2)
    again = narrow_run(tiny, train.restore(tmp_path, make(1)), step, 2)
    jax.tree.map(np.testing.assert_array_equal, again.adapter, whole.adapter)
    dtypes = {str(x.dtype) for x in jax.tree.leaves(whole.opt_state)}
    assert dtypes == {"int32", "float32"}
    lost = narrow_run(tiny, make(0), plain, 4).adapter["head"]["scale"]
    assert (lost == 1).all() and not (whole.adapter["head"]["scale"] == 1).all()
