"""GPTQ and AWQ files against the definition of their layout, written out word by word."""

import numpy as np
import pytest

from jaxpeft.quant.formats import (
    Quantized,
    dequantize,
    from_awq,
    from_gptq,
    int4,
    int8,
    nf4,
    quantize,
    to_awq,
    to_gptq,
)
from jaxpeft.quant.formats.words import pack_words, unpack_words

IN, OUT, GROUP = 64, 16, 32
AWQ_COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


def nibble(word, i):
    return (int(word) >> (4 * i)) & 15


def file_arrays(kind, seed=0, symmetric=False):
    """Random bits in a file's shapes, as every bit pattern is a valid weight."""
    random = np.random.default_rng(seed)
    words = lambda *shape: random.integers(-(2**31), 2**31, shape).astype(np.int32)  # noqa: E731
    scales = random.uniform(0.001, 0.1, (IN // GROUP, OUT)).astype(np.float16)
    first = (IN // 8, OUT) if kind == "gptq" else (IN, OUT // 8)
    zeros = np.full((IN // GROUP, OUT // 8), 0x77777777, np.int32) if symmetric else None
    zeros = words(IN // GROUP, OUT // 8) if zeros is None else zeros
    return {"qweight": words(*first), "qzeros": zeros, "scales": scales}


def gptq_by_definition(arrays, version, index):
    w = np.zeros((IN, OUT))
    for i in range(IN):
        for j in range(OUT):
            q = nibble(arrays["qweight"][i // 8, j], i % 8)
            word = int(arrays["qzeros"][index[i], j // 8]) + (0x11111111 if version == 1 else 0)
            z = nibble(word % 2**32, j % 8)
            w[i, j] = float(arrays["scales"][index[i], j]) * (q - z)
    return w


def awq_by_definition(arrays):
    w = np.zeros((IN, OUT))
    for j in range(OUT):
        place = AWQ_COLUMN_OF_NIBBLE.index(j % 8)
        for i in range(IN):
            q = nibble(arrays["qweight"][i, j // 8], place)
            z = nibble(arrays["qzeros"][i // GROUP, j // 8], place)
            w[i, j] = float(arrays["scales"][i // GROUP, j]) * (q - z)
    return w


def same(actual, expected):
    assert actual.keys() >= expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, strict=True)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_is_read_and_written_exactly(version, indexed):
    arrays = file_arrays("gptq")
    index = np.arange(IN, dtype=np.int32) // GROUP
    if indexed:
        index = np.random.default_rng(1).permutation(index).astype(np.int32)
    arrays["g_idx"] = index
    options = dict(block=GROUP, symmetric=False, indexed=indexed, version=version)
    weight = from_gptq(arrays, **options)
    assert weight.shape == (IN, OUT) and weight.packed["scale"].dtype == np.float16
    expected = gptq_by_definition(arrays, version, index)
    np.testing.assert_allclose(dequantize(*weight), expected, rtol=1e-6)
    same(to_gptq(weight, version=version), arrays)


def test_symmetric_gptq_keeps_no_zero_points():
    arrays = file_arrays("gptq", symmetric=True)
    weight = from_gptq(arrays, block=GROUP)
    assert weight.packed.keys() == {"codes", "scale"}
    with_zeros = from_gptq(arrays, block=GROUP, symmetric=False)
    np.testing.assert_array_equal(dequantize(*weight), dequantize(*with_zeros))
    same(to_gptq(weight), arrays)


def test_awq_is_read_and_written_exactly():
    arrays = file_arrays("awq")
    weight = from_awq(arrays, block=GROUP)
    np.testing.assert_allclose(dequantize(*weight), awq_by_definition(arrays), rtol=1e-6)
    same(to_awq(weight), arrays)


@pytest.mark.parametrize("block", [32, None])
def test_our_weights_survive_a_file(block):
    fmt = int4(block, symmetric=False, scale="float16")
    w = np.random.default_rng(0).standard_normal((IN, OUT)).astype(np.float32)
    weight = Quantized(quantize(w, fmt), fmt, (IN, OUT))
    for again in (
        from_gptq(to_gptq(weight, version=2), block=block, symmetric=False, version=2),
        from_awq(to_awq(weight), block=block),
    ):
        assert again[1:] == weight[1:]
        same(again.packed, {name: np.asarray(a) for name, a in weight.packed.items()})


@pytest.mark.parametrize("axis", [0, 1])
def test_words(axis):
    codes = np.random.default_rng(0).integers(0, 16, (16, 24)).astype(np.uint8)
    np.testing.assert_array_equal(unpack_words(pack_words(codes, axis), axis), codes)


def change(kind="gptq", **arrays):
    return file_arrays(kind) | arrays


ORDER = np.arange(IN, dtype=np.int32) // GROUP
ANY = dict(block=GROUP, symmetric=False)


@pytest.mark.parametrize(
    ("read", "arrays", "options", "message"),
    [
        (from_gptq, {"qweight": np.zeros((8, 16), np.int32)}, {}, r"\['qzeros', 'scales'\] miss"),
        (from_gptq, change(qzeros=np.zeros((2, 3), np.int32)), ANY, r"'qzeros' is int32\(2, 3\)"),
        (from_gptq, change(qweight=np.zeros((8, 16), np.int64)), ANY, "'qweight' is int64"),
        (from_gptq, change(), dict(block=GROUP), "zero points are not all 8.*symmetric=False"),
        (from_gptq, change(), dict(block=16, symmetric=False), "'scale' of .*needs float16"),
        (from_gptq, change(g_idx=ORDER[::-1]), ANY, "indexed=True"),
        (from_gptq, change(g_idx=ORDER + 1), ANY, "from 1 to 2; 64 rows"),
        (from_gptq, change(g_idx=ORDER * np.nan), ANY, r"'g_idx' is float64\(64,\) from nan"),
        (from_gptq, change(g_idx=ORDER[:8]), ANY, r"'g_idx' is int32\(8,\)"),
        (from_gptq, change(), ANY | dict(version=3), "version=3: 1 is 'gptq'"),
        (from_gptq, change(scales=np.full((2, 16), np.nan, np.float16)), ANY, "not finite"),
        (from_awq, change("awq", qweight=np.zeros((64, 3), np.int32)), ANY, "'qweight'"),
        (from_awq, change("awq", scales=np.ones((2, 16), np.int8)), ANY, "scale='int8'"),
    ],
)
def test_damaged_files_are_refused(read, arrays, options, message):
    with pytest.raises(ValueError, match=message):
        read(arrays, **options)


def test_what_files_cannot_hold_is_refused():
    arrays = file_arrays("gptq") | {"g_idx": ORDER[::-1].copy()}
    with pytest.raises(ValueError, match="Write this weight with to_gptq"):
        to_awq(from_gptq(arrays, **ANY, indexed=True))
    wide = np.ones((IN, 12), np.float32)
    fmt = int4(32, scale="float16")
    with pytest.raises(ValueError, match="12 codes does not fill words of 8"):
        to_awq(Quantized(quantize(wide, fmt), fmt, wide.shape))
    with pytest.raises(ValueError, match=r"these are float32. Quantize with int4\(scale='float16'"):
        to_gptq(Quantized(quantize(wide, int4(32)), int4(32), wide.shape))
    with pytest.raises(ValueError, match="no int4 or int8 matrix"):
        to_gptq(Quantized(quantize(wide, nf4()), nf4(), wide.shape))
    with pytest.raises(ValueError, match="is not int4, which AWQ files hold"):
        to_awq(Quantized(quantize(wide, int8()), int8(), wide.shape))
    with pytest.raises(ValueError, match="indexed=False"):
        quantize(wide, from_gptq(arrays, **ANY, indexed=True).format)
