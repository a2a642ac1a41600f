"""compressed-tensors' files against the compressed-tensors package, both ways."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxpeft.quant.formats import (
    Quantized,
    dequantize,
    fp8,
    from_compressed_tensors,
    from_mxfp4,
    from_nvfp4,
    int4,
    int8,
    mxfp4,
    nf4,
    nvfp4,
    quantize,
    to_compressed_tensors,
)

OUT, IN = 20, 96
INT = dict(type="int", symmetric=True)
CASES = {
    "int4 groups": ("pack-quantized", dict(INT, num_bits=4, strategy="group", group_size=32)),
    "int4 zeros": (
        "pack-quantized",
        dict(INT, num_bits=4, strategy="group", group_size=32, symmetric=False),
    ),
    "int4 channels": ("pack-quantized", dict(INT, num_bits=4, strategy="channel")),
    "int8 words": (
        "pack-quantized",
        dict(INT, num_bits=8, strategy="group", group_size=32, symmetric=False),
    ),
    "int8": ("int-quantized", dict(INT, num_bits=8, strategy="channel")),
    "int8 tensor": ("int-quantized", dict(INT, num_bits=8, strategy="tensor")),
    "int8 zeros": ("int-quantized", dict(INT, num_bits=8, strategy="channel", symmetric=False)),
    "int8 words of a tensor": (
        "pack-quantized",
        dict(INT, num_bits=8, strategy="tensor", symmetric=False),
    ),
    "int4 bytes": (
        "int-quantized",
        dict(INT, num_bits=4, strategy="group", group_size=32, symmetric=False),
    ),
    "int4 blocks": (
        "pack-quantized",
        dict(INT, num_bits=4, strategy="block", block_structure=[8, 32], symmetric=False),
    ),
    "mxfp8": (
        "mxfp8-quantized",
        dict(num_bits=8, type="float", strategy="group", group_size=32),
    ),
    "fp8 tensor": ("float-quantized", dict(num_bits=8, type="float", strategy="tensor")),
    "fp8": ("float-quantized", dict(num_bits=8, type="float", strategy="channel")),
    "fp8 blocks": (
        "float-quantized",
        dict(num_bits=8, type="float", strategy="block", block_structure=[8, 32]),
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        dict(num_bits=4, type="float", strategy="group", group_size=32),
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        dict(num_bits=4, type="float", strategy="tensor_group", group_size=16),
    ),
}
READ_ALONE = ("int8 words", "int8 words of a tensor", "int8 tensor", "int4 bytes", "int4 blocks")
WRITTEN = [name for name in CASES if name not in (*READ_ALONE, "mxfp8")]


@pytest.fixture(scope="module")
def package():
    pytest.importorskip("compressed_tensors")
    from compressed_tensors import quantization
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    def open_(name):
        format, options = CASES[name]
        args = quantization.QuantizationArgs(**options)
        scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
        return BaseCompressor.get_value_from_registry(format), scheme, args

    return open_, calculate_qparams, generate_gparam


def numpy(tensors):
    return {
        name: t.view(torch.uint8).numpy().view(jnp.float8_e4m3fn)
        if t.dtype == torch.float8_e4m3fn
        else t.numpy()
        for name, t in tensors.items()
    }


def torched(arrays):
    return {
        name: torch.from_numpy(np.array(a).view(np.uint8)).view(torch.float8_e4m3fn)
        if a.dtype == jnp.float8_e4m3fn
        else torch.from_numpy(np.array(a))
        for name, a in arrays.items()
    }


def file_of(package, name):
    """The tensors that the package writes for a weight, and the weight that it reads again."""
    open_, calculate_qparams, generate_gparam = package
    compressor, scheme, args = open_(name)
    w = torch.from_numpy(np.random.default_rng(0).standard_normal((OUT, IN)).astype(np.float32))
    groups, columns = {
        "tensor": (1, IN),
        "channel": (OUT, IN),
        "block": (None, None),
    }.get(args.strategy, (OUT, args.group_size))
    options = {}
    if args.strategy == "block":
        padded = torch.nn.functional.pad(w, (0, 0, 0, -OUT % 8)).reshape(-1, 8, IN // 32, 32)
        low, high = padded.amin((1, 3)), padded.amax((1, 3))
    else:
        parts = w.reshape(groups, -1, columns) if groups > 1 else w.reshape(1, 1, -1)
        low, high = parts.amin(-1), parts.amax(-1)
    if name == "nvfp4":
        options["global_scale"] = generate_gparam(w.min(), w.max())
    scale, zero = calculate_qparams(low, high, args, **options)
    if args.strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    if name in ("mxfp4", "mxfp8"):
        scale = 2.0 ** torch.floor(torch.log2(scale))
    state = {"weight": w, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
    if name == "nvfp4":
        state["weight_global_scale"] = options["global_scale"]
        state["weight_scale"] = scale.to(torch.float8_e4m3fn).float()
    tensors = compressor.compress(state, scheme)
    return tensors, compressor.decompress(dict(tensors), scheme)["weight"].float().numpy()


@pytest.mark.parametrize("name", CASES)
def test_files_are_read_as_the_package_reads_them(package, name):
    tensors, dense = file_of(package, name)
    format, options = CASES[name]
    ours = from_compressed_tensors(numpy(tensors), options, format)
    assert ours.shape == (IN, OUT)
    actual = np.asarray(dequantize(*ours)).T
    # The package rounds 4-bit floats to bfloat16 as it reads them.
    tolerance = 2**-7 if format.endswith("fp4-pack-quantized") else 0
    np.testing.assert_allclose(actual, dense, rtol=tolerance)


@pytest.mark.parametrize("name", WRITTEN)
def test_files_are_written_as_the_package_writes_them(package, name):
    tensors, _ = file_of(package, name)
    format, options = CASES[name]
    weight = from_compressed_tensors(numpy(tensors), options, format)
    again = to_compressed_tensors(weight)
    assert again.format == format
    said = {key: value for key, value in again.weights.items() if value is not None}
    assert said == {"symmetric": True} | options
    symmetric = options.get("symmetric", True)
    assert again.arrays.keys() == tensors.keys() - ({"weight_zero_point"} if symmetric else set())
    for key, array in again.arrays.items():
        expected = numpy(tensors)[key]
        np.testing.assert_array_equal(
            np.asarray(array).astype(np.float32), expected.astype(np.float32)
        )
        assert array.dtype == expected.dtype and array.shape == expected.shape


OURS = [int4(32), int4(None, symmetric=False), int8(32, symmetric=False), fp8("e5m2", "tensor")]
OURS += [fp8(scale="block", tile=(32, 8)), mxfp4(), nvfp4(inverse=True)]


@pytest.mark.parametrize("fmt", OURS, ids=str)
def test_our_weights_survive_a_file(fmt):
    w = np.random.default_rng(0).standard_normal((IN, OUT)).astype(np.float32)
    weight = Quantized(quantize(w, fmt), fmt, (IN, OUT))
    again = from_compressed_tensors(*to_compressed_tensors(weight))
    assert again.format == fmt
    for name, array in weight.packed.items():
        np.testing.assert_array_equal(
            np.asarray(again.packed[name]).astype(np.float32), np.asarray(array).astype(np.float32)
        )


def test_mxfp4_blocks_of_experts_as_transformers_reads_them():
    read = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (2, OUT, 3, 16), np.uint8)
    scales = random.integers(110, 140, (2, OUT, 3), np.uint8)
    dense = read(torch.from_numpy(codes), torch.from_numpy(scales), dtype=torch.float32)
    ours = from_mxfp4(codes, scales)
    assert ours.shape == (2, IN, OUT)
    np.testing.assert_array_equal(dequantize(*ours), dense.numpy())


def test_nvfp4_with_a_factor():
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (OUT, IN // 2), np.uint8)
    scales = random.uniform(1, 400, (OUT, IN // 16)).astype(jnp.float8_e4m3fn)
    both, half = from_nvfp4(codes, scales, 0.25), from_nvfp4(codes, scales, 4.0, inverse=True)
    np.testing.assert_array_equal(dequantize(*both), dequantize(*half))
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(OUT, IN)
    signed = np.take(values, nibbles & 7) * np.where(nibbles > 7, -1, 1)
    expected = signed * np.repeat(scales.astype(np.float64) / 4, 16, axis=1)
    np.testing.assert_allclose(dequantize(*both), expected.T, rtol=1e-6)


def test_rows_in_the_order_of_activations():
    weight = Quantized(quantize(np.ones((IN, OUT), "f"), int4(32)), int4(32), (IN, OUT))
    arrays, weights, format = to_compressed_tensors(weight)
    index = np.random.default_rng(0).permutation(np.arange(IN) // 32).astype(np.int32)
    arrays["weight_scale"] = np.random.default_rng(1).random((OUT, 3)).astype(np.float32)
    ours = from_compressed_tensors(arrays | {"weight_g_idx": index}, weights, format)
    expected = 7 * arrays["weight_scale"].T[index]
    np.testing.assert_array_equal(dequantize(*ours), expected)
    again = to_compressed_tensors(ours)
    np.testing.assert_array_equal(again.arrays["weight_g_idx"], index)
    # What a reader who knows of no order has to refuse.
    assert again.weights["actorder"] == "group"
    unused = arrays | {"weight_g_idx": np.full(IN, -1, np.int32)}
    assert not from_compressed_tensors(unused, weights, format).format.indexed
    for bad in (index + 1, index - 1, index[1:], index + 0.0):
        with pytest.raises(ValueError, match="'weight_g_idx' is .* rows need .* from 0 to 2"):
            from_compressed_tensors(arrays | {"weight_g_idx": bad}, weights, format)


def written(fmt):
    w = np.random.default_rng(0).standard_normal((IN, OUT)).astype(np.float32)
    return to_compressed_tensors(Quantized(quantize(w, fmt), fmt, (IN, OUT)))


def changed(fmt, weights=(), format=None, **arrays):
    file = written(fmt)
    known = {name: a for name, a in (file.arrays | arrays).items() if a is not None}
    return known, file.weights | dict(weights), format or file.format


ZEROS = int4(32, symmetric=False)
F4 = dict(num_bits=4, type="float")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (changed(int4(32), format="marlin-24"), "format='marlin-24' is not known.*pack-quantized"),
        (changed(int4(32), dict(num_bits=3)), "num_bits=3.*Load this weight dense"),
        (changed(int8(), dict(num_bits=4)), "integers from -?[0-9]+ to 127, but 4 bits reach"),
        (changed(int4(32), F4), "type='float'"),
        (changed(int4(32), weight_shape=None), r"\['weight_shape'\] missing"),
        (changed(int4(32), weight_packed=np.ones((OUT, 11), np.int32)), "needs int32.20, 12"),
        (changed(int4(32), weight_scale=np.ones((OUT, 2), "f")), "2 blocks of 32 are not"),
        (changed(ZEROS, weight_zero_point=None), r"\['weight_zero_point'\] missing"),
        (changed(ZEROS, weight_zero_point=np.ones((2, 3), np.int32)), "needs int32.3, 3"),
        (changed(int8(), weight=np.ones((OUT, IN), np.float16)), "integers are int8"),
        (changed(int8(), weight_scale=np.full((OUT, 1), np.nan, "f")), "not finite"),
        (changed(mxfp4(), weight_scale=np.full((OUT, 3), 255, np.uint8)), "60 of 60 MXFP4 scales"),
        (changed(mxfp4(), weight_packed=np.ones(3, np.uint8)), "no axes"),
        (changed(nvfp4(inverse=True), weight_global_scale=np.zeros(1, "f")), "tensor_scale"),
        (changed(nvfp4(inverse=True), weight_scale=np.ones((OUT, 6), "f")), "needs float8"),
    ],
)
def test_damaged_files_are_refused(file, message):
    with pytest.raises(ValueError, match=message):
        from_compressed_tensors(*file)


def test_what_files_cannot_hold_is_refused():
    w = np.ones((64, 2), np.float32)
    with pytest.raises(ValueError, match="compressed-tensors has no NF4"):
        to_compressed_tensors(Quantized(quantize(w, nf4()), nf4(), w.shape))
    with pytest.raises(ValueError, match="stack of weights"):
        to_compressed_tensors(Quantized({}, int8(), (2, 64, 2)))
