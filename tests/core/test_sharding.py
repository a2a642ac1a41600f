"""Weights split over eight devices: where new leaves lie, what comes out, which collectives run."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpeft as jp

RANK = 3  # no other size of the model, so a collective over the rank shows it in its shape
LAYOUTS = {
    "tensor_parallel": {"up": P(None, "model"), "down": P("model", None)},
    "fsdp": {"up": P("data", "model"), "down": P("model", "data")},
}
PARAMS = {
    "up": jax.random.normal(jax.random.key(0), (16, 32)),
    "down": jax.random.normal(jax.random.key(1), (32, 16)),
}
X = jax.random.normal(jax.random.key(2), (8, 4, 16))


def auto_model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def explicit_model(params, x):
    """As code for explicit meshes is written: weights gathered over `data`, outputs placed."""
    up, down = (jax.sharding.reshard(params[n], s) for n, s in LAYOUTS["tensor_parallel"].items())
    h = jnp.tanh(jnp.einsum("bti,io->bto", x, up, out_sharding=P("data", None, "model")))
    return jnp.einsum("bti,io->bto", h, down, out_sharding=P("data", None, None))


CASES = [
    pytest.param(kind, layout, id=f"{kind.name}-{layout}")
    for kind in (AxisType.Auto, AxisType.Explicit)
    for layout in LAYOUTS
]


@pytest.fixture(scope="module")
def unsharded():
    tuned = jp.transform(auto_model, jp.lora(RANK, alpha=8), strict=True)
    adapter = tuned.init(jax.random.key(3), PARAMS, X)
    keys = iter(jax.random.split(jax.random.key(4), 4))
    adapter = jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape) / 3, adapter)
    return adapter, auto_model(tuned.merge(adapter, PARAMS), X)


def sharded(kind, layout):
    """The mesh, the tuned model, and params, inputs and fresh adapter on the mesh."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        specs = LAYOUTS[layout]
        params = {n: jax.device_put(w, NamedSharding(mesh, specs[n])) for n, w in PARAMS.items()}
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        model = auto_model if kind is AxisType.Auto else explicit_model
        tuned = jp.transform(model, jp.lora(RANK, alpha=8), strict=True)
        return mesh, model, tuned, params, x, tuned.init(jax.random.key(3), params, x)


@pytest.mark.parametrize("kind, layout", CASES)
def test_new_leaves_inherit_the_axes_of_their_weight(kind, layout):
    _, _, _, _, _, adapter = sharded(kind, layout)
    for name, (rows, columns) in LAYOUTS[layout].items():
        assert adapter[name]["a"].sharding.spec == P(None, rows)
        assert adapter[name]["b"].sharding.spec == P(None, columns)


@pytest.mark.parametrize("kind, layout", CASES)
def test_outputs_equal_the_unsharded_ones_and_only_the_rank_adds_collectives(
    kind, layout, unsharded
):
    values, expected = unsharded
    mesh, model, tuned, params, x, fresh = sharded(kind, layout)
    adapter = jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), values, fresh)
    with jax.set_mesh(mesh):
        y = jax.jit(tuned.apply)(adapter, params, x)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)

        def step(adapter, params, x):
            return jax.grad(lambda a: jnp.sin(tuned.apply(a, params, x)).sum())(adapter)

        def base_step(params, x):
            return jax.grad(lambda x: jnp.sin(model(params, x)).sum())(x)

        compiled = jax.jit(step).lower(adapter, params, x).compile()
        base = jax.jit(base_step).lower(params, x).compile()
        grads = compiled(adapter, params, x)
    added = [c for c in collectives(compiled) if c not in collectives(base) and not over_rank(c)]
    assert added == []
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, adapter)


def collectives(compiled):
    """`(kind, shape)` of everything that a collective of the compiled program moves."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= ([^=]*?) ({kinds})(?:-start)?\(", compiled.as_text())
    return [
        (kind, shape) for shapes, kind in found for shape in re.findall(r"\w+\[[\d,]*\]", shapes)
    ]


def over_rank(collective):
    return str(RANK) in re.findall(r"\d+", collective[1].partition("[")[2])


def test_a_dense_update_would_be_seen_as_a_collective_that_is_not_over_the_rank():
    assert not over_rank(("all-reduce", "f32[16,32]"))
    assert over_rank(("all-gather", "f32[3,16]"))
