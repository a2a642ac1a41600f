"""Weights in host memory: where they are, and results equal to those of the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpeft as jp
from jaxpeft.core import memory

PARAMS = {
    "layers": {"kernel": jax.random.normal(jax.random.key(0), (3, 64, 64)) / 8,
               "scale": jnp.ones((3, 64))},
    "head": {"kernel": jax.random.normal(jax.random.key(1), (64, 64)) / 8},
}  # fmt: skip
X = jax.random.normal(jax.random.key(2), (8, 64))


def model(params, x):
    def layer(h, layer):
        return jnp.tanh(h @ layer["kernel"] * layer["scale"]), None

    h, _ = jax.lax.scan(layer, x, params["layers"])
    return h @ params["head"]["kernel"] + h @ params["layers"]["kernel"][1].T


def largest(weight):
    return max(weight.packed.values(), key=lambda array: array.nbytes)


def kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


@pytest.mark.parametrize("fmt", [None, jp.quant.nf4()], ids=["dense", "nf4"])
def test_outputs_and_gradients_are_the_same(fmt):
    here = PARAMS if fmt is None else jp.quantize(PARAMS, fmt)
    there = jp.offload(here)
    for weight in (there["layers"]["kernel"], there["head"]["kernel"]):
        assert kinds(largest(weight)) == {"pinned_host"}
    assert kinds(there["layers"]["scale"]) == {"device"}
    tuned = jp.transform(model, jp.lora(4), strict=True)
    adapter = tuned.init(jax.random.key(3), there, X)
    adapter = jax.tree.map(lambda a: a + 0.1, adapter)

    @jax.jit
    def loss_and_grads(adapter, params, x):
        def loss(adapter, x):
            return jnp.sin(tuned.apply(adapter, params, x)).sum()

        return jax.value_and_grad(loss, (0, 1))(adapter, x)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
        loss_and_grads(adapter, there, X), loss_and_grads(adapter, here, X),
    )  # fmt: skip
    merged, expected = tuned.merge(adapter, there), tuned.merge(adapter, here)
    jax.tree.map(np.testing.assert_array_equal, merged, expected)
    assert kinds(merged) == {"device"}


@pytest.mark.parametrize("method", [jp.lora(4), jp.qalora(2, group=32)], ids=lambda m: m.name)
def test_merging_gives_what_it_gives_of_weights_on_the_device(method):
    mixed = jp.quantize(PARAMS, jp.rules(("head/kernel", jp.quant.int4(32))))
    some = jp.rules(("head/kernel", method))
    for params, tuning in ((mixed, method), (jp.quantize(PARAMS, jp.quant.int4(32)), some)):
        tuned = jp.transform(model, tuning)
        adapter = tuned.init(jax.random.key(3), params, X)
        adapter = jax.tree.map(lambda a: a + 0.1, adapter)
        expected, _ = jp.quant.merge(tuned, adapter, params)
        found, _ = jp.quant.merge(tuned, adapter, jp.offload(params))
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        assert kinds(found) == {"device"}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6, 1e-6), found, expected)


def test_large_packed_weights_are_moved_whole(monkeypatch):
    monkeypatch.setattr("jaxpeft.quant.product.TILE", 64 * 16 * 4)
    packed = jp.quantize({"w": PARAMS["head"]["kernel"]}, jp.quant.nf4(), compute="xla")
    product = jp.lift(lambda p, x: x @ p["w"], strict=True)
    expected = product(packed, X)
    np.testing.assert_allclose(product(jp.offload(packed), X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_weights_on_the_host_are_split_over_a_mesh(kind):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        w = jax.device_put(PARAMS["head"]["kernel"], NamedSharding(mesh, P(None, "model")))
        params, x = jp.offload({"w": w}), jax.device_put(X, NamedSharding(mesh, P()))
        tuned = jp.transform(lambda p, x: x @ p["w"], jp.lora(2), strict=True)
        adapter = tuned.init(jax.random.key(0), params, x)
        y = jax.jit(tuned.apply)(adapter, params, x)
    assert params["w"].packed["values"].sharding.spec == P(None, "model")
    assert adapter["w"]["b"].sharding.spec == P(None, "model")
    np.testing.assert_allclose(y, X @ PARAMS["head"]["kernel"], rtol=1e-5, atol=1e-5)


def test_what_cannot_be_offloaded_is_named(monkeypatch):
    with pytest.raises(ValueError, match="matched none of the 3 weights"):
        jp.offload(PARAMS, "blocks/**")
    assert kinds(jp.offload(PARAMS, "layers/**")["head"]) == {"device"}
    monkeypatch.setattr(memory, "KIND", "punched_cards")
    with pytest.raises(memory.NoHostMemoryError, match="it has"):
        jp.offload(PARAMS)
