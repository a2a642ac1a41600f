"""Layers that GPTQModel, AutoAWQ, auto-round and ModelOpt packed: `scripts/packed_fixtures.py`."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpeft.models.packed_files import find_packed
from jaxpeft.models.packed_methods import Stored
from jaxpeft.quant.formats import dequantize, to_awq, to_gptq

FOLDER = Path(__file__).parents[1] / "fixtures" / "packed"
OPTIONS = json.loads((FOLDER / "words.json").read_text())
MODULE = "model.layers.3.mlp.up_proj"


@pytest.fixture(scope="module")
def words():
    cases = {}
    for name, array in load_file(FOLDER / "words.safetensors").items():
        case, _, part = name.partition("/")
        # ModelOpt's floats of 8 bits.
        eight = (case, part) in (("modelopt fp8", "weight"), ("modelopt nvfp4", "weight_scale"))
        cases.setdefault(case, {})[part] = array.view(jnp.float8_e4m3fn) if eight else array
    return cases


def kept(arrays, options, module=MODULE):
    """A module's weight as `load(..., quantize="keep")` reads it."""
    stored = {
        f"{module}.{part}": Stored(array.shape, lambda a=array: a, "model.safetensors")
        for part, array in arrays.items()
        if part != "dense"
    }
    packed, used = find_packed(options, stored)
    assert packed.keys() == {f"{module}.weight"} and used == stored.keys()
    assert packed[f"{module}.weight"].shape == arrays["dense"].shape
    return packed[f"{module}.weight"].read()


@pytest.mark.parametrize("case", OPTIONS)
def test_weights_equal_those_of_the_tool(words, case):
    weight = kept(words[case], OPTIONS[case])
    np.testing.assert_array_equal(dequantize(*weight), words[case]["dense"].T)


def version_of(options):
    kind = options.get("checkpoint_format") or options.get("packing_format")
    return 2 if kind in ("gptq_v2", "auto_round:gptqmodel") else 1


WRITTEN = [c for c in OPTIONS if not c.endswith(("192", "gemv")) and "modelopt" not in c]


@pytest.mark.parametrize("case", WRITTEN)
def test_tensors_are_written_as_the_tool_writes_them(words, case):
    """So the tool reads what we write, and makes the same weights of it."""
    options, arrays = OPTIONS[case], words[case]
    weight = kept(arrays, options)
    awq = "awq" in case
    ours = to_awq(weight) if awq else to_gptq(weight, version=version_of(options))
    assert ours.keys() >= arrays.keys() - {"dense"}
    for name in arrays.keys() - {"dense"}:
        np.testing.assert_array_equal(ours[name], arrays[name], strict=True)


def test_a_last_group_that_is_short_becomes_smaller_groups(words):
    case = "gptq 4 128 False True 2 192"
    weight = kept(words[case], OPTIONS[case])
    assert weight.format.block == 64 and weight.packed["scale"].shape == (3, 8)
    again = kept(to_gptq(weight, version=2) | words[case], OPTIONS[case])
    np.testing.assert_array_equal(dequantize(*again), words[case]["dense"].T)


EIGHT = "gptq 8 32 True False 1 128"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("dynamic", {r"-:.*\.4\..*": {}, r"+:.*\.up_proj$": {"bits": 8}, ".*": {"bits": 2}}),
        ("dynamic", {r".*\.(up|down)_proj": {"bits": 8}}),
        ("extra_config", {MODULE: {"bits": 8}, ".*": {"bits": 2}}),
        ("extra_config", {".*up_proj.*": {"bits": 8}}),
    ],
)
def test_options_of_single_modules(words, key, said):
    options = OPTIONS[EIGHT] | {"bits": 4, key: said}
    weight = kept(words[EIGHT], options)
    np.testing.assert_array_equal(dequantize(*weight), words[EIGHT]["dense"].T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(bits=3), "GPTQ with bits=3.*Supported: 4 and 8 bits"),
        (dict(bits="8"), "bits='8'"),
        (dict(checkpoint_format="marlin"), "checkpoint_format='marlin'"),
        (dict(checkpoint_format=None, format="gptq_p"), "checkpoint_format='gptq_p'"),
        (dict(pack_dtype="int16"), "pack_dtype='int16'"),
        (dict(group_size=64), "'g_idx' is .* from 0 to 3; 128 rows need 128 numbers from 0 to 1"),
        (dict(group_size=80), "4 blocks of 80 are not the blocks of 128 inputs"),
        (dict(group_size=10**15), "4 blocks of 1000000000000000 are not"),
        (dict(group_size=-7), "4 blocks of -7 are not"),
        (dict(checkpoint_format="gptq_v2"), r"not all 128 but \[127\]"),
        (dict(dynamic={"(": {"bits": 8}}), "'\\(' is no regular expression"),
        (dict(dynamic={"(.|.|m|o)*$^": {}}), "takes over 0.5 seconds"),
        (dict(dynamic={"(?:(?:a{90}){90}){90}": {}}), "repeats a part over 1000 times"),
        (dict(dynamic={"(?R)": {}}), "is no regular expression"),
        (dict(dynamic={"a" * 2000: {}}), "of up to 1000 characters"),
        (dict(dynamic=["a"]), "AttributeError"),
        (dict(quant_method="auto-round", packing_format="auto_round:mlx"), "packing_format="),
    ],
)
def test_options_that_are_not_supported_or_make_no_sense(words, change, message):
    with pytest.raises(ValueError, match=message):
        kept(words[EIGHT], OPTIONS[EIGHT] | change)


def test_what_modelopt_multiplies_activations_with_is_refused(words):
    case = "modelopt nvfp4"
    scaled = words[case] | {"pre_quant_scale": np.ones(64, np.float32)}
    with pytest.raises(ValueError, match="'pre_quant_scale' is not supported"):
        kept(scaled, OPTIONS[case])


def test_scales_of_a_cache_are_no_weights(words):
    case = "modelopt fp8"
    one = Stored((), lambda: np.ones((), np.float32), "model.safetensors")
    cache = dict.fromkeys(["layers.0.self_attn.k_scale", "layers.0.self_attn.v_proj.v_scale"], one)
    packed, used = find_packed(OPTIONS[case], cache)
    assert not packed and used == cache.keys()
