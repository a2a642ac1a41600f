"""`--quantize` of the commands, and `jaxpeft quantize`, against transformers and peft."""

import shutil
import warnings

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers

from jaxpeft import hf, models, quant
from jaxpeft.cli import main
from jaxpeft.cli.formats import read_format
from jaxpeft.core.tree import leaves_with_paths
from tests.cli.conftest import SHORT

PROMPT = torch.tensor([[5, 9, 60, 71, 33, 8]])


@pytest.fixture(scope="module")
def packed(tiny_model, tmp_path_factory):
    """The tiny model as `jaxpeft quantize` writes it."""
    output = tmp_path_factory.mktemp("cli-packed") / "packed"
    assert main(["quantize", str(tiny_model), str(output), "--format", "nf4"]) == 0
    return output


@pytest.fixture(scope="module")
def qlora(tiny_model, data, tmp_path_factory):
    """A run of `finetune` over NF4 weights, with a checkpoint at steps 2 and 4."""
    output = tmp_path_factory.mktemp("cli-qlora") / "run"
    args = ["--output", str(output), "--save-every", "2", "--quantize", "nf4", *SHORT]
    assert main(["finetune", str(tiny_model), str(data), *args]) == 0
    return output


def tensors(directory):
    return safetensors.numpy.load_file(directory / "adapter_model.safetensors")


def test_a_run_over_packed_weights_resumes_to_the_same_bits(
    jaxpeft, qlora, packed, tiny_model, data, tmp_path
):
    """Whether they are packed as they are loaded, or were in their file."""
    again = tmp_path / "again"
    (again / "checkpoints").mkdir(parents=True)
    shutil.copytree(qlora / "checkpoints" / "2", again / "checkpoints" / "2")
    shutil.copy(qlora / "metrics.jsonl", again)
    config = ("--config", qlora / "options.yaml", "--output", again, "--resume")
    result = jaxpeft("finetune", tiny_model, data, *config)
    assert result.code == 0, result.err
    assert "all frozen, nf4, " in result.out
    assert f"--adapter {again} --quantize nf4" in result.out
    first, second = tensors(qlora), tensors(again)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    refused = jaxpeft("finetune", tiny_model, data, *config, "--quantize", "int8")
    assert refused.code == 2 and "quantize: saved nf4, now int8" in refused.err
    kept = tmp_path / "kept"
    args = ("--output", kept, "--quantize", "keep", *SHORT)
    assert jaxpeft("finetune", packed, data, *args).code == 0
    assert all(np.array_equal(first[name], array) for name, array in tensors(kept).items())


def test_peft_reads_the_adapter_over_the_packed_model(jaxpeft, qlora, packed, tiny_model, tmp_path):
    result = jaxpeft("merge", tiny_model, qlora, tmp_path, "--quantize", "nf4", "--dense")
    assert result.code == 0, result.err
    base = transformers.AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).train()
    # bitsandbytes multiplies in bfloat16 where no gradient is wanted.
    base.get_input_embeddings().weight.requires_grad_(True)
    with warnings.catch_warnings():
        # peft asks transformers for what the newest one calls otherwise.
        warnings.simplefilter("ignore", FutureWarning)
        tuned = peft.PeftModel.from_pretrained(base, qlora, is_trainable=True)
    expected = tuned(PROMPT).logits.detach().numpy()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    actual = merged(PROMPT).logits.detach().numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_merged_weights_are_packed_again(jaxpeft, qlora, packed, tmp_path):
    result = jaxpeft("merge", packed, qlora, tmp_path, "--quantize", "keep")
    assert result.code == 0, result.err
    assert "on disk, nf4, " in result.out and "Packing the sums again" in result.out
    shown = jaxpeft("inspect", tmp_path)
    assert "packed 14 of 20 tensors, such as model.layers.0" in shown.out
    assert "NF4(block=64, double=True)" in shown.out
    # What it says of a weight is what the written one is off by.
    model, base = models.load(packed)
    tuned, adapter = hf.load_adapter(qlora, model, params=base)
    _, stored = models.load(tmp_path)
    rows = [row for row in map(str.split, result.raw.splitlines()) if len(row) == 4]
    said = {path: (float(rms), float(added)) for path, rms, _, added in rows if path in adapter}
    sums, written = (dict(leaves_with_paths(t)[0]) for t in (tuned.merge(adapter, base), stored))
    assert said.keys() == adapter.keys()
    before = dict(leaves_with_paths(base)[0])
    for path, (rms, added) in said.items():
        for number, other in ((rms, written), (added, before)):
            off = np.asarray(other[path], np.float64) - np.asarray(sums[path], np.float64)
            assert number == pytest.approx(np.sqrt((off**2).mean()), rel=0.06)
    lost = sum(rms > 0.5 * added for rms, added in said.values())
    assert (f"In {lost} of {len(said)} weights" in result.out) == (lost > 0)


def test_text_from_packed_weights(jaxpeft, packed, tiny_model):
    args = ("--prompt", "a fine film", "--max-new-tokens", "4", "--temperature", "2")
    kept = jaxpeft("generate", packed, "--quantize", "keep", *args)
    made = jaxpeft("generate", tiny_model, "--quantize", "nf4", *args)
    assert kept.code == made.code == 0, kept.err
    assert kept.out == made.out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nf4", quant.nf4()),
        ("nf4:block=128,double=false", quant.nf4(128, double=False)),
        ("int4", quant.int4()),
        ("int8:symmetric=false,scale=bfloat16", quant.int8(symmetric=False, scale="bfloat16")),
        ("fp8:scale=block,tile=64x128", quant.fp8(scale="block", tile=(64, 128))),
        ("gguf:kind=q4_0", quant.gguf("q4_0")),
        ("nvfp4", quant.nvfp4(inverse=True)),
    ],
)
def test_formats_have_the_defaults_of_their_factories(text, expected):
    assert read_format(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nf5", "'nf5': no format 'nf5'. Use one of: nf4, fp4"),
        ("nf4:size=64", "nf4 has no ['size']"),
        ("nf4:block=48", "use one of 32, 64"),
        ("nf4:block", "'block' is no option"),
        ("gguf", "gguf needs ['kind']"),
    ],
)
def test_formats_that_are_not_there(jaxpeft, tiny_model, data, text, message):
    for args in (("finetune", tiny_model, data), ("generate", tiny_model, "--prompt", "a")):
        result = jaxpeft(*args, "--quantize", text)
        assert result.code == 2 and message in result.err


def test_files_of_gptq_have_scales_in_float16(jaxpeft, tiny_model, tmp_path):
    args = ("--format", "int8:block=32", "--method", "gptq")
    result = jaxpeft("quantize", tiny_model, tmp_path / "packed", *args)
    assert result.code == 0, result.err
    _, params = models.load(tmp_path / "packed", quantize="keep")
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, quant.QuantizedWeight))
    found = {leaf.format for leaf in leaves if isinstance(leaf, quant.QuantizedWeight)}
    assert found == {quant.int8(32, scale="float16")}


def test_keep_needs_something_to_keep(jaxpeft, tiny_model):
    result = jaxpeft("generate", tiny_model, "--prompt", "a", "--quantize", "keep")
    assert result.code == 2 and "holds no packed weights" in result.err
