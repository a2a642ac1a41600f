import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft import train


def start(tiny, key=5):
    optimizer = train.optimizer(train.schedule("cosine", 0.05, 6, warmup=2), weight_decay=0.1)
    state = train.init_state(
        tiny.adapter(dropout=True), optimizer, jax.random.key(key), trainable=tiny.trainable
    )
    return state, train.make_step(tiny.loss_fn, optimizer, trainable=tiny.trainable)


def advance(tiny, state, step, steps):
    losses, batches = [], tiny.batches()
    for _ in range(steps):
        state, metrics = step(state, tiny.params, batches(int(state.step)))
        losses.append(float(metrics.loss))
    return state, losses


def arrays(state):
    raw = state._replace(key=jax.random.key_data(state.key))
    return [np.asarray(x) for x in jax.tree.leaves(raw)]


def test_resume_is_bitwise(tiny, tmp_path):
    expected, losses = advance(tiny, *start(tiny), 6)
    state, first = advance(tiny, *start(tiny), 3)
    train.save(tmp_path, 3, state)
    fresh, step = start(tiny, key=0)  # nothing of the first run is left but the files
    actual, second = advance(tiny, train.restore(tmp_path, fresh), step, 3)
    assert first + second == losses
    for a, b in zip(arrays(actual), arrays(expected), strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
    assert len(set(losses)) == 6  # the runs do something


def test_old_checkpoints_are_deleted(tmp_path):
    for step in range(5):
        train.save(tmp_path, step, {"x": jnp.float32(step)}, keep=2)
    assert train.latest_step(tmp_path) == 4
    assert float(train.restore(tmp_path, {"x": jnp.zeros(())}, step=3)["x"]) == 3.0
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 2.*\[3, 4\]"):
        train.restore(tmp_path, {"x": jnp.zeros(())}, step=2)


def test_a_step_that_is_there_is_left_as_it_is(tmp_path):
    for value in (1.0, 2.0):
        train.save(tmp_path, 7, {"x": jnp.float32(value)})
    assert float(train.restore(tmp_path, {"x": jnp.zeros(())})["x"]) == 1.0


def test_a_disk_without_room_is_said_and_the_last_checkpoint_stays(tmp_path):
    train.save(tmp_path, 1, {"x": jnp.zeros(4)})
    noise = jax.random.normal(jax.random.key(0), (2**18,))  # does not compress to nothing
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, limits[1]))
    try:
        with pytest.raises(OSError, match="step 2 could not be written .* That of step 1 is whole"):
            train.save(tmp_path, 2, {"x": noise})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert train.latest_step(tmp_path) == 1
    train.save(tmp_path, 2, {"x": noise})  # what is left of the failed one is not in the way
    assert train.latest_step(tmp_path) == 2


def test_a_broken_save_leaves_the_last_one(tmp_path):
    train.save(tmp_path, 1, {"x": jnp.float32(1)})
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()  # what a crash leaves behind
    assert train.latest_step(tmp_path) == 1
    assert float(train.restore(tmp_path, {"x": jnp.zeros(())})["x"]) == 1.0


def test_dtypes_come_back(tmp_path):
    dtypes = ("bfloat16", "float16", "int8", "bool", "uint32")
    tree = {"deep": [{d: jnp.ones((3, 2), d) for d in dtypes}], "a/b": jnp.arange(3)}
    train.save(tmp_path, 0, tree)
    back = train.restore(tmp_path, jax.tree.map(jnp.zeros_like, tree))
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    assert jax.tree.map(lambda x: x.dtype, back) == jax.tree.map(lambda x: x.dtype, tree)


def test_nothing_is_pickled(tmp_path):
    train.save(tmp_path, 0, {"x": jnp.ones(2)})
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"\x80\x04" != path.read_bytes()[:2]


def test_another_runs_checkpoint_is_refused(tmp_path):
    train.save(tmp_path, 4, {"x": jnp.ones(2)}, fingerprint={"rank": 4, "data": "abc"})
    for like, fingerprint, message in (
        ({"x": jnp.ones(3)}, None, r"x: saved float32\[2\], now float32\[3\]"),
        ({"x": jnp.ones(2, jnp.bfloat16)}, None, r"now bfloat16\[2\]"),
        ({"y": jnp.ones(2)}, None, r"x: saved float32\[2\], now None\n  y: saved None"),
        ({"x": jnp.ones(2)}, {"rank": 8, "data": "abc"}, "run differ:\n  rank: saved 4, now 8"),
    ):
        with pytest.raises(ValueError, match=message):
            train.restore(tmp_path, like, fingerprint=fingerprint)
    train.restore(tmp_path, {"x": jnp.ones(2)}, fingerprint={"data": "abc", "rank": 4})


def test_errors_of_the_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory"):
        train.restore(tmp_path / "none", {})
    with pytest.raises(FileNotFoundError, match="has no checkpoints"):
        train.restore(tmp_path, {})
    assert train.latest_step(tmp_path / "none") is None
    with pytest.raises(ValueError, match="same path"):
        train.save(tmp_path, 0, {"a/b": {"c": jnp.ones(1)}, "a": {"b/c": jnp.ones(1)}})
