"""Quantized weights over eight devices: where packed arrays lie, what comes out, what is moved."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpeft as jp
from jaxpeft import train
from jaxpeft.models.config import from_hf
from tests.core.test_sharding import LAYOUTS, RANK, auto_model, collectives, explicit_model

PARAMS = {
    "up": jax.random.normal(jax.random.key(0), (256, 512)) / 16,
    "down": jax.random.normal(jax.random.key(1), (512, 256)) / 16,
}
X = jax.random.normal(jax.random.key(2), (8, 4, 256))
CASES = [
    pytest.param(kind, layout, fmt, id=f"{kind.name}-{layout}-{fmt.name}")
    for kind, layout, fmt in (
        (AxisType.Auto, "tensor_parallel", jp.quant.nf4()),
        (AxisType.Auto, "fsdp", jp.quant.int8()),
        (AxisType.Explicit, "tensor_parallel", jp.quant.int4(block=32)),
        (AxisType.Explicit, "fsdp", jp.quant.nf4()),
    )
]


@pytest.mark.parametrize("kind, layout, fmt", CASES)
def test_products_on_a_mesh_equal_those_of_one_device_and_move_no_more(kind, layout, fmt):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    model = auto_model if kind is AxisType.Auto else explicit_model
    specs = LAYOUTS[layout]
    with jax.set_mesh(mesh):
        dense = {n: jax.device_put(w, NamedSharding(mesh, specs[n])) for n, w in PARAMS.items()}
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        packed = jp.quantize(dense, fmt)
        tuned = jp.transform(model, jp.lora(RANK), strict=True)
        adapter = tuned.init(jax.random.key(3), packed, x)
        adapter = jax.tree.map(
            lambda leaf: jax.device_put(some_values(leaf.shape), leaf.sharding), adapter
        )

        def step(adapter, params, x):
            def loss(adapter):
                y = tuned.apply(adapter, params, x)
                return jnp.sin(y).sum(), y

            return jax.grad(loss, has_aux=True)(adapter)

        compiled = jax.jit(step).lower(adapter, packed, x).compile()
        plain = jax.jit(step).lower(adapter, dense, x).compile()
        grads, y = compiled(adapter, packed, x)
    for name, (rows, columns) in specs.items():
        assert packed[name].packed["codes"].sharding.spec == P(rows, columns)
        assert adapter[name]["a"].sharding.spec == P(None, rows)
        assert adapter[name]["b"].sharding.spec == P(None, columns)
    here = jax.jit(jax.grad(lambda a, p: jnp.sin(one.apply(a, p, X)).sum()))
    one, whole = jp.transform(auto_model, jp.lora(RANK)), jp.quantize(PARAMS, fmt)
    unplaced = jax.tree.map(np.asarray, adapter)
    np.testing.assert_allclose(y, one.apply(unplaced, whole, X), rtol=1e-4, atol=1e-3)
    expected = here(unplaced, whole)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())
    assert moved(compiled) <= moved(plain)
    added = [c for c in collectives(compiled) if c not in collectives(plain)]
    assert all(c[1].startswith(("u8", "s8")) or size(c) <= 1024 for c in added), added


def some_values(shape):
    return jnp.cos(jnp.arange(math.prod(shape))).reshape(shape) / 20


def size(collective):
    return math.prod(map(int, re.findall(r"\d+", collective[1].partition("[")[2])))


def moved(compiled):
    """Bytes that the all-gathers of a program make."""
    width = {"f32": 4, "bf16": 2, "u8": 1, "s8": 1}
    gathers = [c for c in collectives(compiled) if c[0] == "all-gather"]
    return sum(size(c) * width[c[1].partition("[")[0]] for c in gathers)


def test_tiles_of_outputs_that_are_split_do_not_move(monkeypatch):
    monkeypatch.setattr("jaxpeft.quant.product.TILE", 64 * 1024)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    w = jax.device_put(PARAMS["up"], NamedSharding(mesh, P(None, "model")))
    packed, x = jp.quantize({"w": w}, jp.quant.nf4(), compute="xla"), X[0]
    model = jp.lift(lambda p, x: (x @ p["w"], (x @ p["w"]) @ p["w"].T), strict=True)
    compiled = jax.jit(model).lower(packed, x).compile()
    assert "while(" in compiled.as_text()
    assert {kind for kind, _ in collectives(compiled)} <= {"all-reduce"}
    dense = packed["w"].materialize()
    for ours, theirs in zip(compiled(packed, x), (x @ dense, x @ dense @ dense.T), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_a_training_step_of_a_scanned_decoder_equals_that_of_one_device():
    config = from_hf(
        dict(
            model_type="llama", vocab_size=64, hidden_size=64, intermediate_size=128,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        )
    )  # fmt: skip
    model = jp.models.Decoder(config, rngs=nnx.Rngs(0))
    tuned = jp.transform(model, jp.lora(4), strict=True)
    tokens = jax.random.randint(jax.random.key(0), (8, 12), 0, 64)
    batch = train.Batch(*(np.asarray(x) for x in (tokens, tokens >= 0, tokens >= 0)))
    optimizer = train.optimizer(1e-2)
    step = train.make_step(train.causal_lm_loss(tuned.apply), optimizer)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def run(place):
        params = jax.tree.map(place, nnx.state(model))
        sites = tuned.sites(params, tokens)
        packed = jp.quantize(params, jp.quant.nf4(), sites=sites)
        adapter = tuned.init(jax.random.key(1), packed, tokens)
        state, losses = train.init_state(adapter, optimizer, jax.random.key(2)), []
        for _ in range(3):
            state, metrics = step(state, packed, batch)
            losses.append(float(metrics.loss))
        return losses, state.adapter, adapter

    def split(x):
        stacked = x.ndim == 3
        return jax.device_put(x, NamedSharding(mesh, P(None, None, "model") if stacked else P()))

    (losses, end, fresh), (expected, exact, _) = run(split), run(lambda x: x)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[2] < losses[0]
    for ours, theirs in zip(jax.tree.leaves(end), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    for leaves in (fresh["layers/mlp/up_proj/kernel"], end["layers/mlp/up_proj/kernel"]):
        spec = tuple(leaves["b"].sharding.spec)
        assert spec + (None,) * (3 - len(spec)) == (None, None, "model")


STACK = {"w": jax.random.normal(jax.random.key(4), (3, 64, 64)) / 8}


@pytest.mark.parametrize(
    "fmt, rows", [(None, 1), (jp.quant.nf4(), 1), (jp.quant.nf4(), 4)], ids=["dense", "few", "many"]
)
def test_a_training_step_inside_of_shard_map(fmt, rows, monkeypatch):
    """A row of devices each: its part of the batch, with one adapter for all or one of its own."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    layer = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
    model = lambda params, x: jax.lax.scan(layer, x, params["w"])[0] @ params["last"].T  # noqa: E731
    monkeypatch.setattr("jaxpeft.quant.product.TILE", 64 * 32 * 4)
    dense = STACK | {"last": STACK["w"][1]}
    params = dense if fmt is None else jp.quantize(dense, fmt, compute="xla")
    tuned = jp.transform(model, jp.lora(2), strict=True)
    x = jax.random.normal(jax.random.key(5), (8 * rows, 64))
    one = jax.tree.map(lambda a: a + 0.1, tuned.init(jax.random.key(6), params, x))
    own = jax.tree.map(lambda a: a[None] * jnp.arange(1.0, 5).reshape(4, *[1] * a.ndim), one)

    def loss(adapter, x):
        return jnp.sin(tuned.apply(adapter, params, x)).sum()

    def step(adapter, params, x):
        part = lambda adapter: jnp.sin(tuned.apply(adapter, params, x)).sum()  # noqa: E731
        return jax.grad(lambda adapter: jax.lax.psum(part(adapter), "data"))(adapter)

    def each(adapters, params, x):
        value, grads = jax.value_and_grad(
            lambda adapter: jnp.sin(tuned.apply(adapter, params, x)).sum()
        )(jax.tree.map(lambda a: a[0], adapters))
        return value[None], jax.tree.map(lambda a: a[None], grads)

    def mapped(f, where):
        return jax.jit(
            jax.shard_map(f, mesh=mesh, in_specs=(where, P(), P("data")), out_specs=where)
        )

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # noqa: E731
    jax.tree.map(close, mapped(step, P())(one, params, x), jax.grad(loss)(one, x))
    parts = jax.vmap(jax.value_and_grad(loss))(own, x.reshape(4, -1, 64))
    jax.tree.map(close, mapped(each, P("data"))(own, params, x), parts)


def test_packed_params_that_a_transform_takes_apart_say_where_to_pack():
    packed, x = jp.quantize(STACK, jp.quant.nf4()), jnp.ones((2, 64))
    call = jp.lift(lambda params, x: x @ params["w"], strict=True)
    with pytest.raises(TypeError, match=r"\(32, 64\), not \(3, 32, 64\)"):
        jax.vmap(call, (0, None))(packed, x)
    layers = jax.vmap(lambda params: jp.quantize(params, jp.quant.nf4()))(STACK)
    np.testing.assert_allclose(
        jax.vmap(call, (0, None))(layers, x), x @ packed["w"].materialize(), atol=1e-4
    )
