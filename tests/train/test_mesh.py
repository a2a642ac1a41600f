"""The step on eight devices, which need a process of their own."""

import json
import os
import subprocess
import sys

import numpy as np

SCRIPT = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxpeft import train

rng = np.random.default_rng(0)
rows = [rng.integers(0, 16, n) for n in rng.integers(4, 20, 32)]
data = train.Batches([train.Example(r, np.arange(len(r)) > 2) for r in rows], 32, lengths=(24,))
embedding = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)
adapter = {"a": jnp.full((8, 2), 0.1), "b": jnp.full((2, 8), 0.2)}

def run(mesh, spec, micro_batches):
    def loss_fn(adapter, params, batch, dropout_key):
        hidden = params.at[batch.tokens].get(out_sharding=spec)
        logits = (hidden + hidden @ adapter["a"] @ adapter["b"]) @ params.T
        return train.next_token_loss(logits, batch.tokens, batch.targets)

    place = lambda x, s: x if mesh is None else jax.device_put(x, NamedSharding(mesh, s))
    optimizer = train.optimizer(0.1)
    state = train.init_state(place(adapter, P()), optimizer, jax.random.key(0))
    step = train.make_step(loss_fn, optimizer, micro_batches=micro_batches)
    params, batch = place(embedding, P()), place(data(0), P("data"))
    text = step.lower(state, params, batch).compile().as_text()
    for _ in range(2):
        state, metrics = step(state, params, batch)
    moves = [c for c in ("all-gather", "all-to-all", "collective-permute") if c + "(" in text]
    print(json.dumps([float(metrics.loss), np.asarray(state.adapter["a"]).tolist(), moves]))

run(None, None, 1)
for kind, spec in ((AxisType.Auto, None), (AxisType.Explicit, P("data"))):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        for n in (1, 4):
            run(mesh, spec, n)
"""


def test_a_split_batch_gives_the_same_step_and_moves_no_rows():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=os.environ | flags, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    one, *split = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(split) == 4
    for loss, adapter, moves in split:
        np.testing.assert_allclose(loss, one[0], rtol=1e-6)
        np.testing.assert_allclose(adapter, one[1], rtol=1e-4, atol=1e-6)
        assert moves == []
