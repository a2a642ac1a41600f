"""bitsandbytes' file tensors, both ways."""

import json

import numpy as np
import pytest

from jaxpeft.quant.formats import (
    Quantized,
    dequantize,
    fp4,
    from_bitsandbytes,
    int8,
    nf4,
    quantize,
    to_bitsandbytes,
)

CASES = [("nf4", 64, True), ("nf4", 32, False), ("fp4", 64, True)]
SHAPES = [(100, 576), (6, 128)]


def file_tensors(kind, block, double, out, rows):
    """What transformers writes for a layer, and the weight that bitsandbytes reads from it."""
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes").functional
    codes, state = functional.quantize_4bit(
        torch.randn(out, rows), blocksize=block, quant_type=kind, compress_statistics=double
    )
    tensors = {"weight": codes, **state.as_dict(packed=True)}
    return {name: t.numpy() for name, t in tensors.items()}, functional.dequantize_4bit(
        codes, state
    ).numpy()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "block", "double"), CASES)
def test_files_of_bitsandbytes_are_read_and_written_exactly(kind, block, double, shape):
    arrays, dense = file_tensors(kind, block, double, *shape)
    weight = from_bitsandbytes(arrays)
    assert weight.format == {"nf4": nf4, "fp4": fp4}[kind](block, double=double)
    np.testing.assert_array_equal(dequantize(*weight), dense.T)
    again = to_bitsandbytes(weight, dtype="float32")
    assert again.keys() == arrays.keys()
    for name, array in arrays.items():
        if "bitsandbytes__" in name:
            assert json.loads(again[name].tobytes()) == json.loads(array.tobytes())
        else:
            np.testing.assert_array_equal(again[name], array, strict=True)


def test_bitsandbytes_reads_our_tensors():
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes").functional
    w = np.random.default_rng(0).standard_normal((128, 12)).astype(np.float32)
    weight = Quantized(quantize(w, nf4()), nf4(), (128, 12))
    arrays = {name: torch.from_numpy(a) for name, a in to_bitsandbytes(weight, "float32").items()}
    codes = arrays.pop("weight")
    state = functional.QuantState.from_dict(arrays, torch.device("cpu"))
    dense = functional.dequantize_4bit(codes, state).numpy().T
    np.testing.assert_array_equal(dense, dequantize(*weight))


def ours(double=True, columns=70):
    w = np.random.default_rng(0).standard_normal((96, columns)).astype(np.float32)
    return Quantized(quantize(w, nf4(32, double=double)), nf4(32, double=double), (96, columns))


@pytest.mark.parametrize("double", [True, False])
def test_there_and_back(double):
    weight = ours(double)
    again = from_bitsandbytes(to_bitsandbytes(weight))
    assert again[1:] == weight[1:]
    for name, array in weight.packed.items():
        np.testing.assert_array_equal(again.packed[name], array)


def test_bytes_in_another_dtype():
    arrays = to_bitsandbytes(ours())
    arrays["weight"] = arrays["weight"].reshape(-1).view(np.float16)
    codes = from_bitsandbytes(arrays).packed["codes"]
    np.testing.assert_array_equal(codes, ours().packed["codes"])


def state(arrays, **changes):
    name = "quant_state.bitsandbytes__nf4"
    values = json.loads(arrays[name].tobytes()) | changes
    return {name: np.frombuffer(json.dumps(values).encode(), np.uint8)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"weight": a["weight"][:-1]}, "'weight' has 3359 values.*needs 3360"),
        (lambda a: {"absmax": a["absmax"][:-1]}, "'absmax' has 209.*needs 210"),
        (lambda a: {"absmax": a["absmax"].astype(np.float32)}, "'absmax' has 840"),
        (lambda a: {"nested_absmax": a["nested_absmax"] * np.nan}, "not finite.*download"),
        (lambda a: {"quant_map": a["quant_map"][::-1].copy()}, "'quant_map' holds other values"),
        (lambda a: {"nested_quant_map": a["absmax"][:256]}, "'nested_quant_map' has 210"),
        (lambda a: {"quant_state.bitsandbytes__nf4": a["absmax"]}, "is damaged"),
        (lambda a: state(a, shape=[96 * 70]), "cross the rows"),
        (lambda a: state(a, shape=[96, 70]), "cross the rows.*Load this weight dense"),
        (lambda a: state(a, blocksize=48), "use one of 32, 64"),
        (lambda a: state(a, nested_blocksize=128), "nested_blocksize=128"),
    ],
)
def test_damaged_files_are_refused(change, message):
    arrays = to_bitsandbytes(ours())
    with pytest.raises(ValueError, match=message):
        from_bitsandbytes(arrays | change(arrays))


def test_missing_tensors_are_named():
    arrays = to_bitsandbytes(ours())
    for name in ("weight", "absmax", "quant_map", "nested_quant_map"):
        with pytest.raises(ValueError, match=f"'{name}' is missing"):
            from_bitsandbytes({key: a for key, a in arrays.items() if key != name})
    with pytest.raises(ValueError, match="quant_state.bitsandbytes__nf4"):
        from_bitsandbytes({"weight": arrays["weight"]})


def test_what_a_file_cannot_hold_is_refused():
    packed, fmt, _ = ours()
    cut = {name: a[..., 3:] if a.shape[-1] > 1 else a for name, a in packed.items()}
    with pytest.raises(ValueError, match="slice of a doubly quantized weight"):
        to_bitsandbytes(Quantized(cut, fmt, (96, 67)))
    with pytest.raises(ValueError, match="no nf4 or fp4 matrix"):
        to_bitsandbytes(Quantized(quantize(np.ones((8, 4), np.float32), int8()), int8(), (8, 4)))
