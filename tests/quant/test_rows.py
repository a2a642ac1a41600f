"""Products with few rows: they equal the dense product in float64, and make no matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxpeft as jp
from jaxpeft.quant import rows
from jaxpeft.quant.formats import dequantize, quantize

FORMATS = [
    jp.quant.nf4(),
    jp.quant.fp4(32, double=False),
    jp.quant.int4(32),
    jp.quant.int4(96, symmetric=False),
    jp.quant.int8(),
    jp.quant.int8(64, symmetric=False),
    jp.quant.mxfp4(),
    jp.quant.nvfp4(),
    jp.quant.nvfp4(inverse=True),
    jp.quant.gguf("q4_0"),
    jp.quant.gguf("q4_1"),
    jp.quant.gguf("q8_0"),
]
K, N = 192, 40


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def tuned_product(params, x):
    return jp.lift(lambda params, x: x @ params["w"], strict=True)(params, x)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("m,unroll", [(1, True), (3, False)])
def test_few_rows_equal_the_dense_product(fmt, m, unroll):
    packed = quantize(normal(0, K, N), fmt)
    x = normal(1, m, K)
    exact = np.asarray(x, np.float64) @ np.asarray(dequantize(packed, fmt, (K, N)), np.float64)
    assert rows.applies(fmt, packed, m)
    y = rows.multiply(fmt, packed, x, jnp.float32, unroll=unroll)
    assert np.abs(y - exact).max() < 1e-6 * np.abs(x).sum(1).max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_of_few_rows_is_that_of_the_dense_product(dtype):
    params = jp.quantize({"w": normal(0, K, N).astype(dtype)}, jp.quant.nf4())
    dense = {"w": params["w"].materialize()}
    x = normal(1, 2, 1, K).astype(dtype)
    y, pull = jax.vjp(lambda x: tuned_product(params, x), x)
    wanted, dense_pull = jax.vjp(lambda x: tuned_product(dense, x), x)
    assert y.shape == (2, 1, N) and y.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    assert np.abs(np.float32(y - wanted)).max() < 8 * eps * np.abs(np.float32(wanted)).max()
    np.testing.assert_array_equal(*(np.float32(f(wanted)[0]) for f in (pull, dense_pull)))
    _, tangent = jax.jvp(lambda x: tuned_product(params, x), (x,), (x,))
    np.testing.assert_array_equal(np.float32(tangent), np.float32(wanted))


def test_a_matrix_is_made_for_many_rows_alone():
    params = jp.quantize({"w": normal(0, K, N)}, jp.quant.nf4())
    assert not rows.applies(jp.quant.nf4(), params["w"].packed, rows.FEW + 1)
    assert not rows.applies(jp.quant.fp8(), quantize(normal(0, K, N), jp.quant.fp8()), 1)
    for m, made in [(1, False), (rows.FEW, False), (rows.FEW + 1, True)]:
        text = jax.jit(tuned_product).lower(params, normal(1, m, K)).compile().as_text()
        assert (f"f32[{K},{N}]" in text) == made


@pytest.mark.parametrize("spec", [(None, "all"), ("all", None)], ids=["outputs", "inputs"])
def test_sharded_codes_stay_where_they_are(spec):
    mesh = Mesh(np.array(jax.devices()), ("all",))
    place = NamedSharding(mesh, PartitionSpec(*spec))
    weight = jax.device_put(normal(0, 8 * 64, 8 * 16), place)
    params, x = jp.quantize({"w": weight}, jp.quant.nf4()), normal(1, 1, 8 * 64)
    compiled = jax.jit(tuned_product).lower(params, x).compile()
    moved = [line for line in compiled.as_text().splitlines() if "all-gather(" in line]
    assert not any("u8[" in line for line in moved), moved
    wanted = np.asarray(x) @ np.asarray(params["w"].materialize())
    np.testing.assert_allclose(compiled(params, x), wanted, rtol=1e-5, atol=1e-4)


def test_steps_are_written_out_for_a_gpu():
    params = jp.quantize({"w": normal(0, K, N)}, jp.quant.nf4())
    shapes = jax.eval_shape(lambda *args: args, params, normal(1, 1, K))
    text = {
        platform: jax.jit(tuned_product).trace(*shapes).lower(lowering_platforms=(platform,))
        for platform in ("cpu", "cuda")
    }
    loops, gathers = (
        {name: lowered.as_text().count(op) for name, lowered in text.items()}
        for op in ("stablehlo.while", '"stablehlo.gather"')
    )
    assert loops["cpu"] == 1 and loops["cuda"] == 0 and gathers["cuda"] > gathers["cpu"]
