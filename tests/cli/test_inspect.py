"""`jaxpeft inspect` of adapters, in each format that the other commands read."""

import json

import jax
import pytest
from safetensors.numpy import load_file

import jaxpeft as jp
from jaxpeft.cli import adapters
from tests.hf.adapterhub.conftest import FIXTURES
from tests.methods.decoding import IDS, decoder, filled


@pytest.fixture
def saved(tmp_path):
    """`saved(tuning)` writes an adapter as the commands do, and gives its directory."""

    def save(tuning):
        model, params = decoder()
        tuned = jp.transform(model, tuning)
        adapter = filled(jax.eval_shape(tuned.init, jax.random.key(0), params, IDS))
        adapters.save_adapter(tmp_path, tuned, adapter, model, "a/base-model")
        return tmp_path

    return save


def test_our_own_format(jaxpeft, saved):
    place = saved(jp.chain(jp.ia3(), jp.rules(("**/{q,v}_proj/kernel", jp.lora(2, alpha=6)))))
    file = place / "adapter.safetensors"
    size = sum(tensor.size for tensor in load_file(file).values())
    for path in (place, file):
        result = jaxpeft("inspect", path)
        assert result.code == 0, result.err
        for words in (
            "jaxpeft's own format", "base model a/base-model", f"parameters {size:,}",
            "ia3(on=out)", "+ lora(alpha=6, rank=2, scale=3.0)", "tensors 11, float32",
            "layers/self_attn/q_proj/kernel",
        ):  # fmt: skip
            assert words in result.out, words
    with file.open("r+b") as opened:
        opened.seek(-1, 2)
        opened.write(b"\x7f")
    result = jaxpeft("inspect", place)
    assert result.code == 2 and "is damaged" in result.err


def test_one_method_is_said_once(jaxpeft, saved):
    result = jaxpeft("inspect", saved(jp.pfeiffer(reduction=2)))
    assert "method bottleneck(" in result.out
    assert "sites 1: layers/mlp:delta" in result.out


@pytest.mark.parametrize(
    ("tuning", "words"),
    [
        (jp.lora(2, alpha=6), ("method LORA", "r 2", "lora_alpha 6", "sites 14: model.layers.0")),
        (jp.prefix_tuning(3), ("method PREFIX_TUNING", "num_virtual_tokens 3")),
        (
            jp.llama_adapter(3),
            ("ADAPTION_PROMPT", "adapter_len 3", "model.layers.1.self_attn"),
        ),
    ],
)
def test_pefts_format(jaxpeft, saved, tuning, words):
    place = saved(tuning)
    result = jaxpeft("inspect", place)
    size = sum(tensor.size for tensor in load_file(place / "adapter_model.safetensors").values())
    assert result.code == 0, result.err
    shown = ("Hugging Face PEFT's format", "base model a/base-model", f"parameters {size:,}")
    for word in (*shown, *words):
        assert word in result.out, word


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mam", ("prefix(prefix_length=3", "; bottleneck(", "is_parallel=True")),
        ("loreft", ("reft(", "r=")),
        ("legacy", ("bottleneck(",)),
        ("fusion_static", ("name double_seq_bn,double_seq_bn_2", "fusion(")),
    ],
)
def test_adapterhubs_format(jaxpeft, name, words):
    result = jaxpeft("inspect", FIXTURES / "bert" / name)
    assert result.code == 0, result.err
    for word in ("AdapterHub's format", "base model tiny-bert, a bert", *words):
        assert word in result.out, word


def test_a_damaged_one_is_one_message(jaxpeft, saved):
    place = saved(jp.lora(2))
    (place / "adapter_model.safetensors").unlink()
    result = jaxpeft("inspect", place)
    assert result.code == 2 and "adapter_model.safetensors is not in" in result.err
    (place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": float("nan")}))
    result = jaxpeft("inspect", place)
    assert result.code == 2 and "out of range" in result.err


def test_a_directory_without_any_of_it_is_one_message(jaxpeft, tmp_path):
    result = jaxpeft("inspect", tmp_path)
    assert result.code == 2 and "holds nothing to inspect: no model (config.json" in result.err
