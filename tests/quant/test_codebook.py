"""NF4 and FP4 against bitsandbytes, and against the published tables in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpeft.quant.formats import dequantize, error, fp4, nf4, quantize
from jaxpeft.quant.formats.codebook import decode_scales, encode_scales, phases, reach, reached

# (out, in, block): one column's scales fill, share and cross blocks of 256.
SHAPES = [(100, 576, 64), (4, 4096, 64), (70, 96, 32), (3, 8192, 32)]
MAKE = {"nf4": nf4, "fp4": fp4}
pack = jax.jit(quantize, static_argnums=1)
unpack = jax.jit(dequantize, static_argnums=(1, 2, 3))


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes").functional


def weights(out, rows, seed=0):
    w = np.random.default_rng(seed).standard_normal((out, rows)).astype(np.float32)
    w[0, :5], w[-1, : rows // 2] = 0, 0
    return w


def swapped(codes):
    return (codes >> 4) | (codes << 4)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize(("out", "rows", "block"), SHAPES)
def test_codes_scales_and_weights_equal_bitsandbytes(bnb, kind, out, rows, block):
    torch = pytest.importorskip("torch")
    w, fmt = weights(out, rows), MAKE[kind](block, double=False)
    codes, state = bnb.quantize_4bit(torch.from_numpy(w), blocksize=block, quant_type=kind)
    packed = pack(w.T, fmt)
    np.testing.assert_array_equal(swapped(codes.numpy().reshape(out, -1)).T, packed["codes"])
    np.testing.assert_array_equal(state.absmax.numpy().reshape(out, -1).T, packed["absmax"])
    dense = bnb.dequantize_4bit(codes, state).numpy().T
    np.testing.assert_array_equal(unpack(packed, fmt, (rows, out), jnp.float32), dense)


@pytest.mark.parametrize("kind", MAKE)
def test_ties_fall_as_in_bitsandbytes(bnb, kind):
    torch = pytest.importorskip("torch")
    fmt = MAKE[kind](32, double=False)
    table = np.sort(np.asarray(fmt.table, np.float32))
    middle = ((table[1:] + table[:-1]) / np.float32(2)).astype(np.float32)
    rows = [middle, np.nextafter(middle, np.float32(2)), np.nextafter(middle, np.float32(-2))]
    w = np.ones((3, 32), np.float32)
    # Not the smallest number beside zero, which XLA flushes.
    w[:, :15] = np.where(np.abs(rows) < 1e-30, np.sign(rows) * 1e-30, rows)
    codes, _ = bnb.quantize_4bit(torch.from_numpy(w), blocksize=32, quant_type=kind)
    expected = swapped(codes.numpy().reshape(3, -1)).T
    np.testing.assert_array_equal(expected, pack(w.T, fmt)["codes"])


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize(("out", "rows", "block"), SHAPES[:2])
def test_weights_are_nearest_values_of_the_table(kind, out, rows, block):
    fmt, w = MAKE[kind](block, double=False), weights(out, rows)
    packed = pack(w.T, fmt)
    values = w.astype(np.float64).reshape(out, -1, block)
    absmax = np.abs(values).max(-1, keepdims=True)
    grid = np.asarray(fmt.table, np.float64) * np.where(absmax == 0, 1, absmax)[..., None]
    best = np.abs(values[..., None] - grid).min(-1)
    dense = np.asarray(unpack(packed, fmt, (rows, out), jnp.float32), np.float64).T
    found = np.abs(values - dense.reshape(values.shape))
    np.testing.assert_allclose(found, best, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(packed["absmax"]).T, absmax[..., 0])


@pytest.mark.parametrize(("out", "rows", "block"), SHAPES)
def test_double_quantization_equals_bitsandbytes(bnb, out, rows, block):
    torch = pytest.importorskip("torch")
    count = rows // block
    absmax = torch.rand(out, count) + 0.3
    offset = absmax.mean()
    # The kernel for any device. The one for CPUs first rounds to 2^16 levels: see test_dynamic.
    kernel = torch.ops.bitsandbytes.quantize_blockwise.default
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    full = torch.nn.functional.pad((absmax - offset).flatten(), (0, -absmax.numel() % 256))
    codes, nested = kernel.redispatch(keys, full, bnb.create_dynamic_map(), 256)
    ours = jax.jit(encode_scales)(absmax.numpy().T, offset.numpy()[None, None])
    flat = codes[: absmax.numel()].reshape(out, count)
    np.testing.assert_array_equal(flat.T, ours["absmax"])
    np.testing.assert_array_equal(nested.numpy()[reached(count, out)], ours["nested_absmax"])
    back = bnb.dequantize_blockwise(
        codes, absmax=nested, code=bnb.create_dynamic_map(), blocksize=256
    )
    expected = (back + offset)[: absmax.numel()].reshape(out, count).T
    np.testing.assert_array_equal(jax.jit(decode_scales)(ours), expected)
    mean = encode_scales(absmax.numpy().T)["offset"]
    np.testing.assert_allclose(mean, offset.numpy()[None, None], rtol=1e-6)


def test_scales_are_within_half_a_step_of_the_dynamic_table():
    fmt, w = nf4(), weights(8, 4096)
    double, single = pack(w.T, fmt), pack(w.T, nf4(double=False))
    exact = np.asarray(single["absmax"], np.float64)
    offset = exact.mean()
    np.testing.assert_allclose(double["offset"], offset, rtol=1e-6)
    largest = np.abs(exact - offset).max()
    # The widest step of the table is 0.9 / 64.
    assert np.abs(decode_scales(double) - exact).max() <= largest * (0.45 / 64 + 1e-6)
    np.testing.assert_array_equal(double["codes"], single["codes"])


@pytest.mark.parametrize("double", [False, True])
def test_layers_and_slices_of_columns_are_packed_alike(double):
    fmt, shape = nf4(32, double=double), (2, 96, 70)
    w = np.stack([weights(70, 96, seed).T for seed in (1, 2)])
    packed = pack(w, fmt)
    dense = np.asarray(unpack(packed, fmt, shape, jnp.float32))
    alone = unpack(pack(w[1], fmt), fmt, shape[1:], jnp.float32)
    np.testing.assert_array_equal(dense[1], alone)
    cut = {name: a[..., 33:61] if a.shape[-1] > 1 else a for name, a in packed.items()}
    part = unpack(cut, fmt, (2, 96, 28), jnp.float32)
    np.testing.assert_array_equal(part, dense[..., 33:61])


@functools.cache
def steps(kind):
    table = np.sort(np.asarray(MAKE[kind]().table, np.float64))
    return np.diff(table).max() / 2


@given(
    kind=st.sampled_from(list(MAKE)),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.floats(-30, 30),
    tail=st.floats(0, 8),
)
def test_error_is_at_most_half_a_step(kind, seed, exponent, tail):
    random = np.random.default_rng(seed)
    w = random.standard_normal((64, 8)) * np.abs(random.standard_normal((64, 8))) ** tail
    w = (w * 10.0**exponent).astype(np.float32)
    w = np.where(np.abs(w) < 1e-35, 0, np.clip(w, -1e37, 1e37)).astype(np.float32)
    fmt = MAKE[kind](32, double=False)
    dense = unpack(pack(w, fmt), fmt, w.shape, jnp.float32)
    absmax = np.abs(w).reshape(2, 32, 8).max(1, keepdims=True)
    off = np.abs(w.astype(np.float64) - dense).reshape(2, 32, 8)
    assert (off <= absmax * (steps(kind) + 1e-6)).all()


def test_where_the_blocks_of_scales_lie():
    for count in (1, 3, 9, 64, 100, 256, 300, 512):
        flat = np.arange(40 * count).reshape(40, count) // 256
        first = flat[:, 0]
        assert (flat[:, -1] - first).max() < reach(count)
        np.testing.assert_array_equal(
            first * 256 + phases(count, 40)[0], np.arange(40) * count, strict=False
        )
        inside = np.arange(count)[:, None] + phases(count, 40).astype(int)
        listed = np.take_along_axis(reached(count, 40), inside // 256, axis=0)
        np.testing.assert_array_equal(listed, flat.T)


def test_the_error_of_a_normal_weight():
    w = weights(64, 256)
    rms, worst = error(w.T, pack(w.T, nf4()), nf4())
    dense = np.asarray(unpack(pack(w.T, nf4()), nf4(), (256, 64), jnp.float32), np.float64)
    np.testing.assert_allclose(rms, np.sqrt(np.mean((dense - w.T) ** 2)), rtol=1e-4)
    np.testing.assert_allclose(worst, np.abs(dense - w.T).max() / np.abs(w).max(), rtol=1e-4)
    assert error(jnp.zeros((32, 1)), quantize(jnp.zeros((32, 1)), nf4(32)), nf4(32)) == (0, 0)
