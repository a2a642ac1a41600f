"""Full tuning is plain fine-tuning of the matched leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp

PARAMS = {"w": jnp.arange(35.0).reshape(5, 7) / 35, "b": jnp.ones(7)}
X = jnp.cos(jnp.arange(15.0)).reshape(3, 5)


def model(params, x):
    return jnp.sin(x @ params["w"] + params["b"])


def test_it_starts_at_the_weights_themselves():
    adapter = jp.transform(model, jp.full()).init(jax.random.key(0), PARAMS, X)
    assert {path: tuple(leaves) for path, leaves in adapter.items()} == {
        "b": ("value",),
        "w": ("value",),
    }
    for path, weight in PARAMS.items():
        np.testing.assert_array_equal(adapter[path]["value"], weight)


def test_its_gradient_is_that_of_the_weights():
    tuned = jp.transform(model, jp.full(), strict=True)
    adapter = tuned.init(jax.random.key(0), PARAMS, X)
    got = jax.grad(lambda adapter: tuned.apply(adapter, PARAMS, X).sum())(adapter)
    want = jax.grad(lambda params: model(params, X).sum())(PARAMS)
    for path in PARAMS:
        np.testing.assert_allclose(got[path]["value"], want[path], rtol=1e-6)


def test_merge_puts_the_values_in_and_keeps_the_dtype():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    tuned = jp.transform(model, jp.rules(("b", jp.full())))
    adapter = tuned.init(jax.random.key(0), params, X)
    assert adapter["b"]["value"].dtype == jnp.float32
    merged = tuned.merge(jax.tree.map(lambda leaf: leaf + 1, adapter), params)
    assert merged["b"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged["b"], np.full(7, 2.0))
    assert merged["w"] is params["w"]


def test_shapes_alone_are_not_enough_to_start_from():
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)
    tuned = jp.transform(model, jp.full())
    with pytest.raises(ValueError, match=r"starts 'b' at the weight's values.*jax.eval_shape"):
        tuned.init(jax.random.key(0), shapes, X)
    abstract = jax.eval_shape(tuned.init, jax.random.key(0), shapes, X)
    assert abstract["w"]["value"].shape == (5, 7)


def test_a_quantized_weight_cannot_be_trained_itself():
    params = jp.quantize({"w": jnp.ones((64, 8)), "scale": jnp.ones(8)}, jp.quant.nf4())
    model = lambda p, x: x @ p["w"] * p["scale"]  # noqa: E731
    with pytest.raises(ValueError, match=r"'w' is quantized.*lora\(\) or ia3\(\)"):
        jp.transform(model, jp.full()).init(jax.random.key(0), params, jnp.ones((2, 64)))
    beside = jp.transform(model, jp.rules(("scale", jp.full())))
    assert list(beside.init(jax.random.key(0), params, jnp.ones((2, 64)))) == ["scale"]
