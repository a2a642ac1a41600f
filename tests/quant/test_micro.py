"""MXFP4 and NVFP4 against compressed-tensors, ml_dtypes and transformers."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpeft.quant.formats import dequantize, mxfp4, nvfp4, quantize
from jaxpeft.quant.formats.blocks import unpack_nibbles

SHAPE = (128, 12)
FORMATS = [mxfp4(), nvfp4(), nvfp4(inverse=True)]


def weight(seed=0):
    w = np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)
    w[:, 3], w[5] = 0, 0
    return w


def rounded(x):
    """To E2M1 as ml_dtypes casts, after saturation."""
    return np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)


def repeated(scale, block):
    return np.repeat(np.asarray(scale).astype(np.float32), block, axis=-2)


def test_the_codes_are_those_of_ml_dtypes():
    values = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    halves = np.concatenate([values, np.linspace(-6, 6, 97, dtype=np.float32)])
    near = [np.nextafter(halves, np.float32(s)) for s in (-9, 9)]
    points = np.concatenate([halves, *near])
    points = points[np.abs(points) > 1e-30]
    w = np.zeros((32, len(points)), np.float32)
    w[0], w[1] = points, 6
    packed = quantize(w, mxfp4())
    assert (np.asarray(packed["scale"]) == 127).all()
    codes = np.asarray(unpack_nibbles(packed["codes"]))[0]
    expected = points.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    np.testing.assert_array_equal(codes, expected)
    assert (values[codes] == rounded(points)).all()


def test_mxfp4_by_its_formula():
    w = weight() * np.float32(10) ** np.linspace(-12, 12, SHAPE[1], dtype=np.float32)
    packed = quantize(w, mxfp4())
    largest = np.abs(w).reshape(4, 32, -1).max(1)
    exponent = np.floor(np.log2(np.where(largest == 0, 2.0**-124, largest))) - 2
    np.testing.assert_array_equal(np.asarray(packed["scale"]), exponent + 127)
    scale = repeated(2.0**exponent, 32)
    np.testing.assert_array_equal(dequantize(packed, mxfp4(), SHAPE), rounded(w / scale) * scale)


@pytest.mark.parametrize("inverse", [False, True])
def test_nvfp4_by_its_formula(inverse):
    w, fmt, f32 = weight(), nvfp4(inverse=inverse), np.float32
    packed = quantize(w, fmt)
    largest = np.abs(w).reshape(8, 16, -1).max(1)
    if inverse:
        tensor = f32(448 * 6) / np.abs(w).max()
        codes = (tensor * (largest / f32(6))).astype(ml_dtypes.float8_e4m3fn)
        scale = repeated(codes, 16) / tensor
    else:
        tensor = np.abs(w).max() / f32(448 * 6)
        codes = (largest / f32(6) / tensor).astype(ml_dtypes.float8_e4m3fn)
        scale = repeated(codes, 16) * tensor
    np.testing.assert_array_equal(np.asarray(packed["scale"]), codes)
    np.testing.assert_array_equal(packed["tensor_scale"], tensor[None, None])
    expected = rounded(w / np.where(scale == 0, 1, scale)) * scale
    np.testing.assert_array_equal(dequantize(packed, fmt, SHAPE), expected)


@given(fmt=st.sampled_from(FORMATS), seed=st.integers(0, 2**32 - 1), exponent=st.floats(-10, 10))
def test_error_is_at_most_half_a_step(fmt, seed, exponent):
    w = (weight(seed) * 10**exponent).astype(np.float32)
    packed = quantize(w, fmt)
    off = np.abs(w.astype(np.float64) - dequantize(packed, fmt, SHAPE))
    if fmt == mxfp4():
        scale = np.exp2(repeated(packed["scale"], 32) - 127.0)
    else:
        tensor = np.float64(packed["tensor_scale"])
        scale = repeated(packed["scale"], 16) * (1 / tensor if fmt.inverse else tensor)
    size = np.abs(w) / np.where(scale == 0, 1, scale)
    # Steps of a half up to 2, of 1 up to 4, of 2 up to 6; larger ones become 6.
    half = np.select([size <= 2, size <= 4, size <= 6], [0.25, 0.5, 1.0], size - 6)
    assert (off <= (half + 1e-5) * scale + 1e-30).all()
    assert size.max() < (8 if fmt == mxfp4() else 6.4)


def test_layers_have_scales_of_their_own():
    w = np.stack([weight(), 100 * weight(1)])
    for fmt in FORMATS:
        dense = dequantize(quantize(w, fmt), fmt, w.shape)
        alone = dequantize(quantize(w[1], fmt), fmt, SHAPE)
        np.testing.assert_array_equal(dense[1], alone)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_refused(fmt):
    with pytest.raises(ValueError, match="do not tile.*Leave this weight dense"):
        quantize(jnp.ones((24, 2)), fmt)
    with pytest.raises(ValueError, match="no stochastic rounding"):
        quantize(jnp.ones((32, 2)), fmt, key=jax.random.key(0))
