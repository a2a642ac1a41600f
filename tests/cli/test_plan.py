"""`jaxpeft plan`: counts against torch, and what happens where it cannot plan."""

import json
import re

import pytest
import transformers
from peft import LoraConfig, get_peft_model

from jaxpeft.cli.tiny import write_tiny_encoder


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory):
    """A model's config.json, without its weights."""
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text((tiny_model / "config.json").read_text())
    return path


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("place", ["file", "directory"])
def test_it_counts_what_peft_counts(jaxpeft, config, tiny_model, place):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    total = sum(p.numel() for p in model.parameters())
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trained, _ = get_peft_model(model, lora).get_nb_trainable_parameters()
    given = config if place == "file" else config.parent
    result = jaxpeft(
        "plan", given, "--method", "lora:rank=4", "--targets", "**/{q,v}_proj/kernel",
        "--max-length", 16, "--remat", "layers",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert f"{total:,} parameters {trained:,} to train" in result.out
    # Adam keeps two numbers for each that is trained, and counts its steps.
    for name, size in (("weights, float32", 4 * total), ("adapter", 4 * trained)):
        assert f"{name} {size / 1e3:.1f} kB" in result.out
    assert f"optimizer {(8 * trained + 12) / 1e3:.1f} kB" in result.out


def test_what_waits_in_host_memory_is_not_on_the_device(jaxpeft, config):
    short, sizes = ("plan", config, "--max-length", 16, "--quantize", "nf4:double=false"), []
    for options in ((), ("--offload", "all")):
        result = jaxpeft(*short, *options)
        assert result.code == 0, result.err
        found = re.findall(r"(weights|optimizer|host memory)[\w:=, ]*? ([0-9.]+) (k?)B", result.out)
        sizes.append({k: float(n) * (1000 if unit else 1) for k, n, unit in found})
    here, there = sizes
    # What goes: the codes of the linear layers, half a byte each, and all the optimizer has.
    shapes = json.loads(config.read_text())
    d, hidden = shapes["hidden_size"], shapes["intermediate_size"]
    heads = shapes["num_key_value_heads"] * shapes["head_dim"]
    each = shapes["num_hidden_layers"] * (2 * d * d + 2 * d * heads + 3 * d * hidden)
    assert there["weights"] == pytest.approx(here["weights"] - each / 2, rel=0.01)
    assert there["optimizer"] == 4  # its count of steps
    assert there["host memory"] == pytest.approx(each / 2 + here["optimizer"], rel=0.01)


def test_a_bfloat16_adapter_takes_two_bytes_a_parameter(jaxpeft, config):
    short = ("--max-length", 16, "--method", "ia3", "--adapter-dtype", "bfloat16")
    result = jaxpeft("plan", config, *short)
    trained = int(re.search(r"([0-9,]+) to train", result.out)[1].replace(",", ""))
    assert f"adapter {2 * trained / 1e3:.1f} kB" in result.out, result.out


def test_another_method_takes_its_own_places(jaxpeft, config):
    sizes = json.loads(config.read_text())
    result = jaxpeft("plan", config, "--method", "prompt:tokens=5", "--max-length", 16)
    assert f"{5 * sizes['hidden_size']:,} to train" in result.out


def test_errors_name_the_option(jaxpeft, config, tmp_path):
    for options, message in (
        (("--batch-size", 0), "--batch-size 0 is out of range"),
        (("--batch-size", 3, "--accumulate", 2), "--accumulate 2 equal parts"),
        (("--method", "lora:rank=0"), "rank=0"),
        (("--method", "full", "--offload", "weights"), "trains them. Use --offload optimizer."),
        (("--targets", "**/none/*"), "matched none"),
    ):
        result = jaxpeft("plan", config, *options)
        assert result.code == 2 and message in result.err
    encoder = write_tiny_encoder(tmp_path / "encoder", ["a film"])
    assert "plan knows decoders" in jaxpeft("plan", encoder).err


def test_packed_weights_take_their_own_bytes(jaxpeft, config):
    sizes = json.loads(config.read_text())
    d, hidden = sizes["hidden_size"], sizes["intermediate_size"]
    heads = sizes["num_key_value_heads"] * sizes["head_dim"]
    packed = sizes["num_hidden_layers"] * (2 * d * d + 2 * d * heads + 3 * d * hidden)
    rest = sizes["vocab_size"] * d + (2 * sizes["num_hidden_layers"] + 1) * d
    result = jaxpeft("plan", config, "--quantize", "nf4:double=false", "--max-length", 16)
    expected = packed * (1 / 2 + 4 / 64) + 4 * rest  # a nibble each, a float32 a block of 64
    assert f"weights, nf4:double=false {expected / 1e3:.1f} kB" in result.out, result.err
    result = jaxpeft("plan", config, "--quantize", "keep")
    assert result.code == 2 and "keep needs the weights' files" in result.err
