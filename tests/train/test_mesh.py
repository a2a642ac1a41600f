"""The step with its batch split over eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpeft import train

SPLIT, WHOLE = PartitionSpec("data"), PartitionSpec()


def batches():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 16, n) for n in rng.integers(4, 20, 32)]
    examples = [train.Example(row, np.arange(len(row)) > 2) for row in rows]
    return train.Batches(examples, 32, lengths=(24,))


def two_steps(mesh=None, out_sharding=None, micro_batches=1):
    """The loss of the second step, the adapter after it, and the compiled program."""

    def loss_fn(adapter, params, batch, dropout_key):
        hidden = params.at[batch.tokens].get(out_sharding=out_sharding)
        logits = (hidden + hidden @ adapter["a"] @ adapter["b"]) @ params.T
        return train.next_token_loss(logits, batch.tokens, batch.targets)

    def place(x, spec):
        return x if mesh is None else jax.device_put(x, NamedSharding(mesh, spec))

    embedding = np.random.default_rng(1).normal(size=(16, 8)).astype(np.float32)
    adapter = {"a": jnp.full((8, 2), 0.1), "b": jnp.full((2, 8), 0.2)}
    optimizer = train.optimizer(0.1)
    state = train.init_state(place(adapter, WHOLE), optimizer, jax.random.key(0))
    step = train.make_step(loss_fn, optimizer, micro_batches=micro_batches)
    params, batch = place(jnp.asarray(embedding), WHOLE), place(batches()(0), SPLIT)
    text = step.lower(state, params, batch).compile().as_text()
    for _ in range(2):
        state, metrics = step(state, params, batch)
    return metrics.loss, state.adapter, text


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_split_batch_gives_the_same_step_and_moves_no_rows(kind, micro_batches):
    expected_loss, expected, _ = two_steps()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        sharding = SPLIT if kind is AxisType.Explicit else None
        loss, adapter, text = two_steps(mesh, sharding, micro_batches)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for name in expected:
        np.testing.assert_allclose(adapter[name], expected[name], rtol=1e-4, atol=1e-6)
    assert "all-reduce(" in text
    for moves_rows in ("all-gather(", "all-to-all(", "collective-permute("):
        assert moves_rows not in text
