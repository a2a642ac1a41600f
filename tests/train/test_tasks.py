"""Rows, labelled files, and the scores of tasks, against numpy, scipy and formulas."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxpeft import train
from jaxpeft.train.labelled import numbers


def test_every_row_comes_once_an_epoch():
    rows = train.Rows({"x": np.arange(10), "y": 2 * np.arange(10)}, 4, seed=3)
    for epoch in range(2):
        batches = [rows(epoch * len(rows) + i) for i in range(len(rows))]
        real = [x for b in batches for x, weight in zip(b["x"], b["weight"], strict=True) if weight]
        assert len(batches) == 3 and sorted(real) == list(range(10))
        assert all(b["x"].shape == (4,) and (b["y"] == 2 * b["x"]).all() for b in batches)
    assert rows(0)["x"].tolist() != rows(3)["x"].tolist()
    again = train.Rows(rows.arrays, 4, seed=3)
    assert (again(4)["x"] == rows(4)["x"]).all() and again.fingerprint() == rows.fingerprint()
    assert train.Rows(rows.arrays, 4, seed=4).fingerprint() != rows.fingerprint()


def test_rows_must_be_equally_many():
    with pytest.raises(ValueError, match="{'x': 2, 'y': 3}"):
        train.Rows({"x": np.zeros(2), "y": np.zeros(3)}, 2)
    with pytest.raises(ValueError, match="one or more"):
        train.Rows({"x": np.zeros(0)}, 2)


def test_pooled_logits_are_the_logits_of_pooled_states():
    rng = np.random.default_rng(0)
    states, kernel, bias = rng.normal(size=(3, 5, 4)), rng.normal(size=(4, 2)), rng.normal(size=2)
    mask = np.arange(5) < np.array([5, 2, 1])[:, None]
    logits = jnp.asarray(states @ kernel + bias, "f4")
    means = np.stack([row[keep].mean(0) for row, keep in zip(states, mask, strict=True)])
    pooled = train.pool(logits, jnp.asarray(mask))
    np.testing.assert_allclose(pooled, means @ kernel + bias, rtol=1e-5)
    first = train.pool(logits, jnp.asarray(mask), "first")
    np.testing.assert_allclose(first, states[:, 0] @ kernel + bias, rtol=1e-5)


def test_agreement_equals_scipy():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 50), rng.normal(size=50)
    found = train.agreement(x, y)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(x, y).statistic)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert found["rmse"] == pytest.approx(np.sqrt(((x - y) ** 2).mean()))
    assert train.agreement(np.ones(3), np.arange(3))["pearson"] == 0


def apply(adapter, params, tokens, *, mask, dropout_key):
    """A table of logits for each token."""
    return params[tokens] + adapter


def batches(labels, **options):
    tokens = np.array([[0, 1], [2, 2], [1, 0]], np.int32)
    mask = np.array([[True, True], [True, False], [True, True]])
    return train.Rows({"tokens": tokens, "mask": mask, "labels": labels}, 2, **options)


def test_scores_of_a_classifier():
    rows = batches(np.array([0, 1, 1]), seed=None)
    params = jnp.array([[2.0, 0.0], [0.0, 1.0], [0.0, 4.0]])
    task = train.classification(None, params, rows, rows)
    logits = np.array([[1.0, 0.5], [0.0, 4.0], [1.0, 0.5]])
    losses = np.log(np.exp(logits).sum(1)) - logits[[0, 1, 2], [0, 1, 1]]
    score = task.score(apply)(jnp.zeros(2), params)
    assert score["accuracy"] == pytest.approx(2 / 3) == task.baseline["accuracy"]
    assert score["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    total, count = task.loss(apply)(jnp.zeros(2), params, rows(1), None)
    assert float(total / count) == pytest.approx(losses[2], rel=1e-5) and float(count) == 1


def test_scores_of_a_regression():
    labels = np.array([1.0, 5.0, 3.0])
    rows = batches(labels, seed=None)
    params = jnp.array([[2.0], [0.0], [4.0]])
    task = train.regression(None, params, rows, rows)
    # The model's numbers are in units of the spread of what is known.
    answers = np.array([1.0, 4.0, 1.0]) * labels.std() + labels.mean()
    score = task.score(apply)(jnp.zeros(1), params)
    assert score == pytest.approx(train.agreement(answers, labels), rel=1e-5)
    assert task.baseline["rmse"] == pytest.approx(labels.std())
    total, count = task.loss(apply)(jnp.zeros(1), params, rows(0), None)
    errors = (answers - labels)[:2] / labels.std()
    assert float(total / count) == pytest.approx((errors**2).mean(), rel=1e-5)


FILES = {
    "data.csv": 'text,label\n"a, b",x\nc,y\n',
    "data.tsv": 'text\tlabel\na, b\tx\nc\ty\n',
    "data.jsonl": '{"text": "a, b", "label": "x"}\n\n{"label": "y", "text": "c", "other": 1}\n',
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_labelled_files(tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    rows = train.read_labelled(tmp_path / name)
    assert [(row.text, row.label) for row in rows] == [("a, b", "x"), ("c", "y")]
    assert rows[1].where == f"{tmp_path / name}:3"


def test_a_lone_quotation_mark_in_a_tsv_file(tmp_path):
    (tmp_path / "data.tsv").write_text('class\tsentence\nx\t"so what\ny\t a 6" nail\n')
    rows = train.read_labelled(tmp_path / "data.tsv", text="sentence", label="class")
    assert [row.text for row in rows] == ['"so what', ' a 6" nail']


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("data.csv", "sentence,label\na,b\n", "csv:2 has no 'text'; there are: sentence, label"),
        ("data.csv", "text,label\na,\n", "csv:2 has no 'label'"),
        ("data.csv", "", "holds no rows"),
        ("data.txt", "a", "ends in none of .csv, .tsv and .jsonl"),
        ("data.jsonl", "{\n", "jsonl:1 is no JSON"),
        ("data.jsonl", "[1]\n", "jsonl:1 is a list"),
    ],
)
def test_a_labelled_file_that_is_wrong(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as caught:
        train.read_labelled(tmp_path / name)
    assert message in str(caught.value)


def test_labels_that_are_no_numbers():
    rows = [train.Labelled("a", label, f"f:{i}") for i, label in enumerate(("2.5", "-1", "nan"))]
    assert numbers(rows[:2]) == [2.5, -1]
    with pytest.raises(ValueError, match="f:2: the label 'nan' is no number"):
        numbers(rows)
    with pytest.raises(FileNotFoundError, match="no file 'nowhere.csv'"):
        train.read_labelled("nowhere.csv")
