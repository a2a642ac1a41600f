"""What every format refuses, and that it says how to mend it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.quant.formats import (
    FORMATS,
    MixedGGUF,
    check,
    dequantize,
    fp4,
    fp8,
    from_json,
    gguf,
    int4,
    int8,
    llm_int8,
    mxfp4,
    nf4,
    nvfp4,
    quantize,
    to_json,
)

W = jnp.ones((2, 128, 3))


@pytest.mark.parametrize(
    ("weight", "fmt", "message"),
    [
        (jnp.ones(64), nf4(), "no input and output axis.*Leave it dense"),
        (jnp.ones((3, 128)), nf4(), r"blocks of 64 do not tile.*\(3, 128\).*transpose"),
        (jnp.ones((96, 4)), nf4(), "Use block=32"),
        (jnp.ones((0, 4)), nf4(), "Leave this weight dense"),
        (jnp.ones((64, 4), jnp.int32), nf4(), "dtype int32 is no float"),
        (jnp.full((64, 4), jnp.nan), nf4(), "256 of 256 entries that are not finite"),
        (jnp.ones((64, 4)).at[3, 1].set(jnp.inf), int8(), "1 of 256 entries"),
    ],
)
def test_weights_that_are_refused(weight, fmt, message):
    with pytest.raises(ValueError, match=message):
        quantize(weight, fmt)


def test_options_that_are_refused():
    with pytest.raises(ValueError, match=r"nf4\(block=48\): use one of 32, 64"):
        nf4(48)
    with pytest.raises(ValueError, match="no stochastic rounding. Leave out key"):
        quantize(W, nf4(), key=jax.random.key(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": jnp.zeros((2, 63, 3), jnp.uint8)}, r"'codes'.*\(2, 63, 3\).*needs uint8\(2, 64"),
        ({"absmax": jnp.zeros((2, 2, 3), jnp.float32)}, "'absmax'.*float32.*needs uint8"),
        ({"offset": jnp.zeros((2, 1, 3), jnp.float32)}, "'offset'"),
        ({"offset": None}, r"lacks \['offset'\]"),
    ],
)
def test_packed_arrays_that_do_not_fit(change, message):
    packed = quantize(W, nf4()) | change
    packed = {name: array for name, array in packed.items() if array is not None}
    with pytest.raises(ValueError, match=message):
        dequantize(packed, nf4(), W.shape)


def test_scales_that_are_not_finite():
    packed = quantize(W, nf4())
    check(packed, nf4(), W.shape)
    packed["nested_absmax"] = packed["nested_absmax"].at[0].set(jnp.nan)
    with pytest.raises(ValueError, match="'nested_absmax' has 3 of 6 .*download"):
        check(packed, nf4(), W.shape)


def test_values_are_not_checked_while_tracing():
    packed = jax.jit(lambda w: quantize(w, nf4()))(W * np.nan)
    assert packed["codes"].shape == (2, 64, 3)


EVERY = [nf4(128, double=False), fp4(), int8(), int4(32, symmetric=False, scale="bfloat16")]
EVERY += [llm_int8(5.0), fp8("e5m2", "block", tile=(32, 16)), mxfp4(), nvfp4(inverse=True)]
READ = [gguf("q6_k"), MixedGGUF(("q4_k", "q6_k"))]


@pytest.mark.parametrize("fmt", EVERY + READ, ids=str)
def test_json_there_and_back(fmt):
    again = from_json(json.loads(json.dumps(to_json(fmt))))
    assert again == fmt and hash(again) == hash(fmt)


def test_every_format_is_tried():
    assert {fmt.name for fmt in EVERY + READ} == FORMATS.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "int5"}, "no format 'int5'. Use one of: nf4, fp4"),
        ({"name": "nf4", "size": 3}, r"nf4 has no \['size'\]; it has \['block', 'double'\]"),
        ({"name": "gguf"}, r"gguf needs \['kind'\]"),
        ({"name": "nf4", "block": 3}, "use one of 32"),
    ],
)
def test_json_that_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        from_json(options)


@pytest.mark.parametrize("fmt", EVERY, ids=str)
def test_packed_arrays_have_the_axes_of_the_weight(fmt):
    shape = (2, 128, 6)
    layout = fmt.layout(shape)
    packed = quantize(jax.random.normal(jax.random.key(0), shape), fmt)
    assert packed.keys() == layout.keys()
    for name, array in packed.items():
        assert (array.shape, array.dtype) == (layout[name].shape, layout[name].dtype)
        assert array.ndim == 3 and array.shape[0] == 2 and array.shape[-1] in (1, 6)
    dense = dequantize(packed, fmt, shape)
    cut = {name: a[1:, :, 2:5] if a.shape[-1] > 1 else a[1:] for name, a in packed.items()}
    np.testing.assert_array_equal(dequantize(cut, fmt, (1, 128, 3)), dense[1:, :, 2:5])
