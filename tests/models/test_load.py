"""Loading: what is wrong with a directory is said; weights land on the mesh."""

import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file

from jaxpeft.models import load
from jaxpeft.models.config import from_hf
from jaxpeft.models.load import spec

SIZES = dict(
    model_type="llama",
    vocab_size=8,
    hidden_size=4,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
)


@pytest.fixture
def copy(oracle, tmp_path):
    """A copy of a model directory that a test may damage."""
    shutil.copytree(oracle("llama")[1], tmp_path, dirs_exist_ok=True)
    return tmp_path


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(model_type="gpt9"), "model_type='gpt9'.*llama, mistral, qwen2"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'"),
        (dict(rope_scaling=dict(type="yarn", factor=2.0)), "rope_type='yarn'.*llama3"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "needs low_freq_factor"),
        (dict(rope_scaling=dict(rope_type="linear")), "needs factor"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        (dict(num_attention_heads=3, num_key_value_heads=2), "num_key_value_heads=2"),
        (dict(num_attention_heads=0), "num_attention_heads=0 of a 'llama' model is no positive"),
        (dict(hidden_size="32"), "hidden_size='32' of a 'llama' model is no positive"),
        (
            dict(model_type="qwen2", use_sliding_window=True, max_window_layers=1),
            "max_window_layers=1 of 2",
        ),
    ],
)
def test_unsupported_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        from_hf(SIZES | options)


def test_missing_sizes_are_named():
    values = {key: value for key, value in SIZES.items() if key != "hidden_size"}
    with pytest.raises(ValueError, match="lacks hidden_size"):
        from_hf(values)


def test_old_and_new_spelling_of_rope_agree():
    scaling = dict(rope_type="linear", factor=2.0)
    old = from_hf(SIZES | dict(rope_theta=5e5, rope_scaling=scaling))
    new = from_hf(SIZES | dict(rope_parameters=scaling | dict(rope_theta=5e5)))
    assert old == new
    assert (old.rope_theta, old.rope_scaling.factor) == (5e5, 2.0)


def test_missing_tensor(copy):
    edit_tensors(copy, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 tensors.*model\.layers\.1\.mlp\.up_proj"):
        load(copy)


def test_unknown_tensor(copy):
    edit_tensors(copy, lambda t: t.update(stray=np.ones(3, np.float32)))
    with pytest.raises(ValueError, match="has unknown 1 tensors.*stray"):
        load(copy)


def test_wrong_shape(copy):
    edit_tensors(copy, lambda t: t.update({"model.norm.weight": np.ones(3, np.float32)}))
    with pytest.raises(ValueError, match=r"model.norm.weight.*\(3,\).*\(32,\)"):
        load(copy)


def test_stored_tied_head_and_derived_buffers_are_left_alone(oracle, tmp_path):
    shutil.copytree(oracle("llama-tied")[1], tmp_path, dirs_exist_ok=True)
    expected = load(tmp_path)[1]

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    edit_tensors(tmp_path, add)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), expected, load(tmp_path)[1])
    assert jax.tree.all(same)


def test_damaged_file(copy):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="damaged or no safetensors"):
        load(copy)


def test_damaged_config(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load(copy)


def test_absent_files(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "nowhere")
    (copy / "model.safetensors").rename(copy / "other.bin")
    with pytest.raises(FileNotFoundError, match="other.bin"):
        load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        load(copy)


def test_absent_shard(oracle, tmp_path):
    oracle("llama")[0].save_pretrained(tmp_path, max_shard_size="20KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=lost.name):
        load(tmp_path)


def test_mesh_spreads_the_weights_and_keeps_the_logits(oracle, tokens):
    directory = oracle("llama")[1]
    model, params = load(directory)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    _, spread = load(directory, mesh=mesh)
    kernel = spread["layers"]["mlp"]["up_proj"]["kernel"][...]
    assert kernel.sharding.spec == PartitionSpec(None, None, "fsdp")
    assert kernel.addressable_shards[0].data.shape == (3, 32, 12)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(spread))
    expected = model.apply(params, tokens)
    np.testing.assert_allclose(jax.jit(model.apply)(spread, tokens), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "stacked", "expected"),
    [
        ((32, 64, 16), True, PartitionSpec(None, "fsdp", None)),
        ((32, 6, 16), True, PartitionSpec(None, None, "fsdp")),
        ((32, 6), True, PartitionSpec()),
        ((49152, 576), False, PartitionSpec("fsdp", None)),
    ],
)
def test_largest_divisible_axis_is_split_but_never_the_layers(shape, stacked, expected):
    mesh = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tensor"))
    assert spec(shape, stacked, mesh) == expected
