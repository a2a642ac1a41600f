"""Quantized weights in models: what products give, and what is kept for the backward pass."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpeft as jp
from jaxpeft.models.config import from_hf
from jaxpeft.quant import kernels
from jaxpeft.quant.formats import dequantize, quantize

TOKENS = jnp.array([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
FORMATS = [jp.quant.nf4(), jp.quant.int8(), jp.quant.int4(block=32), jp.quant.fp8()]


def is_quantized(leaf):
    return isinstance(leaf, jp.quant.QuantizedWeight)


def unpacked(params):
    return jax.tree.map(
        lambda leaf: leaf.materialize() if is_quantized(leaf) else leaf, params,
        is_leaf=is_quantized,
    )  # fmt: skip


@pytest.fixture(scope="module")
def decoder():
    config = from_hf(
        dict(
            model_type="llama", vocab_size=64, hidden_size=64, intermediate_size=128,
            num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip
    model = jp.models.Decoder(config, rngs=nnx.Rngs(0))
    return model, nnx.state(model)


def some_values(adapter):
    key = jax.random.key(3)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape, x.dtype), adapter)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_a_scanned_model_gives_what_the_unpacked_weights_give(fmt, decoder):
    model, params = decoder
    tuned = jp.transform(model, jp.lora(4), strict=True)
    sites = tuned.sites(params, TOKENS)
    packed = jp.quantize(params, fmt, sites=sites)
    assert sum(map(is_quantized, jax.tree.leaves(packed, is_leaf=is_quantized))) == 8
    adapter = some_values(tuned.init(jax.random.key(0), packed, TOKENS))

    def loss(adapter, params):
        return (tuned.apply(adapter, params, TOKENS) ** 2).mean()

    (y, grads), (expected, exact) = (
        jax.jit(jax.value_and_grad(loss))(adapter, p) for p in (packed, unpacked(packed))
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_merging_gives_dense_weights_that_agree(decoder):
    model, params = decoder
    tuned = jp.transform(model, jp.lora(4))
    packed = jp.quantize(params, jp.quant.nf4(), sites=tuned.sites(params, TOKENS))
    adapter = some_values(tuned.init(jax.random.key(0), packed, TOKENS))
    merged = tuned.merge(adapter, packed)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(
        model.apply(merged, TOKENS), tuned.apply(adapter, packed, TOKENS), atol=1e-4
    )


def test_the_backward_pass_keeps_no_dense_weight(decoder):
    """Residuals of a product: packed arrays and activations, nothing of the weight's shape."""
    weight = jp.quantize({"w": jnp.ones((128, 256)) / 3}, jp.quant.nf4())
    lifted = jp.lift(lambda params, x: jnp.tanh(x @ params["w"]).sum())
    _, pullback = jax.vjp(lambda x: lifted(weight, x), jnp.ones((4, 128)))
    shapes = {leaf.shape for leaf in jax.tree.leaves(pullback)}
    assert (64, 256) in shapes and (128, 256) not in shapes


def test_attention_kernels_of_three_axes_block_along_their_inputs():
    module = nn.MultiHeadDotProductAttention(4, qkv_features=64)
    x = jax.random.normal(jax.random.key(0), (2, 3, 64))
    variables = module.init(jax.random.key(1), x)
    tuned = jp.transform(module, jp.lora(2), strict=True)
    packed = jp.quantize(variables, jp.quant.nf4(), sites=tuned.sites(variables, x))
    adapter = some_values(tuned.init(jax.random.key(0), packed, x))
    np.testing.assert_allclose(
        tuned.apply(adapter, packed, x), tuned.apply(adapter, unpacked(packed), x), atol=1e-5
    )
    out = packed["params"]["out"]["kernel"]
    exact = variables["params"]["out"]["kernel"].reshape(64, 64)
    codes = quantize(exact, jp.quant.nf4())
    np.testing.assert_array_equal(
        out.materialize().reshape(64, 64), dequantize(codes, jp.quant.nf4(), (64, 64))
    )


def test_layers_of_a_stack_that_a_loop_takes_one_by_one():
    w = jax.random.normal(jax.random.key(0), (3, 64, 64)) / 8
    x = jnp.ones((2, 64))

    def model(params, x):
        for i in range(3):
            x = jnp.tanh(x @ params["w"][i])
        return x @ params["w"][0].T

    packed = jp.quantize({"w": w}, jp.quant.nf4())
    expected = model(unpacked(packed), x)
    np.testing.assert_allclose(jp.lift(model, strict=True)(packed, x), expected, atol=1e-5)


def test_large_matrices_are_unpacked_in_tiles(monkeypatch):
    monkeypatch.setattr("jaxpeft.quant.product.TILE", 64 * 64 * 4)
    w = jax.random.normal(jax.random.key(0), (64, 256))
    params = jp.quantize({"w": w}, jp.quant.nf4(), compute="xla")
    x = jax.random.normal(jax.random.key(1), (5, 64))

    def model(params, x):
        y = x @ params["w"]
        return y, y @ params["w"].T

    lifted = jp.lift(model, strict=True)
    for ours, theirs in zip(lifted(params, x), model(unpacked(params), x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)
    text = jax.jit(lifted).lower(params, x).compile().as_text()
    assert "f32[64,256]" not in text and "f32[64,64]" in text
    grad, exact = (jax.grad(lambda x, p=p: (lifted(p, x)[1] ** 2).sum())(x)
                   for p in (params, unpacked(params)))  # fmt: skip
    np.testing.assert_allclose(grad, exact, rtol=1e-3)


@pytest.mark.parametrize(
    "fmt",
    [jp.quant.nf4(), jp.quant.nf4(128, double=False), jp.quant.int4(), jp.quant.int8(),
     jp.quant.int4(symmetric=False), jp.quant.int8(block=128)],
    ids=str,
)  # fmt: skip
def test_kernels_equal_the_dense_product_both_ways(fmt):
    w = jax.random.normal(jax.random.key(0), (512, 256))
    params = jp.quantize({"w": w}, fmt, compute="interpret")
    x = jax.random.normal(jax.random.key(1), (2, 10, 512))
    dense = params["w"].materialize()
    assert "tpu" in kernels.plans(fmt, params["w"].packed, 20)

    def loss(params, x):
        return (x @ params["w"] * jnp.arange(256)).sum()

    lifted = jp.lift(loss, strict=True)
    (y, dx), (expected, exact) = (
        jax.value_and_grad(f, 1)(p, x) for f, p in ((lifted, params), (loss, {"w": dense}))
    )
    np.testing.assert_allclose(y, expected, rtol=1e-3)
    np.testing.assert_allclose(dx, exact, rtol=1e-3, atol=1)


def test_what_cannot_be_quantized_is_named():
    params = {"a": {"kernel": jnp.ones((64, 8)).at[0, 0].set(jnp.inf)}, "b": jnp.ones((10, 8))}
    with pytest.raises(ValueError, match=r"'a/kernel' of shape \(64, 8\).* not finite"):
        jp.quantize(params, jp.quant.nf4())
    with pytest.raises(ValueError, match=r"'b' of shape \(10, 8\)"):
        jp.quantize(params, jp.rules(("b", jp.quant.nf4())))
    with pytest.raises(ValueError, match="matched none of the 2 weights"):
        jp.quantize(params, jp.rules(("c/**", jp.quant.nf4())))
    for given in ("int8", jp.quant.int8):
        for rules in (given, jp.rules(("b", given))):
            with pytest.raises(TypeError, match=r"no format. Write jp\.quant\.int8\(\)"):
                jp.quantize(params, rules)
    with pytest.raises(ValueError, match="fits none of the 1 weights"):
        jp.quantize({"b": params["b"]}, jp.quant.nf4())
    with pytest.raises(ValueError, match=r"'n', which is int32\(4, 4\)"):
        jp.quantize({"n": jnp.ones((4, 4), int)}, jp.rules(("n", jp.quant.int8())))


def test_weights_are_packed_once():
    packed = jp.quantize({"a": jnp.ones((64, 8))}, jp.quant.nf4())
    with pytest.raises(ValueError, match=r"'a', which is QuantizedWeight\(.*NF4.*merge"):
        jp.quantize(packed, jp.rules(("a", jp.quant.int8())))
    with pytest.raises(ValueError, match="fits none of the 1 weights: it takes dense matrices"):
        jp.quantize(packed, jp.quant.int8())


def test_shapes_alone_are_packed_as_their_weights_are():
    params = {"a": jnp.ones((3, 64, 8)), "b": jnp.ones(8)}
    shapes = jp.quantize(jax.eval_shape(lambda: params), jp.quant.nf4())
    expected = jax.eval_shape(lambda: jp.quantize(params, jp.quant.nf4()))
    assert jax.tree.flatten(shapes) == jax.tree.flatten(expected)
    assert shapes["a"].size == 3 * 64 * 8


def test_a_packed_weight_outside_of_a_lifted_call_says_what_to_call():
    weight, x = jp.quantize({"a": jnp.ones((64, 8))}, jp.quant.nf4())["a"], jnp.ones((2, 64))
    uses = [lambda: x @ weight, lambda: np.asarray(x) @ weight, lambda: weight[0]]
    uses += [lambda: weight * 2, lambda: np.asarray(weight), lambda: jnp.asarray(weight)]
    for use in uses:
        with pytest.raises(TypeError, match=r"float32\[64,8\] stands .* `jp.lift\(f\)"):
            use()


def test_packed_arrays_that_were_cast_are_refused():
    """Scales in bfloat16 would be a little off, in silence."""
    packed = jp.quantize({"a": jnp.ones((64, 8))}, jp.quant.nf4(double=False))
    call, x = jp.lift(lambda params, x: x @ params["a"]), jnp.ones((2, 64))
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), packed)
    floats = dataclasses.replace(
        packed["a"], packed=packed["a"].packed | {"absmax": cast["a"].packed["absmax"]}
    )
    for params in (cast, {"a": floats}):
        with pytest.raises(TypeError, match=r"is bfloat16, not .* `dtype=`"):
            call(params, x)


def test_parts_and_multiples_of_a_weight_stay_packed():
    """Columns are columns of the packed arrays, and numbers scale the result."""
    x, gain = jax.random.normal(jax.random.key(1), (2, 64)), jnp.linspace(-2, 2, 12)
    params = {"w": jax.random.normal(jax.random.key(0), (64, 12))}

    def model(params, x):
        w = params["w"]
        parts = [x @ part for part in (*jnp.split(w, 3, 1), w[:, 1:9:2])]
        at = jax.lax.dynamic_slice_in_dim(w, jnp.argmax(x[0, :3]), 4, 1)
        return *parts, x @ at, x @ (w * 0.5), x @ (-w * gain), (w / gain) @ x.T[:12]

    for fmt in FORMATS:
        packed = jp.quantize(params, fmt)
        program = jax.make_jaxpr(jp.lift(model, strict=True))(packed, x)
        ours, theirs = jp.lift(model, strict=True)(packed, x), model(unpacked(packed), x)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        # Of three parts each is unpacked by itself.
        assert "f32[64,4]" in str(program)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_products_are_in_the_dtype_that_a_packed_weight_shows(dtype):
    """Adapters are float32 unless asked otherwise; either way a bfloat16 base computes so."""
    x = jnp.ones((2, 64), jnp.bfloat16)
    packed = jp.quantize({"w": jnp.ones((64, 8))}, jp.quant.nf4(), dtype=jnp.bfloat16)
    methods = [jp.lora(2, dtype=dtype), jp.qalora(2, group=32, dtype=dtype)]
    for method in methods:
        tuned = jp.transform(lambda p, x: x @ p["w"], method, strict=True)
        adapter = tuned.init(jax.random.key(0), packed, x)
        assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {jnp.dtype(dtype)}
        program = jax.make_jaxpr(lambda a, p, x, f=tuned.apply: f(a, p, x))(adapter, packed, x)
        assert program.out_avals[0].dtype == jnp.bfloat16
        products = re.findall(r"(\w+)\[[^\]]*\] = dot_general", str(program))
        assert len(products) >= 3 and set(products) == {"bf16"}
