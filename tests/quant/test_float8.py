"""8-bit floats against torch's casts and against the formulas in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jaxpeft.quant.formats import Quantized, dequantize, fp8, from_fp8, int8, quantize, to_fp8

IN, OUT = 64, 12
FORMATS = [
    fp8(scale="tensor"),
    fp8(),
    fp8("e5m2"),
    fp8(scale="block", tile=(32, 1)),
    fp8(scale="block", tile=(32, 5)),
]
DTYPES = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def weight(seed=0):
    w = np.random.default_rng(seed).standard_normal((IN, OUT)).astype(np.float32)
    w[:, 3], w[5] = 0, 0
    return w


def absmax(w, fmt):
    """The largest magnitude that shares each weight's scale."""
    rows, columns = {"tensor": (IN, OUT), "channel": (IN, 1), "block": fmt.tile}[fmt.scale]
    largest = np.zeros(w.shape, np.float32)
    for i in range(0, IN, rows):
        for j in range(0, OUT, columns):
            tile = np.s_[i : i + rows, j : j + columns]
            largest[tile] = np.abs(w[tile]).max()
    return largest


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_codes_and_weights_equal_torch(fmt):
    w = weight()
    most = torch.finfo(DTYPES[fmt.kind]).max
    scale = absmax(w, fmt) / np.float32(most)
    steps = torch.from_numpy(w / np.where(scale == 0, 1, scale)).clamp(-most, most)
    codes = steps.to(DTYPES[fmt.kind])
    packed = quantize(w, fmt)
    ours = np.asarray(packed["codes"]).view(np.uint8)
    np.testing.assert_array_equal(ours, codes.view(torch.uint8).numpy())
    dense = codes.float().numpy() * scale
    np.testing.assert_array_equal(dequantize(packed, fmt, w.shape), dense)


@given(fmt=st.sampled_from(FORMATS), seed=st.integers(0, 2**32 - 1), exponent=st.floats(-20, 20))
def test_error_is_at_most_half_a_step(fmt, seed, exponent):
    w = (weight(seed) * 10**exponent).astype(np.float32)
    off = np.abs(w.astype(np.float64) - dequantize(quantize(w, fmt), fmt, w.shape))
    info = ml_dtypes.finfo(fmt.dtype)
    scale = absmax(w, fmt).astype(np.float64) / float(info.max)
    relative = 2.0 ** -(info.nmant + 1)
    smallest = float(info.smallest_subnormal) / 2
    assert (off <= (np.abs(w) * relative + smallest * scale) * 1.0001).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_files_there_and_back(fmt):
    weight_ = Quantized(quantize(weight(), fmt), fmt, (IN, OUT))
    arrays = to_fp8(weight_)
    assert arrays["weight"].shape == (OUT, IN)
    again = from_fp8(arrays, tile=fmt.tile if fmt.scale == "block" else None)
    assert again.format.scale == fmt.scale and again.shape == (IN, OUT)
    np.testing.assert_array_equal(dequantize(*again), dequantize(*weight_))


def test_tiles_of_a_file_are_those_of_its_rows_and_columns():
    random = np.random.default_rng(0)
    codes = random.standard_normal((OUT, IN)).astype(jnp.float8_e4m3fn)
    scale = random.random((3, 2)).astype(np.float32)
    weight_ = from_fp8({"weight": codes, "weight_scale_inv": scale}, tile=(32, 5))
    expected = codes.astype(np.float32).copy()
    for i in range(3):
        for j in range(2):
            expected[i * 5 : i * 5 + 5, j * 32 : j * 32 + 32] *= scale[i, j]
    np.testing.assert_array_equal(dequantize(*weight_), expected.T)
    np.testing.assert_array_equal(to_fp8(weight_)["weight_scale_inv"], scale)
    cut = {name: a[..., 3:] for name, a in weight_.packed.items()}
    np.testing.assert_array_equal(dequantize(cut, weight_.format, (IN, OUT - 3)), expected.T[:, 3:])
    with pytest.raises(ValueError, match="start inside a tile"):
        to_fp8(Quantized(cut, weight_.format, (IN, OUT - 3)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float8_e8m0fnu])
def test_a_last_tile_that_is_short(dtype):
    """Of 100 inputs in tiles of 64: both sides of the file are cut."""
    random = np.random.default_rng(0)
    codes = random.standard_normal((OUT, 100)).astype(jnp.float8_e4m3fn)
    scale = random.uniform(0.1, 9, (3, 2)).astype(dtype)
    weight_ = from_fp8({"weight": codes, "weight_scale_inv": scale}, tile=(64, 5))
    expected = codes.astype(np.float64)
    for i, j in np.ndindex(3, 2):
        expected[i * 5 : i * 5 + 5, j * 64 : j * 64 + 64] *= float(scale[i, j])
    np.testing.assert_allclose(dequantize(*weight_), expected.T, rtol=1e-6)
    assert weight_.format.tile == (4, 5)


def test_layers_have_scales_of_their_own():
    w = np.stack([weight(), 100 * weight(1)])
    for fmt in FORMATS:
        dense = dequantize(quantize(w, fmt), fmt, w.shape)
        alone = dequantize(quantize(w[1], fmt), fmt, w.shape[1:])
        np.testing.assert_array_equal(dense[1], alone)


CODES = np.ones((OUT, IN), jnp.float8_e4m3fn)
NAN = np.full((OUT, IN), np.nan, jnp.float8_e4m3fn)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fp8("e3m4"), r"fp8\('e3m4', 'channel'\): use one of e4m3fn, e5m2"),
        (lambda: fp8(scale="row"), "tensor, channel, block"),
        (lambda: fp8(tile=(0, 1)), "two positive sizes"),
        (lambda: quantize(weight(), fp8(scale="block")), "Use block=64"),
        (lambda: quantize(weight(), fp8(), key=jax.random.key(0)), "no stochastic rounding"),
        (lambda: from_fp8({"weight": CODES}), r"\['weight_scale'\] missing"),
        (
            lambda: from_fp8({"weight": CODES.astype(np.float16), "weight_scale": np.ones(1)}),
            "'weight' is float16.*use float8_e4m3fn",
        ),
        (lambda: from_fp8({"weight": CODES, "weight_scale": np.ones(5)}), r"'scale'.*\(1, 5\)"),
        (lambda: from_fp8({"weight": NAN, "weight_scale": np.ones(1)}), "not finite"),
        (
            lambda: from_fp8(
                {"weight": CODES, "weight_scale": np.ones((3, 2))}, tile=(32, 4)[::-1]
            ),
            "Check weight_block_size",
        ),
        (
            lambda: to_fp8(Quantized(quantize(weight(), int8()), int8(), (IN, OUT))),
            "no fp8 matrix",
        ),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
