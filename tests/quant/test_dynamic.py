"""The dynamic 8-bit values against bitsandbytes, and against their definition in float64."""

import functools

import jax
import numpy as np
import pytest

from jaxpeft.quant.formats.blocks import midpoints, rounded
from jaxpeft.quant.formats.dynamic import (
    codes_of,
    decode_dynamic,
    dynamic_table,
    encode_dynamic,
)

encode = jax.jit(encode_dynamic, static_argnames="signed")


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes").functional


def published(signed):
    """Every value by its definition: a power of ten times the middle of one linear fraction."""
    values = [0.0, 1.0]
    for exponent in range(7):
        count = 2 ** (exponent + (0 if signed else 1))
        middles = [0.1 + 0.9 * (2 * i + 1) / (2 * count) for i in range(count)]
        values += [m * 10.0 ** (exponent - 6) for m in middles]
        values += [-m * 10.0 ** (exponent - 6) for m in middles] if signed else []
    return np.sort(values)


def blocks(signed, rows=64):
    random = np.random.default_rng(0)
    x = random.standard_normal((rows, 256)) * random.random((rows, 256)) ** 6
    x[1] = 0
    return (x if signed else np.abs(x)).astype(np.float32)


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_is_the_published_one(signed):
    np.testing.assert_allclose(dynamic_table(signed), published(signed), rtol=1e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_equals_that_of_bitsandbytes(bnb, signed):
    np.testing.assert_array_equal(dynamic_table(signed), bnb.create_dynamic_map(signed).numpy())


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_nearest(signed):
    x, table = blocks(signed), published(signed)
    codes, absmax = encode(x, signed=signed)
    np.testing.assert_array_equal(absmax, np.abs(x).max(-1))
    scaled = x.astype(np.float64) / np.where(absmax == 0, 1, absmax)[:, None]
    best = np.abs(scaled[..., None] - table).min(-1)
    np.testing.assert_allclose(np.abs(scaled - table[np.asarray(codes)]), best, atol=1e-7)
    back = np.asarray(decode_dynamic(codes, absmax[:, None], signed=signed))
    np.testing.assert_allclose(back, table[np.asarray(codes)] * absmax[:, None], rtol=1e-6)
    assert not back[1].any()


@pytest.mark.parametrize("signed", [True, False])
def test_codes_around_every_middle_and_of_numbers_of_all_sizes_are_nearest(signed):
    """The code is the number of middles below `x`: exact in float64, ties downwards."""
    middles = midpoints(dynamic_table(signed))
    close = [np.nextafter(middles, np.float32(to)) for to in (np.inf, -np.inf)]
    sizes = 10.0 ** np.random.default_rng(0).uniform(-45, 0, 10**5)
    x = np.concatenate([middles, *close, dynamic_table(signed), sizes, -sizes]).astype(np.float32)
    x = x if signed else np.abs(x)
    expected = np.searchsorted(middles.astype(np.float64), x.astype(np.float64), side="left")
    codes = jax.jit(functools.partial(codes_of, signed=signed))(x, np.float32(1))
    np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_equal_those_of_bitsandbytes(bnb, signed):
    torch = pytest.importorskip("torch")
    x, code = blocks(signed), bnb.create_dynamic_map(signed)
    kernel = torch.ops.bitsandbytes.quantize_blockwise.default
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    expected, absmax = kernel.redispatch(keys, torch.from_numpy(x), code, 256)
    codes, ours = encode(x, signed=signed)
    np.testing.assert_array_equal(expected.numpy(), codes)
    np.testing.assert_array_equal(absmax.numpy(), ours)
    dense = bnb.dequantize_blockwise(expected, absmax=absmax, code=code, blocksize=256)
    back = jax.jit(decode_dynamic, static_argnames="signed")(codes, ours[:, None], signed=signed)
    np.testing.assert_array_equal(dense.numpy(), back)


@pytest.mark.parametrize("signed", [True, False])
def test_bitsandbytes_on_a_cpu_rounds_to_a_grid_first(bnb, signed):
    """Its CPU kernel looks up `x` among 2^16 points of [-1, 1]: ours, of the nearest point."""
    torch = pytest.importorskip("torch")
    x = blocks(signed)[2:]
    expected, _ = bnb.quantize_blockwise(
        torch.from_numpy(x), code=bnb.create_dynamic_map(signed), blocksize=256
    )
    f32 = np.float32
    scaled = np.clip(x * (f32(1) / np.abs(x).max(-1, keepdims=True)), f32(-1), f32(1))
    index = ((scaled + f32(1)) * f32(0.5) * f32(65535) + f32(0.5)).astype(np.int64)
    grid = index.astype(f32) / f32(65535) * f32(2) - f32(1)
    codes = np.searchsorted(midpoints(dynamic_table(signed)), grid)
    np.testing.assert_array_equal(expected.numpy(), codes)


def test_products_are_rounded_before_a_sum():
    a, b, c = np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32)
    actual = jax.jit(lambda a, b, c: rounded(a * b) + c)(a, b, c)
    np.testing.assert_array_equal(actual, a * b + c)
