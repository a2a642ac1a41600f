"""Files with any damage are read, or refused by errors that say what is wrong where."""

import json
import struct

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxpeft.models import load
from jaxpeft.models.files import open_directory
from jaxpeft.models.gguf import open_gguf
from jaxpeft.models.packed_files import find_packed
from jaxpeft.models.packed_methods import Stored
from jaxpeft.quant.formats import (
    Quantized,
    fp8,
    int4,
    int8,
    llm_int8,
    nf4,
    nvfp4,
    quantize,
    to_bitsandbytes,
    to_compressed_tensors,
    to_gptq,
    to_llm_int8,
)

MODULE = "model.layers.0.mlp.up_proj"
SHAPE = (64, 32)  # (in, out)
WEIGHT = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
LLAMA = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=16, hidden_size=64,
    intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, rope_scaling=None,
    eos_token_id=[2],
)  # fmt: skip


def made(fmt):
    return Quantized(quantize(WEIGHT, fmt), fmt, SHAPE)


def compressed(fmt):
    arrays, weights, kind = to_compressed_tensors(made(fmt))
    group = {"targets": ["re:.*up_proj$", "Linear"], "weights": weights, "format": kind}
    return arrays, {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def files():
    """Tensors of a module, by the last parts of their names, and the options for them."""
    four = to_bitsandbytes(made(nf4()))
    nested = {f"weight.{n}": a for n, a in four.items() if n != "weight"}
    words = dict(bits=8, group_size=32, sym=False, checkpoint_format="gptq_v2", desc_act=True)
    eight = made(int8(32, symmetric=False, scale="float16"))
    dynamic = {r"+:.*\.up_proj": {"bits": 8}}
    return {
        "gptq": (to_gptq(eight, version=2), dict(words, quant_method="gptq", dynamic=dynamic)),
        "nf4": (nested | {"weight": four["weight"]}, dict(quant_method="bitsandbytes")),
        "llm_int8": (to_llm_int8(made(llm_int8())), dict(quant_method="bitsandbytes")),
        "int4": compressed(int4(32, symmetric=False)),
        "nvfp4": compressed(nvfp4(inverse=True)),
        "fp8": compressed(fp8(scale="block", tile=(32, 8))),
    }


FILES = files()
ODD = st.one_of(
    st.sampled_from(
        [None, True, False, "", "re:(", "Linear", "group", [], {}, [[0]], [-1, 4], 1e30]
    ),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 9),
    st.floats(),
    st.text(max_size=3),
)


def places(value, path=()):
    """Where something is in nested lists and dicts."""
    yield path
    inner = dict(enumerate(value)) if isinstance(value, list) else value
    for key in inner if isinstance(inner, dict) else ():
        yield from places(inner[key], (*path, key))


def changed(data, value):
    """A copy of JSON data with something else, or nothing, in one place."""
    value = json.loads(json.dumps(value))
    *path, last = data.draw(st.sampled_from([p for p in places(value) if p]))
    inner = value
    for key in path:
        inner = inner[key]
    if data.draw(st.booleans()):
        inner[last] = data.draw(ODD)
    else:
        del inner[last]
    return value


def spoiled(data, array):
    """The array with another shape, dtype or content."""
    ways = {
        "empty": lambda a: a.reshape(-1)[:0],
        "flat": lambda a: a.reshape(-1),
        "deep": lambda a: a[None],
        "turned": lambda a: a.T,
        "twice": lambda a: np.concatenate([a.reshape(-1), a.reshape(-1)]),
        "number": lambda a: np.zeros((), a.dtype),
        "short": lambda a: a[:-1] if a.ndim else a,
        "floats": lambda a: a.astype(np.float32),
        "bytes": lambda a: a.astype(np.int8),
        "words": lambda a: a.astype(np.int64),
        "full": lambda a: np.full(a.nbytes, 255, np.uint8).view(a.dtype).reshape(a.shape),
        "zeros": lambda a: np.zeros_like(a),
    }
    with np.errstate(invalid="ignore"):
        return ways[data.draw(st.sampled_from(list(ways)))](np.array(array))


def read_or_refused(work):
    """Any error is one of ours: a ValueError itself, and a sentence."""
    try:
        work()
    except (ValueError, FileNotFoundError) as error:
        assert type(error) in (ValueError, FileNotFoundError), error
        assert len(str(error)) > 40, error


def read_all(packed):
    for weight in packed.values():
        weight.read()


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_options_and_tensors_of_any_kind(data):
    arrays, options = FILES[data.draw(st.sampled_from(list(FILES)))]
    if data.draw(st.booleans()):
        options = changed(data, options)
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(arrays)))
        arrays = arrays | {name: spoiled(data, arrays[name])}
    stored = {
        f"{MODULE}.{name}": Stored(np.shape(a), lambda a=a: np.asarray(a), "model.safetensors")
        for name, a in arrays.items()
    }
    read_or_refused(lambda: read_all(find_packed(options, stored)[0]))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


def header_of(file):
    size = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + size]), file[8 + size :]


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_files_of_any_bytes(directory, data):
    arrays, options = FILES[data.draw(st.sampled_from(["gptq", "nvfp4", "fp8"]))]
    tensors = {f"{MODULE}.{n}": np.ascontiguousarray(a) for n, a in arrays.items()}
    save_file(tensors, directory / "model.safetensors")
    file = (directory / "model.safetensors").read_bytes()
    config = LLAMA | {"quantization_config": options}
    how = data.draw(st.sampled_from(["options", "text", "header", "bytes", "cut"]))
    if how == "options":
        config = changed(data, config)
    text = json.dumps(config).encode()
    if how == "text":
        text = flipped(data, text, len(text))
    if how == "header":
        header, rest = header_of(file)
        again = json.dumps(changed(data, header)).encode()
        file = struct.pack("<Q", len(again)) + again + rest
    if how == "bytes":
        file = flipped(data, file, len(file) - len(header_of(file)[1]))
    if how == "cut":
        file = file[: data.draw(st.integers(0, len(file) - 1))]
    (directory / "config.json").write_bytes(text)
    (directory / "model.safetensors").write_bytes(file)
    read_or_refused(lambda: read_all(open_directory(directory).packed))


def flipped(data, file, within):
    """Bytes with one to four others in their first part."""
    file = bytearray(file)
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, within - 1))] = data.draw(st.integers(0, 255))
    return bytes(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"model_type": "\xff"}', "is not valid JSON"),
        (b"[1]", r"holds \[1\], but should hold a dictionary"),
        (json.dumps(LLAMA | {"model_type": ["llama"]}).encode(), "model_type=.* is not supported"),
        (json.dumps(LLAMA | {"num_key_value_heads": "2"}).encode(), "values that make no sense"),
        (json.dumps(LLAMA | {"head_dim": [1, 2]}).encode(), "head_dim=.* no positive integer"),
        (json.dumps(LLAMA | {"rms_norm_eps": "x"}).encode(), "rms_norm_eps='x' .* no finite num"),
        (json.dumps(LLAMA | {"rope_theta": 1e999}).encode(), "rope_theta=inf .* no finite number"),
    ],
)
def test_configurations_that_are_none(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        open_directory(tmp_path)


def test_more_layers_than_tensors(directory, blocks):
    save_file({f"{MODULE}.weight": WEIGHT.T.copy()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 2**70}))
    with pytest.raises(ValueError, match=f"has 1 tensors, too few for the {2**70} layers"):
        load(directory)
    key = b"llama.block_count" + struct.pack("<I", gguf.GGUFValueType.UINT32)
    many = blocks.replace(key + struct.pack("<I", 1), key + struct.pack("<I", 2**31))
    (directory / "damaged.gguf").write_bytes(many)
    with pytest.raises(ValueError, match=f"has 2 tensors, too few for the {2**31} layers"):
        open_gguf(directory / "damaged.gguf")


@pytest.mark.parametrize("shards", [["../model.safetensors"], [3], None, {}])
def test_shards_are_beside_their_index(tmp_path, shards):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    names = dict(enumerate(shards)) if shards else "model.safetensors"
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match="which is no name of a file beside it"):
        open_directory(tmp_path)


@pytest.mark.parametrize("kind", ["F4", "F6_E2M3", "F8_E4M3FNUZ"])
def test_dtypes_that_numpy_lacks(tmp_path, kind):
    bits = {"F4": 4, "F6_E2M3": 6}.get(kind, 8)
    about = {"dtype": kind, "shape": [8], "data_offsets": [0, bits]}
    header = json.dumps({"lm_head.weight": about}).encode()
    file = struct.pack("<Q", len(header)) + header + bytes(bits)
    (tmp_path / "model.safetensors").write_bytes(file)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(ValueError, match=f"'lm_head.weight' in .* is of dtype {kind}, which is"):
        open_directory(tmp_path).read("lm_head.weight")


@pytest.fixture(scope="module")
def blocks(directory):
    """A GGUF file with a few keys and a tensor."""
    writer = gguf.GGUFWriter(directory / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_token_list(["a", "b"])
    writer.add_token_types([1, 1])
    rows = gguf.quantize(WEIGHT.T, gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("blk.0.ffn_up.weight", rows, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("token_embd.weight", np.ones((16, 64), jnp.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (directory / "model.gguf").read_bytes()


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_gguf_files_of_any_bytes(directory, blocks, data):
    path = directory / "damaged.gguf"
    path.write_bytes(flipped(data, blocks, 600))
    read_or_refused(lambda: read_all(open_gguf(path).packed))


def test_a_list_that_would_fill_the_memory(tmp_path):
    key = struct.pack("<Q1sIIQ", 1, b"a", 9, 5, 2**40)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key)
    with pytest.raises(ValueError, match="damaged.*it says that 4398046511104 bytes follow"):
        open_gguf(path)
