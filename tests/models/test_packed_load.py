"""Weights that are quantized as they are loaded, and directories that hold packed ones."""

import importlib
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file

import jaxpeft as jp
from jaxpeft.models import load
from jaxpeft.models.packed_files import find_packed
from jaxpeft.models.packed_methods import Stored
from tests.models.packed import (
    TOKENS,
    by_bitsandbytes,
    by_compressed_tensors,
    counting,
    formats_in,
    logits_of,
    made_dense,
    same,
    wide_model,
)
from tests.quant.test_gptq import awq_by_definition, gptq_by_definition
from tests.quant.test_gptq import file_arrays as random_words

PROJECTIONS = {f"layers/self_attn/{p}_proj/kernel" for p in "qkvo"} | {
    f"layers/mlp/{p}_proj/kernel" for p in ("gate", "up", "down")
}
MIXED = jp.rules(
    ("**/{q,k}_proj/kernel", jp.quant.nf4(32)),
    ("**/up_proj/*", jp.quant.int4(32, symmetric=False)),
    ("lm_head/kernel", jp.quant.int8()),
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dense")
    wide_model().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def nf4(dense, tmp_path_factory):
    """A directory of transformers with doubly quantized NF4."""
    directory = tmp_path_factory.mktemp("nf4")
    options = dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    by_bitsandbytes(dense, directory, load_in_4bit=True, **options)
    return directory


@pytest.mark.parametrize(
    ("rules", "dtype"),
    [(jp.quant.int8(32), jnp.bfloat16), (MIXED, jnp.float32)],
    ids=["int8", "rules"],
)
def test_quantizing_while_loading_is_quantizing_afterwards(dense, rules, dtype):
    _, ours = load(dense, quantize=rules, dtype=dtype)
    assert same(ours, jp.quantize(load(dense, dtype=dtype)[1], rules))
    assert len(formats_in(ours)) == (8 if rules is not MIXED else 4)


def test_a_model_is_called_with_packed_weights_as_with_their_dense_ones(dense):
    model, params = load(dense, quantize=jp.quant.int8())
    unpacked = made_dense(params)
    expected = model.apply(unpacked, TOKENS)
    np.testing.assert_allclose(model.apply(params, TOKENS), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(model.apply)(params, TOKENS), expected, rtol=1e-4, atol=1e-5)


def test_no_more_than_a_layer_is_dense_at_a_time(tmp_path, monkeypatch):
    config = jp.models.DecoderConfig(
        model_type="llama", vocab_size=64, hidden_size=512, intermediate_size=1024,
        num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4, head_dim=128,
        tie_word_embeddings=True,
    )  # fmt: skip
    make = lambda: jp.models.Decoder(config, rngs=nnx.Rngs(0))  # noqa: E731
    jp.models.save(tmp_path, nnx.eval_shape(make), jax.jit(lambda: nnx.state(make()))())
    live = lambda: sum(array.nbytes for array in jax.live_arrays())  # noqa: E731
    before, most = live(), [0]

    def each():
        most[0] = max(most[0], tracemalloc.get_traced_memory()[1] + live() - before)

    module = importlib.import_module("jaxpeft.models.load")
    opened = module.open_checkpoint
    monkeypatch.setattr(module, "open_checkpoint", lambda *given: counting(opened(*given), each))
    tracemalloc.start()
    _, params = load(tmp_path, quantize=jp.quant.nf4())
    tracemalloc.stop()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    layer, stack = 512 * 1024 * 4, 6 * 512 * 1024 // 2
    assert (tmp_path / "model.safetensors").stat().st_size > 60e6 and size < 9e6
    # The packed model, a packed stack on its way to the device, and a few copies of a dense layer.
    assert most[0] < size + 2 * stack + 4 * layer


@pytest.mark.parametrize(
    ("options", "fmt"),
    [
        (dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"), jp.quant.fp4(double=False)),
        (dict(load_in_8bit=True, llm_int8_threshold=5.0), jp.quant.llm_int8(5.0)),
        (None, jp.quant.nf4()),
    ],
    ids=["fp4", "int8", "nf4"],
)
def test_directories_of_bitsandbytes(dense, nf4, tmp_path, options, fmt):
    directory = tmp_path if options else nf4
    if options:
        by_bitsandbytes(dense, directory, **options)
    model, kept = load(directory, quantize="keep")
    assert formats_in(kept) == dict.fromkeys(PROJECTIONS, fmt)
    _, plain = load(directory)
    assert same(made_dense(kept), plain)
    expected = logits_of(directory)
    np.testing.assert_allclose(model.apply(plain, TOKENS), expected, atol=2e-5)


INT = dict(type="int", symmetric=True)


@pytest.mark.parametrize(
    ("weights", "fmt"),
    [
        (dict(INT, num_bits=4, strategy="group", group_size=32), jp.quant.int4(32)),
        (
            dict(INT, num_bits=4, strategy="group", group_size=32, symmetric=False),
            jp.quant.int4(32, symmetric=False),
        ),
        (dict(INT, num_bits=8, strategy="channel"), jp.quant.int8()),
        (dict(num_bits=8, type="float", strategy="tensor"), jp.quant.fp8(scale="tensor")),
    ],
    ids=["int4", "int4 zeros", "int8", "fp8"],
)
def test_directories_of_compressed_tensors(tmp_path, weights, fmt):
    by_compressed_tensors(wide_model(), tmp_path, **weights)
    model, kept = load(tmp_path, quantize="keep")
    assert formats_in(kept) == dict.fromkeys(PROJECTIONS, fmt)
    _, plain = load(tmp_path)
    assert same(made_dense(kept), plain)
    np.testing.assert_allclose(model.apply(plain, TOKENS), logits_of(tmp_path), atol=2e-5)


def with_words(dense, directory, kind, change=lambda arrays, layer: None):
    """A directory whose up projections hold random GPTQ or AWQ words, and their dense values."""
    tensors = load_file(dense / "model.safetensors")
    values = []
    for layer in range(3):
        module = f"model.layers.{layer}.mlp.up_proj"
        tensors.pop(f"{module}.weight")
        arrays = random_words(kind, seed=layer)
        change(arrays, layer)
        tensors |= {f"{module}.{part}": array for part, array in arrays.items()}
        index = arrays.get("g_idx", np.arange(64) // 32)
        values.append(
            awq_by_definition(arrays) if kind == "awq" else gptq_by_definition(arrays, 1, index)
        )
    save_file(tensors, directory / "model.safetensors")
    return np.stack(values)


def described(dense, directory, change=(), **quantization):
    config = json.loads((dense / "config.json").read_text())
    config |= dict(change) | dict(quantization_config=quantization)
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A model whose up projections have the shape of the random words: 64 x 16."""
    directory = tmp_path_factory.mktemp("narrow")
    wide_model(intermediate_size=16).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("ordered", [True, False])
def test_directories_of_gptq(narrow, tmp_path, ordered):
    def change(arrays, layer):
        index = np.arange(64) // 32
        index = index if ordered else np.random.default_rng(layer).permutation(index)
        arrays["g_idx"] = index.astype(np.int32)

    expected = with_words(narrow, tmp_path, "gptq", change)
    options = dict(bits=4, group_size=32, sym=False, desc_act=not ordered)
    described(narrow, tmp_path, quant_method="gptq", **options)
    _, kept = load(tmp_path, quantize="keep")
    assert formats_in(kept).keys() == {"layers/mlp/up_proj/kernel"}
    for params in (made_dense(kept), load(tmp_path)[1]):
        kernel = params["layers"]["mlp"]["up_proj"]["kernel"][...]
        np.testing.assert_allclose(kernel, expected, rtol=1e-6)


def test_old_directories_of_gptq_and_awq(narrow, tmp_path):
    """From before `quantization_config`, as AutoGPTQ 0.4 and AutoAWQ 0.1 wrote them."""
    (tmp_path / "config.json").write_bytes((narrow / "config.json").read_bytes())
    for kind, name, said in (
        ("gptq", "quantize_config.json", dict(bits=4, group_size=32, sym=False, desc_act=False)),
        ("awq", "quant_config.json", dict(w_bit=4, q_group_size=32, zero_point=True)),
    ):
        expected = with_words(narrow, tmp_path, kind)
        (tmp_path / name).write_text(json.dumps(said))
        if kind == "gptq":
            (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
        kernel = load(tmp_path)[1]["layers"]["mlp"]["up_proj"]["kernel"][...]
        np.testing.assert_allclose(kernel, expected, rtol=1e-6)
        (tmp_path / name).unlink()


def test_directories_of_awq(narrow, tmp_path):
    expected = with_words(narrow, tmp_path, "awq")
    described(narrow, tmp_path, quant_method="awq", bits=4, group_size=32, zero_point=True)
    _, kept = load(tmp_path, quantize="keep")
    kernel = made_dense(kept)["layers"]["mlp"]["up_proj"]["kernel"][...]
    np.testing.assert_allclose(kernel, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
def test_directories_of_fp8(dense, tmp_path, name):
    tensors, values = load_file(dense / "model.safetensors"), []
    random = np.random.default_rng(0)
    for layer in range(3):
        module = f"model.layers.{layer}.mlp.up_proj"
        codes = random.uniform(-400, 400, (128, 64)).astype(jnp.float8_e4m3fn)
        shape = (4, 2) if name == "weight_scale_inv" else ()
        scale = np.asarray(random.uniform(0.5, 2, shape), np.float32)
        tensors |= {f"{module}.weight": codes, f"{module}.{name}": scale}
        tiles = np.kron(np.float64(scale).reshape(scale.shape or (1, 1)), np.ones((32, 32)))
        values.append(codes.astype(np.float64) * (tiles if shape else float(scale)))
    save_file(tensors, tmp_path / "model.safetensors")
    tile = [32, 32] if name == "weight_scale_inv" else None
    described(dense, tmp_path, quant_method="fp8", weight_block_size=tile)
    _, kept = load(tmp_path, quantize="keep")
    kernel = made_dense(kept)["layers"]["mlp"]["up_proj"]["kernel"][...]
    np.testing.assert_allclose(kernel, np.stack(values).swapaxes(1, 2), rtol=1e-6)


@pytest.mark.parametrize("tile", [(128, 128), (32, 64), None])
def test_tiles_of_fp8_as_transformers_reads_them(dense, tmp_path, tile):
    """Most matrices have a side of 64, so half a tile; None is for what transformers implies."""
    tensors, random = load_file(dense / "model.safetensors"), np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        sides = tensors[name].shape
        count = [-(-side // part) for side, part in zip(sides, tile or (128, 128), strict=True)]
        tensors[name] = random.uniform(-99, 99, sides).astype(jnp.float8_e4m3fn)
        scale = random.uniform(1e-3, 5e-3, count).astype(np.float32)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    described(dense, tmp_path, quant_method="fp8", **{"weight_block_size": tile} if tile else {})
    model, kept = load(tmp_path, quantize="keep")
    assert formats_in(kept).keys() == PROJECTIONS
    plain = load(tmp_path)[1]
    assert same(made_dense(kept), plain)
    np.testing.assert_allclose(model.apply(plain, TOKENS), logits_of(tmp_path), atol=2e-5)


def test_packed_files_can_be_quantized_otherwise(nf4):
    rules = jp.rules(("**/up_proj/kernel", jp.quant.int8()), ("**", "keep"))
    _, ours = load(nf4, quantize=rules)
    found = formats_in(ours)
    assert found.pop("layers/mlp/up_proj/kernel") == jp.quant.int8()
    assert found == dict.fromkeys(PROJECTIONS - {"layers/mlp/up_proj/kernel"}, jp.quant.nf4())
    again = jp.quantize(load(nf4)[1], jp.rules(("**/up_proj/kernel", jp.quant.int8())))
    assert same(ours["layers"]["mlp"]["up_proj"], again["layers"]["mlp"]["up_proj"])


def test_a_stack_of_packed_and_dense_layers_becomes_dense_and_says_so(nf4, dense, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(nf4 / "model.safetensors")
    tensors = {key: a for key, a in tensors.items() if not key.startswith(name)}
    plain = load_file(dense / "model.safetensors")[name]
    save_file(tensors | {name: plain}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((nf4 / "config.json").read_bytes())
    with pytest.warns(UserWarning, match=r"up_proj.*\(NF4.*: 2, dense: 1\).*loaded dense"):
        _, kept = load(tmp_path, quantize="keep")
    assert formats_in(kept).keys() == PROJECTIONS - {"layers/mlp/up_proj/kernel"}
    kernel = kept["layers"]["mlp"]["up_proj"]["kernel"][...]
    np.testing.assert_array_equal(kernel[1], plain.T)
    np.testing.assert_array_equal(kernel[0], load(nf4)[1]["layers"]["mlp"]["up_proj"]["kernel"][0])


def test_packed_arrays_are_split_like_their_weight(nf4):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    model, spread = load(nf4, quantize="keep", mesh=mesh)
    up = spread["layers"]["mlp"]["up_proj"]["kernel"].get_value()
    assert up.packed["codes"].sharding.spec == PartitionSpec(None, None, "fsdp")
    assert up.packed["absmax"].sharding.spec == PartitionSpec(None, None, "fsdp")
    assert up.packed["offset"].sharding.is_fully_replicated
    down = spread["layers"]["mlp"]["down_proj"]["kernel"].get_value()
    assert down.packed["codes"].sharding.spec == PartitionSpec(None, "fsdp", None)
    assert down.packed["absmax"].sharding.is_fully_replicated  # two blocks over four devices
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(spread))
    actual = jax.jit(jp.lift(model.apply))(spread, TOKENS)
    np.testing.assert_allclose(actual, logits_of(nf4), atol=2e-5)


@pytest.fixture
def copy(nf4, tmp_path):
    """`copy(change)` is the NF4 directory after a change to its tensors, or to its options."""

    def make(change=lambda tensors: None, **options):
        tensors = load_file(nf4 / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        said = json.loads((nf4 / "config.json").read_text())["quantization_config"]
        described(nf4, tmp_path, **said | options)
        return tmp_path

    return make


UP = "model.layers.1.mlp.up_proj.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize("how", [None, "keep"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({UP: t[UP][:-1]}), "'weight' has 4095 values.*needs 4096"),
        (lambda t: t.pop(UP), "'weight' is missing"),
        (lambda t: t.pop(f"{UP}.absmax"), "'absmax' is missing"),
        (lambda t: t.update({f"{UP}.nested_absmax": t[f"{UP}.nested_absmax"] * np.nan}), "finite"),
        (lambda t: t.pop(STATE), "quant_state.*is missing"),
        (
            lambda t: t.update({STATE: np.zeros(3, np.uint8)}),
            "Expecting value",
        ),
        (
            lambda t: t.update({STATE: np.frombuffer(b"[" * 10**5, np.uint8).copy()}),
            "RecursionError",
        ),
    ],
)
def test_damaged_weights_are_named_with_their_file(copy, change, message, how):
    where = rf"packed weight '{UP}' in .*model\.safetensors: .*{message}"
    with pytest.raises(ValueError, match=where):
        load(copy(change), quantize=how)


def test_packed_weights_without_what_says_so(copy):
    def strip(tensors):
        for name in [name for name in tensors if name.startswith(f"{UP}.")]:
            del tensors[name]

    with pytest.raises(ValueError, match=rf"{UP}' in .* has shape \(4096, 1\)"):
        load(copy(strip))
    for method in ("hqq", ["gptq"]):
        with pytest.raises(
            ValueError, match="quant_method=.* is not supported.*bitsandbytes, gptq"
        ):
            load(copy(quant_method=method))


def test_codes_without_scales_are_no_weights(dense, tmp_path):
    tensors = load_file(dense / "model.safetensors")
    tensors[UP] = tensors[UP].astype(np.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((dense / "config.json").read_bytes())
    with pytest.raises(ValueError, match=f"{UP}.*is int8.*no dense weight.*quantization_config"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(quant_method="gptq", bits=3, group_size=32), "GPTQ with bits=3"),
        (dict(quant_method="gptq", bits=4, group_size=64, sym=False), "'scale' of Int4"),
        (dict(quant_method="gptq", bits=4, group_size=32, sym=True), "zero points are not all 8"),
        (dict(quant_method="gptq", bits=4), "KeyError.*group_size"),
        (dict(quant_method="awq", bits=4, version="gemv_fast"), "version='gemv_fast'"),
        (dict(quant_method="awq", bits=4, group_size=32), r"has shape \(128, 8\)"),
    ],
)
def test_options_that_contradict_the_tensors(narrow, tmp_path, options, message):
    with_words(narrow, tmp_path, "gptq")
    described(narrow, tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_compressed_tensors_options_that_are_not_known(tmp_path, dense):
    by_compressed_tensors(wide_model(), tmp_path, **INT, num_bits=8, strategy="channel")
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    group = said["config_groups"]["group_0"]
    for change, message in (
        (dict(sparsity_config=dict(format="sparse-24-bitmask")), "sparsity 'sparse-24-bitmask'"),
        (dict(transform_config=dict(config_groups={"u": {}})), "transform_config"),
        (dict(config_groups=dict(group_0=group | dict(targets=["re:.*q_proj$"]))), "none of the"),
        (dict(config_groups=dict(group_0=group | dict(targets=["re:("]))), "unterminated subpat"),
        (dict(config_groups=dict(group_0=group | dict(format="dense"))), "format='dense'"),
    ):
        described(dense, tmp_path, **said | change)
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def test_what_is_asked_for_has_to_make_sense(dense):
    with pytest.raises(ValueError, match="quantize='nf4' is no word.*jp.quant.nf4"):
        load(dense, quantize="nf4")
    with pytest.raises(ValueError, match="quantize='keep'.*holds no packed weights"):
        load(dense, quantize="keep")
    with pytest.raises(TypeError, match="4 is no format. Write jp.quant.nf4"):
        load(dense, quantize=4)
    with pytest.raises(ValueError, match="'\\*\\*/upp/\\*' matched none"):
        load(dense, quantize=jp.rules(("**/upp/*", jp.quant.nf4())))
    rules = jp.rules(("**/up_proj/kernel", jp.quant.nf4(128)))
    with pytest.raises(ValueError, match="'layers/mlp/up_proj/kernel'.*Use block=64"):
        load(dense, quantize=rules)


def test_arrays_of_another_shape_than_a_file_says():
    """One row would else be read as each of the eight."""
    arrays = {
        "up.weight": np.ones((1, 32), np.int8),
        "up.weight_scale": np.ones((1, 1), np.float32),
        "up.weight_shape": np.array([8, 32]),
    }
    stored = {n: Stored(a.shape, lambda a=a: a, "model.safetensors") for n, a in arrays.items()}
    group = dict(targets=["Linear"], weights=dict(INT, num_bits=8, strategy="channel"))
    options = dict(
        quant_method="compressed-tensors", format="int-quantized", config_groups={"group_0": group}
    )
    packed, _ = find_packed(options, stored)
    with pytest.raises(ValueError, match=r"arrays are of \(1, 32\), but it says \(8, 32\)"):
        packed["up.weight"].read()
