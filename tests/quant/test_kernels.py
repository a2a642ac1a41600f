"""Fused kernels, run by the interpreter: they equal the dense product in float64, both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.quant import kernels
from jaxpeft.quant.formats import dequantize, quantize

# Rows: of a matvec, few, more than few that no tile divides, several tiles. Sizes: inputs that are
# no power of two, outputs that only narrow tiles divide.
CASES = [
    (jp.quant.nf4(), 1, 384, 80),
    (jp.quant.nf4(), 150, 128, 48),
    (jp.quant.fp4(128, double=False), 5, 256, 192),
    (jp.quant.int4(32), 21, 96, 80),
    (jp.quant.int4(64, symmetric=False), 5, 384, 80),
    (jp.quant.int8(), 3, 256, 192),
    (jp.quant.int8(64), 21, 384, 16),
    (jp.quant.mxfp4(), 21, 128, 48),
    (jp.quant.gguf("q4_0"), 1, 128, 48),
    (jp.quant.gguf("q4_1"), 21, 128, 48),
]


# What newer versions of JAX want to know of a GPU, to lower for one that is not here.
H100 = jax.sharding.AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="cuda"
)
MESH = jax.sharding.AbstractMesh((1,), ("all",), abstract_device=H100)
ignored = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")


def lowered(f, *args):
    """The program for a GPU, of shapes of arguments."""
    shapes = jax.eval_shape(lambda *args: args, *args)
    with jax.sharding.use_abstract_mesh(MESH):
        return jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def error(ours, exact):
    return np.abs(np.asarray(ours, np.float64) - exact).max() / np.abs(exact).max()


@pytest.mark.parametrize("fmt,m,k,n", CASES, ids=str)
def test_kernels_for_gpus_equal_the_dense_product_both_ways(fmt, m, k, n):
    packed = quantize(normal(0, k, n), fmt)
    dense = np.asarray(dequantize(packed, fmt, (k, n)), np.float64)
    tile = kernels.plans(fmt, packed, m)["cuda"]
    x, dy = normal(1, m, k), normal(2, m, n)
    y, pullback = jax.vjp(lambda x: kernels.product(fmt, tile, True, packed, x), x)
    assert error(y, np.asarray(x, np.float64) @ dense) < 1e-5
    assert error(pullback(dy)[0], np.asarray(dy, np.float64) @ dense.T) < 1e-5
    low = kernels.product(fmt, tile, True, packed, x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16 and error(low, np.asarray(x, np.float64) @ dense) < 2e-2


@ignored
@pytest.mark.parametrize("m", [1, 5, 40])
def test_kernels_for_gpus_lower_to_triton_where_there_is_no_gpu(m):
    fmt = jp.quant.nf4()
    params = jp.quantize({"w": normal(0, 256, 192)}, fmt, compute="pallas")
    model = jp.lift(lambda params, x: (x @ params["w"]).sum(), strict=True)
    text = lowered(jax.value_and_grad(model, 1), params, normal(1, m, 256))
    assert text.count("xla.gpu.triton") == 2


@ignored
def test_kernels_run_where_they_are_known_to_work_or_asked_for(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x, w = normal(1, 4, 512), normal(0, 512, 256)
    for compute, kernels_there, on_gpu in [("xla", 0, 0), ("auto", 1, 0), ("pallas", 2, 1)]:
        params = jp.quantize({"w": w}, jp.quant.int8(), compute=compute)
        product = jp.lift(lambda params, x: x @ params["w"], strict=True)
        assert str(jax.make_jaxpr(product)(params, x)).count("pallas_call[") == kernels_there
        assert lowered(product, params, x).count("xla.gpu.triton") == on_gpu


def test_what_no_tile_fits_has_no_kernel():
    for fmt, shape in [(jp.quant.nf4(), (64, 24)), (jp.quant.fp8(), (64, 64))]:
        assert kernels.plans(fmt, quantize(normal(0, *shape), fmt), 4) == {}
