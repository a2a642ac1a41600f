"""On a GPU: what is unpacked there, both kinds of fused products, and a step, against the CPU's.

JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft.quant import kernels, rows
from jaxpeft.quant.formats import dequantize, quantize
from tests.quant.test_kernels import CASES, error, normal
from tests.quant.test_rows import FORMATS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
]


def on_cpu(f, *args):
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.tree.map(np.asarray, f(*jax.tree.map(np.asarray, args)))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_weights_are_unpacked_to_the_same_bits(fmt):
    packed = on_cpu(lambda w: quantize(w, fmt), normal(0, 768, 48))
    unpack = lambda packed: dequantize(packed, fmt, (768, 48))  # noqa: E731
    np.testing.assert_array_equal(unpack(packed), on_cpu(unpack, packed))


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_few_rows(fmt, m):
    packed, x = quantize(normal(0, 768, 48), fmt), normal(1, m, 768)
    exact = np.asarray(x, np.float64) @ np.asarray(dequantize(packed, fmt, (768, 48)), np.float64)
    multiply = jax.jit(lambda p, x: rows.multiply(fmt, p, x, jnp.float32, unroll=True))
    assert error(multiply(packed, x), exact) < 1e-5


@pytest.mark.parametrize("fmt,m,k,n", CASES, ids=str)
def test_kernels_run(fmt, m, k, n):
    packed = quantize(normal(0, k, n), fmt)
    dense = np.asarray(dequantize(packed, fmt, (k, n)), np.float64)
    tile = kernels.plans(fmt, packed, m)["cuda"]
    x, dy = (normal(i, m, size).astype(jnp.bfloat16) for i, size in ((1, k), (2, n)))
    product = jax.jit(lambda p, x: kernels.product(fmt, tile, False, p, x))
    y, pullback = jax.vjp(lambda x: product(packed, x), x)
    assert error(y, np.asarray(x, np.float64) @ dense) < 2e-2
    assert error(pullback(dy)[0], np.asarray(dy, np.float64) @ dense.T) < 2e-2


def test_steps_lose_as_much_as_on_the_cpu():
    """LoRA over packed layers, a scan of them, AdamW: ten losses."""
    params = {"w": normal(0, 4, 128, 128) / 11, "head": normal(1, 128, 16) / 11}
    x, y = normal(2, 32, 128), normal(3, 32, 16)

    def model(params, x):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])
        return h @ params["head"]

    tuned, optimizer = jp.transform(model, jp.lora(4), strict=True), optax.adamw(1e-2)

    def losses(params, x, y):
        packed = jp.quantize(params, jp.quant.nf4())
        adapter = tuned.init(jax.random.key(4), packed, x)

        def step(carry, _):
            adapter, state = carry
            loss = lambda adapter: jnp.square(tuned.apply(adapter, packed, x) - y).mean()  # noqa: E731
            value, gradient = jax.value_and_grad(loss)(adapter)
            updates, state = optimizer.update(gradient, state, adapter)
            return (optax.apply_updates(adapter, updates), state), value

        with jax.default_matmul_precision("highest"):
            start = (adapter, optimizer.init(adapter))
            return jax.jit(lambda start: jax.lax.scan(step, start, length=10)[1])(start)

    np.testing.assert_allclose(losses(params, x, y), on_cpu(losses, params, x, y), rtol=1e-4)
