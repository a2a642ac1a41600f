"""`jaxpeft compare`: one short comparison a task, and what it says of mistakes."""

import csv
import json
import shutil

import numpy as np
import pytest
from matplotlib.image import imread

import jaxpeft as jp
from jaxpeft import train
from jaxpeft.cli import main
from jaxpeft.cli.reviews import made_up
from jaxpeft.cli.tasks import Source, hold_out, prepare
from jaxpeft.cli.tiny import write_tiny_encoder

BUDGET = ("--steps", "6", "--batch-size", "8", "--limit", "40")
METHODS = ("--methods", "probe", "bitfit:lr=1e-2")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    sentences = [review.text for review in made_up()]
    return write_tiny_encoder(tmp_path_factory.mktemp("cli-compare") / "encoder", sentences)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli-compare-data") / "reviews.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("sentence", "class", "stars"), *_rows()])
    return path


def _rows():
    return [(r.text, r.label, len(r.text) / 4) for r in made_up()[::2]]


@pytest.fixture(scope="module")
def options(encoder, reviews):
    """The arguments of a short comparison."""
    columns = ("--text-column", "sentence", "--label-column", "class")
    return [str(arg) for arg in ("compare", encoder, reviews, *columns, *BUDGET)]


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    """The output directory of one with two methods."""
    output = tmp_path_factory.mktemp("cli-compared") / "out"
    assert main([*options, *METHODS, "--output", str(output)]) == 0
    return output


@pytest.fixture
def compared(jaxpeft, options, tmp_path):
    return lambda *args: jaxpeft(*options, "--output", tmp_path / "out", *args)


def test_a_comparison_leaves_its_files(finished):
    report = train.read_results(finished / "results.json")
    assert [row["method"] for row in report["results"]] == ["probe", "bitfit:lr=1e-2"]
    # Two classes on a width of 32; a layer has four maps to 32 and one to 64, back, and two norms.
    head, biases = 32 * 2 + 2, 2 * (5 * 32 + 64 + 2 * 32) + 32
    assert [row["parameters"] for row in report["results"]] == [head, biases + head]
    assert imread(finished / "comparison.png").shape == (840, 1200, 4)


def test_a_comparison_resumes(jaxpeft, options, finished, tmp_path):
    before = train.read_results(finished / "results.json")["results"]
    output = shutil.copytree(finished, tmp_path / "out")
    result = jaxpeft(*options, "--output", output, *METHODS)
    assert result.code == 2 and "holds results" in result.err and "--resume" in result.err
    result = jaxpeft(*options, "--output", output, *METHODS, "lora:rank=99", "--resume")
    assert result.code == 0 and "lora:rank=99 failed: ValueError: rank=99" in result.out
    assert all(word in result.out for word in ("bitfit:lr=1e-2", "baseline", "accuracy", "s/step"))
    after = train.read_results(output / "results.json")["results"]
    assert after[:2] == before and after[2].keys() == {"method", "failure"}
    result = jaxpeft(*options, "--output", output, *METHODS, "--resume", "--seed", "1")
    assert result.code == 2 and "seed: then 0, now 1" in result.err


def test_a_saved_adapter_gives_the_accuracy_again(encoder, reviews, finished):
    labels = ["negative", "positive"]
    model, params = jp.models.load(encoder, task="token-classification", labels=labels)
    tuned, adapter = jp.load(finished / "adapters" / "bitfit-lr-1e-2.safetensors", model)
    rows = train.read_labelled(reviews, text="sentence", label="class")
    _, test = hold_out(rows, 0.1, seed=0)
    tokenizer = jp.models.load_tokenizer(encoder)
    texts = train.tokenize([row.text for row in test], tokenizer, 32)
    logits = tuned.apply(adapter, params, texts["tokens"], mask=texts["mask"])
    found = np.asarray(train.pool(logits, texts["mask"])).argmax(-1)
    right = [labels[i] == row.label for i, row in zip(found, test, strict=True)]
    row = train.read_results(finished / "results.json")["results"][1]
    assert len(test) == 8 and row["accuracy"] == np.mean(right)


def test_numbers_are_regressed(compared, tmp_path):
    columns = ("--label-column", "stars", "--task", "regression", "--pooling", "first")
    result = compared("--methods", "probe", *columns)
    assert result.code == 0, result.err
    report = train.read_results(tmp_path / "out" / "results.json")
    assert report["quality"] == "pearson" and report["run"]["pooling"] == "first"
    assert {"pearson", "spearman", "rmse"} <= report["results"][0].keys()
    assert report["baseline"]["rmse"] > 0


def test_a_language_model_takes_the_data_of_finetune(jaxpeft, tiny_model, data, tmp_path):
    output = tmp_path / "out"
    args = ("--methods", "norms:lr=0.05", "probe", "--output", output, *BUDGET)
    packed = ("--test-fraction", "0.25", "--quantize", "nf4")
    result = jaxpeft("compare", tiny_model, data, *packed, *args)
    assert result.code == 0, result.err
    assert "parameters, nf4, " in result.out
    report = train.read_results(output / "results.json")
    norms, probe = report["results"]
    assert report["quality"] == "loss" and not report["higher"]
    assert norms["loss"] < report["baseline"]["loss"] and norms["head_parameters"] == 0
    assert "trains the head alone" in probe["failure"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--methods", "lroa"), "'lroa', which is none of: lora"),
        (("--methods", "lora", "lora"), "each once"),
        (("--steps", "0"), "--steps 0 is out of range"),
        (("--test-fraction", "0"), "--test-fraction 0.0 of 80 rows is 0"),
        (("--label-column", "label"), "csv:2 has no 'label'; there are: sentence, class, stars"),
        (("--label-column", "sentence"), "for numbers say --task regression"),
        (("--task", "regression"), "the label 'negative' is no number"),
        (("--task", "tagging"), "--task"),
    ],
)
def test_a_mistake_is_one_message(compared, args, message):
    result = compared(*args)
    assert result.code == 2 and message in result.err and "Traceback" not in result.err


def test_a_decoder_is_no_encoder(jaxpeft, tiny_model, reviews):
    columns = ("--text-column", "sentence", "--label-column", "class")
    result = jaxpeft("compare", tiny_model, reviews, *columns)
    assert result.code == 2 and "not supported for model_type='llama'" in result.err


def test_files_of_records_are_told_from_labels(encoder, tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"text": f"a {word} film", "label": word} for word in ("dull", "bold") * 4]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(
        str(encoder), str(path), None, path, 0.1, None, "text", "label", "mean", 4, 32, 0, None
    )
    prepared = prepare(source)
    assert prepared.about["task"] == "classification"
    assert (prepared.train, prepared.test) == (8, 8)
