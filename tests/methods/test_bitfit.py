"""Tuning biases or norms alone is fine-tuning of those parameters and of no others."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpeft as jp
from jaxpeft.methods.bitfit import bitfit, norm_tuning
from jaxpeft.models.config import from_hf
from jaxpeft.models.decoder import Decoder


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.LayerNorm(name="ln_1")(x)
        h = nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(h)
        return x + h, None


class Model(nn.Module):
    """Scanned layers, positions that are added like biases, running statistics."""

    @nn.compact
    def __call__(self, x):
        x = x + self.param("positions", nn.initializers.normal(), (5, 4))
        layers = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )  # fmt: skip
        x = layers(name="layers")(x, None)[0]
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        return nn.Dense(3, name="head")(x)


X = jnp.sin(jnp.arange(40.0)).reshape(2, 5, 4)
BIASES = {
    *(f"params/layers/attn/{name}/bias" for name in ("query", "key", "value", "out")),
    "params/layers/ln_1/bias",
    "params/norm/bias",
    "params/head/bias",
}
NORMS = {f"params/{name}/{leaf}" for name in ("layers/ln_1", "norm") for leaf in ("scale", "bias")}


@pytest.fixture(scope="module")
def variables():
    shapes, tree = jax.tree.flatten(jax.eval_shape(Model().init, jax.random.key(0), X))
    noise = np.random.default_rng(0)
    return tree.unflatten([jnp.asarray(noise.uniform(0.1, 1, s.shape), s.dtype) for s in shapes])


def flat(tree):
    return {jax.tree_util.keystr(k, simple=True, separator="/"): leaf
            for k, leaf in jax.tree_util.tree_leaves_with_path(tree)}  # fmt: skip


@pytest.mark.parametrize(("method", "sites"), [(bitfit(), BIASES), (norm_tuning(), NORMS)])
def test_it_trains_those_parameters_and_no_others(variables, method, sites):
    tuned = jp.transform(Model(), method, strict=True)
    adapter = tuned.init(jax.random.key(2), variables, X)
    assert set(adapter) == sites

    def loss(y):
        return jnp.sin(y).sum()

    fresh, grads = jax.jit(jax.value_and_grad(lambda a: loss(tuned.apply(a, variables, X))))(
        adapter
    )
    value, want = jax.jit(jax.value_and_grad(lambda v: loss(Model().apply(v, X))))(variables)
    assert float(fresh) == pytest.approx(float(value), rel=1e-5)
    for path, leaves in grads.items():
        np.testing.assert_allclose(leaves["value"], flat(want)[path], rtol=1e-4, atol=1e-4)
    moved = jax.tree.map(lambda leaf: leaf + 1, adapter)
    merged, old = flat(tuned.merge(moved, variables)), flat(variables)
    for path in old:
        np.testing.assert_array_equal(merged[path], old[path] + (path in sites))


def test_a_model_of_ours_has_them_at_its_qkv_and_its_norms():
    shape = dict(vocab_size=8, hidden_size=4, intermediate_size=8, num_attention_heads=2)
    config = from_hf(dict(model_type="qwen2", num_hidden_layers=2, **shape))
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    ids = jnp.array([[1, 2, 3]])

    def found(method):
        tuned = jp.transform(model, method)
        return set(jax.eval_shape(tuned.init, jax.random.key(0), nnx.state(model), ids))

    assert found(bitfit()) == {f"layers/self_attn/{n}_proj/bias" for n in "qkv"}
    names = ("input_layernorm", "post_attention_layernorm")
    assert found(norm_tuning()) == {*(f"layers/{n}/scale" for n in names), "norm/scale"}


def test_kernels_are_no_biases():
    params = {"w": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    tuned = jp.transform(lambda p, x: x @ p["w"] + p["bias"], jp.rules(("w", bitfit())))
    with pytest.raises(ValueError, match="`bitfit` cannot work there"):
        tuned.init(jax.random.key(0), params, jnp.ones((2, 4)))
