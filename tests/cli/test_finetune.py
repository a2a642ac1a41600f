"""`jaxpeft finetune` and `jaxpeft merge`, against transformers and peft."""

import dataclasses
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
import yaml

from jaxpeft import train
from jaxpeft.cli import main
from jaxpeft.cli.finetune import Data, fingerprint
from jaxpeft.cli.options import IN_FILES, Options
from jaxpeft.train import read_metrics
from tests.cli.conftest import SHORT

PROMPT = torch.tensor([[5, 9, 60, 71, 33, 8]])


def logits(model):
    with torch.no_grad():
        return model(PROMPT).logits.numpy()


def tuned_by_peft(tiny_model, run):
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    return peft.PeftModel.from_pretrained(base, run).eval()


def test_a_run_leaves_all_its_files(run):
    names = {path.name for path in run.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "metrics.jsonl"} <= names
    assert (run / "loss.png").read_bytes()[1:4] == b"PNG"
    rows = read_metrics(run / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 4 and losses[-1] < 0.8 * losses[0]
    assert [row["step"] for row in rows if "eval_loss" in row] == [4]


def test_resume_gives_the_same_bits(jaxpeft, run, tiny_model, data, tmp_path):
    again = tmp_path / "again"
    (again / "checkpoints").mkdir(parents=True)
    shutil.copytree(run / "checkpoints" / "2", again / "checkpoints" / "2")
    shutil.copy(run / "metrics.jsonl", again)
    config = ("--config", run / "options.yaml", "--output", again, "--resume")
    result = jaxpeft("finetune", tiny_model, data, *config)
    assert result.code == 0, result.err
    first, second = (
        safetensors.numpy.load_file(folder / "adapter_model.safetensors") for folder in (run, again)
    )
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    untrained = [name for name in first if "lora_B" in name and not first[name].any()]
    assert not untrained
    metrics = (read_metrics(folder / "metrics.jsonl") for folder in (run, again))
    first, second = ([row.get("loss") for row in rows] for rows in metrics)
    assert first == second


def test_resume_refuses_another_run(jaxpeft, run, tiny_model, data):
    config = ("--config", run / "options.yaml", "--resume", "--rank", "3")
    result = jaxpeft("finetune", tiny_model, data, *config)
    assert result.code == 2 and "now lora:rank=3,alpha=6," in result.err


# Every option, with another value where a run with that value is another run.
OTHER = {
    "model": "other", "data": None, "config": None, "output": None, "method": "rslora", "rank": 3,
    "alpha": 2.0, "dropout": 0.5, "targets": "**/up_proj/kernel", "learning_rate": 1.0,
    "schedule": "constant", "warmup": 1, "optimizer": "lion", "weight_decay": 0.1,
    "clip_norm": 0.0, "batch_size": None, "accumulate": 2, "epochs": None, "steps": None,
    "max_length": None, "eval_data": None, "eval_fraction": None, "eval_every": None,
    "save_every": None, "keep": None, "resume": None, "seed": 1, "remat": None,
    "dtype": "bfloat16", "quantize": "nf4", "cache": None, "adapter_dtype": "bfloat16",
    "offload": None,
}  # fmt: skip


def test_each_option_that_changes_a_run_is_compared_on_resume():
    assert OTHER.keys() == {field.name for field in dataclasses.fields(Options)}
    rows = [train.Example(np.arange(n), np.ones(n, bool)) for n in (5, 9)]
    data = Data(train.Batches(rows, 2), None)
    own = Options("model", Path("data.jsonl"))
    saved = fingerprint(own, data, 4)
    # These come in through what is made of them.
    assert saved != fingerprint(own, data, 5)
    assert saved != fingerprint(own, Data(train.Batches(rows[:1], 2), None), 4)
    assert saved != fingerprint(own, Data(train.Batches(rows, 1), None), 4)
    for name, value in OTHER.items():
        if value is not None:
            assert saved != fingerprint(dataclasses.replace(own, **{name: value}), data, 4), name


def test_a_run_continues_with_other_remat_and_with_all_in_host_memory(
    jaxpeft, run, tiny_model, data, tmp_path
):
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(run / "checkpoints" / "2", tmp_path / "checkpoints" / "2")
    config = ("--config", run / "options.yaml", "--output", tmp_path, "--resume")
    other = ("--remat", "none", "--eval-every", "3", "--offload", "all")
    result = jaxpeft("finetune", tiny_model, data, *config, *other)
    assert result.code == 0, result.err
    first, second = (
        safetensors.numpy.load_file(at / "adapter_model.safetensors") for at in (run, tmp_path)
    )
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-4, atol=1e-5)


def test_a_bfloat16_adapter_over_packed_weights(jaxpeft, tiny_model, data, tmp_path):
    options = ("--adapter-dtype", "bfloat16", "--optimizer", "adamw8bit", "--quantize", "int8")
    output = ("--output", tmp_path, "--targets", "**/q_proj/kernel", "--accumulate", "2")
    result = jaxpeft("finetune", tiny_model, data, *options, *output, *SHORT, "--steps", "2")
    assert result.code == 0 and "all frozen, int8, " in result.out, result.err
    for tensor in safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors").values():
        narrow = tensor.astype(np.float32)
        assert np.array_equal(narrow, narrow.astype(ml_dtypes.bfloat16)) and narrow.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "rslora", "--rank", "4"), "Write --method rslora:rank=4 instead."),
        (
            ("--method", "pfeiffer:reduction=8", "--dropout", "0.1"),
            "--dropout 0.1: of the LoRA that is tuned without --method, but --method "
            "pfeiffer:reduction=8 is given. Write --method pfeiffer:reduction=8,dropout=0.1",
        ),
        (
            ("--method", "ia3", "--rank", "4", "--alpha", "8"),
            "ia3 has no rank or alpha. Write --method ia3 instead.",
        ),
    ],
)
def test_loras_options_beside_another_method(jaxpeft, tmp_path, options, message):
    result = jaxpeft("finetune", "model", "data.jsonl", "--output", tmp_path / "out", *options)
    assert result.code == 2 and message in result.err, result.err


def test_a_yaml_file_gives_options_and_typed_ones_win(jaxpeft, tiny_model, data, tmp_path):
    path, output = tmp_path / "run.yaml", tmp_path / "out"
    path.write_text("rank: 3\nlearning-rate: 2e-2\nsteps: 1\ntargets: '**/{q,v}_proj/kernel'\n")
    typed = ("--rank", "2", "--output", output, "--config", path, "--alpha", "5")
    result = jaxpeft("finetune", tiny_model, data, *typed)
    assert result.code == 0, result.err
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 5)
    tensors = safetensors.numpy.load_file(output / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in tensors} == {"q_proj", "v_proj"}
    saved = yaml.safe_load((output / "options.yaml").read_text())
    assert saved.keys() == set(IN_FILES)
    assert (saved["rank"], saved["learning_rate"], saved["steps"]) == (2, 0.02, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak: 3", "unknown options rnak. There are: output, method, rank"),
        ("resume: true", "unknown options resume"),
        ("rank: [1, 2]", "rank is a list"),
        ("- rank", "holds a list"),
        ("rank: {", "no YAML"),
        ("rank: many", "Error parsing --rank"),
    ],
)
def test_a_bad_yaml_file(jaxpeft, data, tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    result = jaxpeft("finetune", "model", data, "--config", path)
    assert result.code == 2 and message in result.err and "Traceback" not in result.err


@pytest.fixture(scope="module")
def merged_run(run, tiny_model, tmp_path_factory):
    output = tmp_path_factory.mktemp("cli-merged") / "merged"
    assert main(["merge", str(tiny_model), str(run), str(output)]) == 0
    return output


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_merge_equals_the_adapter_in_transformers(merged_run, run, tiny_model):
    merged = transformers.AutoModelForCausalLM.from_pretrained(merged_run).eval()
    expected = logits(tuned_by_peft(tiny_model, run))
    np.testing.assert_allclose(logits(merged), expected, rtol=1e-4, atol=1e-5)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    assert np.abs(logits(base) - expected).max() > 1e-2
    one, other = (transformers.AutoTokenizer.from_pretrained(d) for d in (merged_run, tiny_model))
    assert one("a bold film").input_ids == other("a bold film").input_ids


def test_merge_says_what_rounding_costs(jaxpeft, merged_run, run, tiny_model, tmp_path):
    exact, rounded = merged_run, tmp_path / "rounded"
    result = jaxpeft("merge", tiny_model, run, rounded, "--dtype", "bfloat16")
    models = [transformers.AutoModelForCausalLM.from_pretrained(d) for d in (exact, rounded)]
    weights = [
        {k: v.float().numpy() for k, v in m.state_dict().items() if "_proj" in k} for m in models
    ]
    expected = max(np.max(np.abs(weights[1][k] / weights[0][k] - 1)) for k in weights[0])
    said = float(result.out.split("by at most ")[1].split(" ")[0])
    assert said == pytest.approx(expected, rel=0.05)
    assert 2**-10 < said <= 2**-8


def test_merge_keeps_what_is_there(jaxpeft, run, tiny_model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = jaxpeft("merge", tiny_model, run, tmp_path)
    assert result.code == 2 and "is not empty" in result.err and "--force" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert jaxpeft("merge", tiny_model, run, tmp_path, "--force").code == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    result = jaxpeft("merge", tiny_model, run, tiny_model, "--force")
    assert result.code == 2 and "where the model itself is" in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rank", "0"), "--rank 0 is out of range. Use 1 or more."),
        (("--dropout", "1"), "--dropout 1.0 is out of range"),
        (("--batch-size", "6", "--accumulate", "4"), "multiple"),
        (("--method", "lorra"), "none of: lora"),
        (("--method", "full", "--offload", "all"), "trains them. Use --offload optimizer."),
        (("--schedule", "step"), "Expected one of ('constant', 'linear', 'cosine')"),
        (("--learning-rate", "fast"), "Error parsing --learning-rate"),
        (("--eval-fraction", "0.01"), "--eval-fraction 0.01 of 12 records is 0"),
        (("--eval-fraction", "0.5", "--eval-data", "x.jsonl"), "Use one of them"),
        (("--targets", "**/qproj/**"), "layers/self_attn/q_proj/kernel"),
        (("--resume",), "holds no checkpoint"),
        (("--config", "nowhere.yaml"), "there is no file 'nowhere.yaml'"),
    ],
)
def test_a_bad_value_says_what_is_allowed(jaxpeft, tiny_model, data, tmp_path, options, message):
    result = jaxpeft("finetune", tiny_model, data, "--output", tmp_path / "out", *options)
    assert result.code == 2 and message in result.err and "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "file"),
    [("prefix:tokens=3", "adapter_model.safetensors"), ("pfeiffer+ia3", "adapter.safetensors")],
)
def test_any_method_is_tuned_and_generates(jaxpeft, tiny_model, data, tmp_path, method, file):
    output, short = tmp_path / "out", [*SHORT[:4], "--learning-rate", "0.1", "--steps", "2"]
    output.mkdir()
    (output / "adapter_config.json").write_text('{"peft_type": "LORA"}')  # of an earlier adapter
    options = ("--method", method, "--output", output, "--remat", "layers", *short)
    result = jaxpeft("finetune", tiny_model, data, *options)
    assert result.code == 0, result.err
    assert (output / file).is_file() and "to train" in result.out
    first, last = (row["loss"] for row in read_metrics(output / "metrics.jsonl") if "loss" in row)
    assert first != last
    asked = ("--prompt", "a bold film", "--max-new-tokens", 3, "--no-template")
    tuned = jaxpeft("generate", tiny_model, "--adapter", output, *asked)
    assert tuned.code == 0, tuned.err
    result = jaxpeft("merge", tiny_model, output, tmp_path / "merged")
    assert result.code == 2 and "cannot be merged" in result.err


def test_a_stopped_run_says_how_to_go_on(jaxpeft, tiny_model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "fit", lambda step, state, *args, **options: state)
    result = jaxpeft("finetune", tiny_model, data, "--output", tmp_path / "out", *SHORT)
    assert result.code == 130 and "Stopped at step 0 of 4" in result.err
    assert "--resume" in result.err and not (tmp_path / "out").exists()


def test_a_finished_run_is_not_overwritten(jaxpeft, run, tiny_model, data):
    result = jaxpeft("finetune", tiny_model, data, "--output", run, *SHORT)
    assert result.code == 2 and "checkpoint of step 4" in result.err and "--resume" in result.err


def test_an_adapter_from_elsewhere_is_not_overwritten(jaxpeft, tiny_model, data, tmp_path):
    for name in ("adapter_model.safetensors", "adapter.safetensors"):
        (tmp_path / name).write_bytes(b"mine")
        result = jaxpeft("finetune", tiny_model, data, "--output", tmp_path, *SHORT)
        assert result.code == 2 and f"holds an adapter, {name}" in result.err
        assert (tmp_path / name).read_bytes() == b"mine"
        (tmp_path / name).unlink()
