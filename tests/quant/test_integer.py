"""Integer formats against their formulas in float64, and stochastic rounding against its law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpeft.quant.formats import dequantize, int4, int8, quantize

FORMATS = [
    int8(),
    int8(32, symmetric=False),
    int4(32),
    int4(32, scale="float16"),
    int4(None, symmetric=False),
    int4(32, symmetric=False, scale="bfloat16"),
]
SHAPE = (64, 8)


def blocked(x, fmt):
    return np.asarray(x, np.float64).reshape(-1, fmt.block or SHAPE[0], SHAPE[1])


def expected(w, fmt):
    """The weight that the formulas give in float64, and the step of each block."""
    x, most = blocked(w, fmt), 2**fmt.bits - 1
    stored = lambda s: s.astype(jnp.dtype(fmt.scale)).astype(np.float64)  # noqa: E731
    if fmt.symmetric:
        largest, divisor = (127, 127) if fmt.bits == 8 else (7, 7.5)
        scale = stored(np.abs(x).max(1, keepdims=True) / divisor)
        low = -largest if fmt.bits == 8 else -8
        codes = np.clip(np.round(x / np.where(scale == 0, 1, scale)), low, largest)
        return (codes * scale).reshape(SHAPE), scale
    low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    scale = stored((high - low) / most)
    safe = np.where(scale == 0, 1, scale)
    zero = np.clip(np.round(-low / safe), 0, most)
    codes = np.clip(np.round(x / safe) + zero, 0, most)
    return ((codes - zero) * scale).reshape(SHAPE), scale


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_weights_equal_the_formulas(fmt):
    w = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    w[:, 3], w[0] = 0, 0
    dense = dequantize(quantize(w, fmt), fmt, SHAPE)
    reference, scale = expected(w, fmt)
    # Float32 may fall to the other side of a tie, such as that of max|W| / scale = 7.5.
    steps = blocked(w, fmt) / np.where(scale == 0, 1, scale)
    tie = np.abs(np.abs(steps - np.round(steps)) - 0.5) < 1e-4
    off = np.abs(blocked(dense, fmt) - blocked(reference, fmt))
    assert (off <= np.where(tie, 1, 1e-4) * scale).all() and tie.mean() < 0.04
    assert not np.asarray(dense)[:, 3].any() and not np.asarray(dense)[0].any()


@given(
    fmt=st.sampled_from(FORMATS),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.floats(-3, 3),
    shift=st.floats(-3, 3),
)
def test_error_is_at_most_half_a_step(fmt, seed, exponent, shift):
    w = np.random.default_rng(seed).standard_normal(SHAPE) + shift
    w = (w * 10**exponent).astype(np.float32)
    dense = dequantize(quantize(w, fmt), fmt, SHAPE)
    scale = expected(w, fmt)[1]
    # A stored scale that was rounded down leaves the largest weights out of reach by that much.
    slack = {"float32": 1e-5, "float16": 2**-11, "bfloat16": 2**-8}[fmt.scale] * 2**fmt.bits
    off = np.abs(blocked(w, fmt) - blocked(dense, fmt))
    assert (off <= scale * (0.5 + slack)).all()


@pytest.mark.parametrize("fmt", [int8(), int4(32), int4(32, symmetric=False)], ids=str)
def test_stochastic_rounding_is_right_on_average(fmt):
    w = np.random.default_rng(0).uniform(-0.9, 0.9, SHAPE).astype(np.float32)
    w[0], w[32] = 1, -1
    once = lambda key: dequantize(quantize(w, fmt, key=key), fmt, SHAPE)  # noqa: E731
    many = np.asarray(jax.vmap(once)(jax.random.split(jax.random.key(0), 400)), np.float64)
    scale = np.broadcast_to(expected(w, fmt)[1], blocked(w, fmt).shape).reshape(SHAPE)
    inside = np.abs(w) < 0.85
    # The mean of 400 draws of a step at most one wide has a standard deviation of 1/40 of it.
    assert (np.abs(many.mean(0) - w)[inside] <= scale[inside] * 5 / 40).all()
    assert (np.abs(many - w) <= scale * 1.001).all()
    assert many.std(0).max() > 0
    np.testing.assert_array_equal(once(jax.random.key(1)), once(jax.random.key(1)))


def test_layouts():
    layout = int4(32, symmetric=False, scale="float16").layout((5, 64, 3))
    assert {name: (a.shape, a.dtype.name) for name, a in layout.items()} == {
        "codes": ((5, 32, 3), "uint8"),
        "scale": ((5, 2, 3), "float16"),
        "zero": ((5, 2, 3), "uint8"),
    }
    assert int8().layout((5, 64, 3))["codes"].dtype == np.int8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: int4(7), r"int4\(block=7\): use an even number"),
        (lambda: int8(scale="float8"), "one of float32, float16, bfloat16"),
        (lambda: quantize(jnp.ones((48, 2)), int4()), "Use block=16"),
        (lambda: quantize(jnp.ones((7, 2)), int4(None)), "do not tile"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
