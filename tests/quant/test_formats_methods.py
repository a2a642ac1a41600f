"""Every format under every method that tunes weights: as over the unpacked weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.quant.formats import FORMATS, from_gguf
from jaxpeft.quant.formats.ggml import FIELDS
from jaxpeft.quant.formats.ggml_mixed import mix
from tests.quant.test_ggml import random_bytes

quant = jp.quant
# GGUF's come from bytes, since those of 256 are only read.
MADE = [
    quant.nf4(), quant.nf4(128, double=False), quant.fp4(), quant.int8(), quant.int8(64),
    quant.int8(symmetric=False), quant.int4(), quant.int4(32, symmetric=False), quant.llm_int8(),
    quant.fp8(), quant.fp8("e5m2", "block", tile=(64, 2)), quant.fp8(scale="tensor"),
    quant.mxfp4(), quant.nvfp4(),
]  # fmt: skip
METHODS = {
    "lora": jp.lora(2, alpha=4),
    "qalora": jp.qalora(2, group=32),
    "ia3": jp.ia3(),
    "ia3 of inputs": jp.ia3("in"),
    "chain": jp.chain(jp.rslora(2), jp.ia3()),
}
X = jax.random.normal(jax.random.key(1), (3, 512)) / 16


def model(params, x):
    return {name: jnp.sin(x @ w) for name, w in params["by format"].items()} | {
        "bias": params["bias"]
    }


@pytest.fixture(scope="module")
def packed():
    w = jax.random.normal(jax.random.key(0), (512, 6)) / 16
    weights = {str(fmt): jp.quantize({"w": w}, fmt)["w"] for fmt in MADE}
    blocks = {name: from_gguf(random_bytes(name), name) for name in FIELDS}
    blocks["mixed"] = mix(blocks["q4_k"], ("q6_k", "q4_k"))
    for name, (arrays, fmt, shape) in blocks.items():
        weights[name] = quant.wrap(arrays, fmt, shape, dtype=jnp.float32)
    assert {w.format.name for w in weights.values()} == set(FORMATS)
    return {"by format": weights, "bias": jnp.zeros(4)}


def dense(params):
    is_packed = lambda leaf: isinstance(leaf, quant.QuantizedWeight)  # noqa: E731
    return jax.tree.map(
        lambda leaf: leaf.materialize() if is_packed(leaf) else leaf, params, is_leaf=is_packed
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_method_over_every_format(name, packed, tmp_path):
    tuned = jp.transform(model, METHODS[name], strict=True)
    fresh = tuned.init(jax.random.key(2), packed, X)
    assert len(fresh) == len(packed["by format"])
    adapter = jax.tree.map(lambda a: a + jnp.cos(jnp.arange(a.size)).reshape(a.shape) / 9, fresh)

    @jax.jit
    def program(adapter, params, plain):
        def loss(adapter, params):
            y = tuned.apply(adapter, params, X)
            return sum(jnp.sin(value).sum() for value in y.values()), y

        both = jax.grad(loss, has_aux=True)
        merged = tuned.merge(adapter, params)
        return both(adapter, params), both(adapter, plain), (merged, model(merged, X))

    (grads, y), (exact, expected), (merged, baked) = program(adapter, packed, dense(packed))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # noqa: E731
    jax.tree.map(close, (grads, y), (exact, expected))
    jax.tree.map(close, baked, y)
    assert jax.tree.structure(merged) == jax.tree.structure(dense(packed))
    assert all(jax.tree.leaves(jax.tree.map(lambda g: bool(g.any()), grads)))

    jp.save(tmp_path / "a.safetensors", adapter, tuned)
    again, read = jp.load(tmp_path / "a.safetensors", model)
    jax.tree.map(np.testing.assert_array_equal, read, adapter)
    # As the first call, which compiles what `program` holds.
    assert jax.eval_shape(again.apply, read, packed, X) == jax.eval_shape(lambda: y)


def test_values_that_are_packed_cannot_be_trained(packed):
    for tuning in (jp.full(), jp.rules(("by format/*", jp.full()))):
        with pytest.raises(ValueError, match=r"is quantized: .*jp\.quantize\(params, jp\.rules"):
            jp.transform(model, tuning).init(jax.random.key(0), packed, X)
    bias = jp.rules(("bias", jp.full()))
    assert list(jp.transform(model, bias).init(jax.random.key(0), packed, X)) == ["bias"]
