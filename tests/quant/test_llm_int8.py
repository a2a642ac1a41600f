"""LLM.int8(): weights, files and products against bitsandbytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.quant.formats import (
    Quantized,
    dequantize,
    from_llm_int8,
    int8,
    llm_int8,
    llm_int8_dot,
    quantize,
    to_llm_int8,
)

OUT, IN = 24, 64


@pytest.fixture(scope="module")
def ops():
    torch = pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    return torch.ops.bitsandbytes


def weight():
    w = np.random.default_rng(0).standard_normal((OUT, IN)).astype(np.float32)
    w[3] = 0
    return w


def packed():
    return Quantized(quantize(weight().T, llm_int8()), llm_int8(), (IN, OUT))


def inputs(rows, outliers, dtype=np.float32):
    x = np.random.default_rng(1).standard_normal((rows, IN)).astype(dtype)
    x[0, list(outliers)] = 9
    x[-1, list(outliers)] = -7
    return x


def test_weights_equal_bitsandbytes(ops):
    torch = pytest.importorskip("torch")
    codes, absmax, _ = ops.int8_vectorwise_quant(torch.from_numpy(weight()), 0.0)
    # The row of zeros is 0 / 0 in bitsandbytes.
    np.testing.assert_array_equal(
        np.delete(codes.numpy(), 3, 0).T, np.delete(packed().packed["codes"], 3, 1)
    )
    np.testing.assert_array_equal(absmax.numpy()[None], packed().packed["absmax"])
    ours = Quantized({"codes": codes.numpy().T, "absmax": absmax.numpy()[None]}, *packed()[1:])
    dense = ops.int8_vectorwise_dequant(codes, absmax).numpy().T
    np.testing.assert_array_equal(dequantize(*ours), dense)


@pytest.mark.parametrize("outliers", [(), (5, 40)])
@pytest.mark.parametrize("rows", [1, 7])
def test_products_equal_bitsandbytes(ops, rows, outliers):
    torch = pytest.importorskip("torch")
    x, w = inputs(rows, outliers), packed()
    file = {name: torch.from_numpy(np.array(a)) for name, a in to_llm_int8(w).items()}
    codes, rowmax, columns = ops.int8_vectorwise_quant(torch.from_numpy(x.copy()), 6.0)
    expected, _ = ops.int8_mixed_scaled_mm(
        torch.from_numpy(x), codes, file["weight"], rowmax, file["SCB"], columns, None
    )
    actual = jax.jit(llm_int8_dot, static_argnums=2)(x, w.packed, w.format)
    # bitsandbytes writes 1 / 127^2 as 6.200124e-05, which is 6.2000124e-05.
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-4, atol=5e-4)


def test_products_are_near_dense_ones_in_any_dtype_and_shape():
    w = packed()
    x = jnp.asarray(inputs(6, (5,))).astype(jnp.bfloat16).reshape(2, 3, IN)
    y = llm_int8_dot(x, w.packed, w.format)
    assert y.shape == (2, 3, OUT) and y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ np.asarray(dequantize(*w), np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, atol=0.3)


def test_without_outlier_columns_one_large_input_spoils_its_row():
    w, x = packed(), inputs(4, (5,)) * np.where(np.arange(IN) == 5, 20, 1).astype(np.float32)
    exact = x.astype(np.float64) @ np.asarray(dequantize(*w), np.float64)
    off = {
        threshold: np.abs(llm_int8_dot(x, w.packed, llm_int8(threshold)) - exact).max()
        for threshold in (6.0, float("inf"))
    }
    assert 10 * off[6.0] < off[float("inf")]


def test_gradients_are_those_of_the_dense_product():
    w, x = packed(), inputs(4, (5,))
    dense = np.asarray(dequantize(*w))
    grad = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(llm_int8_dot(x, w.packed, w.format)))))(x)
    expected = np.cos(llm_int8_dot(x, w.packed, w.format)) @ dense.T
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-4)


def test_files_there_and_back():
    arrays = to_llm_int8(packed())
    assert arrays["weight"].shape == (OUT, IN) and arrays["SCB"].shape == (OUT,)
    again = from_llm_int8(arrays, threshold=5.0)
    assert again.format == llm_int8(5.0) and again.shape == (IN, OUT)
    np.testing.assert_array_equal(again.packed["codes"], packed().packed["codes"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: llm_int8(0), "threshold=0"),
        (lambda: llm_int8_dot(jnp.ones((2, 3)), packed().packed, llm_int8()), r"x\(2, 3\) does"),
        (lambda: from_llm_int8({"weight": np.ones((2, 2), np.int8)}), r"\['SCB'\] missing"),
        (
            lambda: from_llm_int8({**to_llm_int8(packed()), "SCB": np.ones(3, np.float32)}),
            r"'absmax'.*\(1, 3\)",
        ),
        (
            lambda: from_llm_int8({**to_llm_int8(packed()), "SCB": np.full(OUT, np.inf, "f")}),
            "not finite",
        ),
        (
            lambda: to_llm_int8(Quantized(quantize(weight(), int8()), int8(), (OUT, IN))),
            "no llm_int8 matrix",
        ),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
