"""Saving: transformers reads the directory as the same model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxpeft.models import load, save
from tests.models.tiny import MODELS


def same(params, other):
    equal = jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), params, other)
    return jax.tree.all(equal)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_the_same_weights_and_options(oracle, tmp_path, tokens, name):
    torch_model, directory = oracle(name)
    save(tmp_path, *load(directory))
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
    expected = torch_model.state_dict()
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    with torch.no_grad():
        inputs = torch.tensor(tokens)
        torch.testing.assert_close(again(inputs).logits, torch_model(inputs).logits)


def test_round_trip_keeps_bfloat16(oracle, tmp_path):
    model, params = load(oracle("qwen2")[1], dtype=jnp.bfloat16)
    save(tmp_path, model, params)
    again, loaded = load(tmp_path, dtype=jnp.bfloat16)
    assert again.config == model.config
    assert same(params, loaded)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in read.parameters()} == {torch.bfloat16}


def test_shards_equal_one_file(oracle, tmp_path, tokens):
    torch_model, directory = oracle("llama")
    model, params = load(directory)
    save(tmp_path, model, params, shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and all((tmp_path / file).stat().st_size < 25_000 for file in files)
    assert same(params, load(tmp_path)[1])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, torch_model.state_dict()[key]), key


def test_reads_shards_that_transformers_wrote(oracle, tmp_path):
    torch_model, directory = oracle("llama")
    torch_model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert same(load(directory)[1], load(tmp_path)[1])


def test_saving_again_replaces_the_weights(oracle, tmp_path):
    model, params = load(oracle("llama")[1])
    save(tmp_path / "m", model, params)
    twice = jax.tree.map(lambda x: 2 * x, params)
    for shard_bytes, weights in ((20_000, twice), (10**9, params), (20_000, twice)):
        save(tmp_path / "m", model, weights, shard_bytes=shard_bytes)
        assert same(weights, load(tmp_path / "m")[1])
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_failed_save_leaves_the_earlier_one(oracle, tmp_path):
    model, params = load(oracle("llama")[1])
    save(tmp_path / "m", model, params)
    with pytest.raises(FileNotFoundError, match="tokenizer_from='/nowhere'"):
        save(tmp_path / "m", model, params, tokenizer_from="/nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert same(params, load(tmp_path / "m")[1])


def test_refuses_weights_of_another_model(oracle, tmp_path):
    model, _ = load(oracle("llama")[1])
    _, params = load(oracle("llama-wide-heads")[1])
    with pytest.raises(ValueError, match="layers/self_attn/k_proj/kernel"):
        save(tmp_path / "m", model, params)


def test_refuses_mixed_dtypes(oracle, tmp_path):
    model, params = load(oracle("llama")[1])
    params["norm"]["scale"] = params["norm"]["scale"].replace(jnp.ones(32, jnp.bfloat16))
    with pytest.raises(ValueError, match="bfloat16, float32"):
        save(tmp_path / "m", model, params)


def test_copies_the_tokenizer(oracle, tmp_path):
    source = tmp_path / "source"
    model, params = load(oracle("llama")[1])
    save(source, model, params)
    (source / "tokenizer.json").write_text("{}")
    (source / "notes.txt").write_text("mine")
    save(tmp_path / "copy", model, params, tokenizer_from=source)
    copied = sorted(path.name for path in (tmp_path / "copy").iterdir())
    assert copied == ["config.json", "model.safetensors", "tokenizer.json"]
    np.testing.assert_equal((tmp_path / "copy" / "tokenizer.json").read_text(), "{}")
