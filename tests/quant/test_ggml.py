"""GGUF's block formats against the gguf package, bit for bit."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpeft.quant.formats import (
    MixedGGUF,
    Quantized,
    dequantize,
    from_gguf,
    int8,
    mix,
    quantize,
    to_gguf,
    unmix,
)
from jaxpeft.quant.formats import gguf as block_format
from jaxpeft.quant.formats.ggml import FIELDS

OUT, IN = 6, 512
WRITTEN = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]


def kind_of(name):
    return gguf.GGMLQuantizationType[name.upper()]


def random_bytes(name, stack=(), seed=0):
    """Any bytes are a block, as long as its scales are finite."""
    random = np.random.default_rng(seed)
    size = sum(field.length * field.dtype.itemsize for field in FIELDS[name])
    blocks = IN // (256 if name.endswith("k") else 32)
    raw = random.integers(0, 256, (*stack, OUT, blocks, size), np.uint8)
    start = 0
    for field in FIELDS[name]:
        end = start + field.length * field.dtype.itemsize
        if field.dtype == np.float16:
            scale = random.standard_normal((*stack, OUT, blocks, field.length)) / 100
            raw[..., start:end] = scale.astype(np.float16).view(np.uint8)
        start = end
    assert size == gguf.GGML_QUANT_SIZES[kind_of(name)][1]
    return raw.reshape(*stack, OUT, -1)


def weight(seed=0):
    w = np.random.default_rng(seed).standard_normal((OUT, IN)).astype(np.float32)
    w[0, :64], w[1, :32], w[2, 1] = 0, 3.0, -5.0
    w[3, :32] = np.arange(-16, 16) / 2
    return w


@pytest.mark.parametrize("name", FIELDS)
def test_weights_equal_gguf(name):
    data = random_bytes(name)
    ours = from_gguf(data, name.upper())
    assert ours.shape == (IN, OUT)
    np.testing.assert_array_equal(dequantize(*ours), gguf.dequantize(data, kind_of(name)).T)
    np.testing.assert_array_equal(to_gguf(ours), data)


@pytest.mark.parametrize("name", ["q4_1", "q6_k"])
def test_experts_are_a_stack(name):
    data = random_bytes(name, stack=(3,))
    ours = from_gguf(data, name)
    expected = gguf.dequantize(data, kind_of(name))
    np.testing.assert_array_equal(dequantize(*ours), np.swapaxes(expected, -1, -2))
    np.testing.assert_array_equal(to_gguf(ours), data)
    layer = {key: a[1] for key, a in ours.packed.items()}
    np.testing.assert_array_equal(dequantize(layer, ours.format, (IN, OUT)), expected[1].T)


@pytest.mark.parametrize("name", WRITTEN)
def test_bytes_equal_gguf(name):
    w, fmt = weight(), block_format(name)
    ours = Quantized(quantize(w.T, fmt), fmt, (IN, OUT))
    np.testing.assert_array_equal(to_gguf(ours), gguf.quantize(w, kind_of(name)))


@given(name=st.sampled_from(WRITTEN), seed=st.integers(0, 2**32 - 1), exponent=st.floats(-1, 3))
def test_error_is_at_most_half_a_step(name, seed, exponent):
    w = (np.random.default_rng(seed).standard_normal((64, 4)) * 10**exponent).astype(np.float32)
    fmt = block_format(name)
    dense = dequantize(quantize(w, fmt), fmt, w.shape)
    x = w.astype(np.float64).reshape(2, 32, 4)
    spread = x.max(1, keepdims=True) - x.min(1, keepdims=True)
    absmax = np.abs(x).max(1, keepdims=True)
    step = {
        "q4_0": absmax / 8,
        "q4_1": spread / 15,
        "q5_0": absmax / 16,
        "q5_1": spread / 31,
        "q8_0": absmax / 127,
    }[name]
    # The code after the last is cut off on one side; scales are rounded to float16.
    most = 1 if name.endswith("_0") and name != "q8_0" else 0.5
    off = np.abs(x - np.asarray(dense, np.float64).reshape(x.shape))
    assert (off <= most * step * 1.001 + absmax * 2**-10).all()


@pytest.mark.parametrize("kinds", [("q4_k", "q6_k", "q8_0"), ("q5_0", "q5_1"), ("q4_0", "q4_1")])
def test_layers_of_several_kinds_are_one_stack(kinds):
    data = [random_bytes(name, seed=seed) for seed, name in enumerate(kinds)]
    layers = [mix(from_gguf(raw, name), kinds) for raw, name in zip(data, kinds, strict=True)]
    stack = {name: np.stack([layer.packed[name] for layer in layers]) for name in ("bytes", "kind")}
    found = dequantize(stack, MixedGGUF(kinds), (len(kinds), IN, OUT))
    for layer, raw, name, values in zip(layers, data, kinds, found, strict=True):
        np.testing.assert_array_equal(values, gguf.dequantize(raw, kind_of(name)).T)
        np.testing.assert_array_equal(to_gguf(unmix(layer)), raw)


def mixed(**change):
    packed, fmt, shape = mix(from_gguf(random_bytes("q4_1"), "q4_1"), ("q4_0", "q4_1"))
    return Quantized(packed | change, fmt, shape)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixedGGUF(("q4_0",)), "two kinds"),
        (lambda: MixedGGUF(("q4_0", "q4_0")), "two kinds"),
        (lambda: MixedGGUF(("q4_0", "q2_k")), "use one of q4_0"),
        (lambda: quantize(jnp.ones((256, 2)), MixedGGUF(("q4_0", "q8_0"))), "only read.*q8_0"),
        (lambda: unmix(mixed(kind=np.full((1, 1), 2, np.uint8))), "'kind' is 2.* has 2"),
        (lambda: unmix(mixed(bytes=np.zeros((3, OUT), np.uint8))), r"'bytes'.*needs uint8"),
        (lambda: block_format("q2_k"), r"gguf\('q2_k'\): use one of q4_0.*gguf.dequantize"),
        (lambda: quantize(jnp.ones((256, 2)), block_format("q4_k")), "only read.*q4_0"),
        (lambda: quantize(jnp.ones((48, 2)), block_format("q4_0")), "blocks of 32 do not tile"),
        (
            lambda: quantize(jnp.ones((32, 2)), block_format("q8_0"), key=jax.random.key(0)),
            "no stochastic rounding",
        ),
        (lambda: from_gguf(np.zeros((3, 17), np.uint8), "Q4_0"), "blocks of 18 bytes"),
        (lambda: from_gguf(np.zeros((3, 18), np.int8), "Q4_0"), "is not uint8"),
        (lambda: from_gguf(np.full((3, 18), 255, np.uint8), "Q4_0"), "'d' has 3 of 3 .*finite"),
        (lambda: to_gguf(Quantized({}, int8(), (2, 2))), "no gguf format"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
