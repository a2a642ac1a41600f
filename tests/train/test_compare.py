"""Comparing methods: what is counted, what survives a crash, and that budgets are equal."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import train

WIDTHS = (6, 5, 1)  # of the layer that is tuned and of the head
ROWS = 40


def model(params, x):
    return jnp.tanh(x @ params["layer"]["kernel"] + params["layer"]["bias"]) @ params["head"]["w"]


def make_params():
    rng = np.random.default_rng(0)
    kernel, w = rng.normal(size=WIDTHS[:2]), rng.normal(size=WIDTHS[1:])
    layer = {"kernel": jnp.asarray(kernel, "f4"), "bias": jnp.zeros(WIDTHS[1])}
    return {"layer": layer, "head": {"w": jnp.asarray(w, "f4")}}


def loss(apply):
    def loss_fn(adapter, params, batch, key):
        errors = (apply(adapter, params, batch["x"])[:, 0] - batch["y"]) ** 2
        return jnp.sum(batch["weight"] * errors), jnp.sum(batch["weight"])

    return loss_fn


def make_task(rows=None):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(ROWS, WIDTHS[0])).astype("f4")
    y = np.sin(x[:, 0]) + 1
    rows = rows or train.Rows({"x": x, "y": y.astype("f4")}, 8)

    def score(apply):
        evaluation = train.make_evaluation(loss(apply))
        return lambda adapter, params: {"error": train.evaluate(evaluation, adapter, params, rows)}

    return train.Task(
        model, make_params(), rows, loss, score, "error", False, {"error": 2.0}, ("head/*",),
        (jax.ShapeDtypeStruct((2, WIDTHS[0]), "float32"),),
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Three methods, one of which does not fit, and where the results are."""
    folder = tmp_path_factory.mktemp("compare")
    seen = []
    show = lambda done, text: seen.append((done, text))  # noqa: E731
    specs = ("probe", "lora:rank=99", "lora:rank=2,lr=0.05")
    return train.compare(make_task(), specs, folder, steps=20, show=show), folder, seen


def test_parameters_and_bytes_are_counted(report):
    found, folder, _ = report
    probe, failed, lora = found["results"]
    head = WIDTHS[1] * WIDTHS[2]
    assert (probe["parameters"], probe["head_parameters"]) == (head, head)
    assert (lora["parameters"], lora["head_parameters"]) == (
        2 * (WIDTHS[0] + WIDTHS[1]) + head,
        head,
    )
    file = folder / "adapters" / "lora-rank-2-lr-0.05.safetensors"
    assert lora["adapter_bytes"] == file.stat().st_size > 4 * lora["parameters"]
    # Adapter, two moments of Adam, frozen weights and the batch are arguments of the step.
    state = 3 * 4 * lora["parameters"]
    assert lora["step_bytes"] - lora["temp_bytes"] > state + 4 * WIDTHS[0] * WIDTHS[1]
    assert "rank=99 exceeds" in failed["failure"] and failed.keys() == {"method", "failure"}


def test_methods_learn_and_what_is_saved_is_what_was_scored(report):
    found, folder, _ = report
    probe, _, lora = found["results"]
    assert lora["error"] < probe["error"] < found["baseline"]["error"]
    task = make_task()
    tuned, adapter = jp.load(folder / "adapters" / "lora-rank-2-lr-0.05.safetensors", model)
    again = task.score(tuned.apply)(adapter, task.params)
    assert again["error"] == pytest.approx(lora["error"], rel=1e-5)


def test_the_file_and_the_progress_tell_all(report):
    found, folder, seen = report
    assert train.read_results(folder / "results.json") == json.loads(json.dumps(found))
    assert seen[0] == (0, "probe  compiling") and seen[-1][0] == 60
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_methods_numbers_do_not_depend_on_the_others(report, tmp_path):
    found, *_ = report
    alone = train.compare(make_task(), ["lora:rank=2,lr=0.05"], tmp_path, steps=20)["results"][0]
    together = found["results"][2]
    assert [alone[k] for k in ("train_loss", "error")] == [
        together[k] for k in ("train_loss", "error")
    ]


class Stops(train.Rows):
    """Batches until somebody presses Ctrl-C."""

    left = 30

    def __call__(self, position):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().__call__(position)


def test_a_crash_loses_the_method_at_work_alone(tmp_path, monkeypatch):
    whole = make_task()
    stops = make_task(Stops(whole.train.arrays, 8))
    specs = ("probe", "bitfit", "lora:rank=99")
    with pytest.raises(KeyboardInterrupt):
        train.compare(stops, specs, tmp_path, steps=20)
    before = train.read_results(tmp_path / "results.json")["results"]
    assert [row["method"] for row in before] == ["probe"]
    with pytest.raises(ValueError, match="holds results. Keep them with resume"):
        train.compare(whole, specs, tmp_path, steps=20)
    with pytest.raises(ValueError, match="of another run: steps: then 20, now 5"):
        train.compare(whole, specs, tmp_path, steps=5, resume=True)
    after = train.compare(whole, specs, tmp_path, steps=20, resume=True)["results"]
    assert after[0] == before[0] and [row["method"] for row in after] == list(specs)
    # What failed is tried again, what did not is kept.
    module = sys.modules["jaxpeft.train.compare"]  # `train.compare` is the function
    measured = lambda task, spec, *args, **kw: {"method": spec.text, "again": True}  # noqa: E731
    monkeypatch.setattr(module, "measure", measured)
    again = train.compare(whole, specs, tmp_path, steps=20, resume=True)["results"]
    assert again == [*after[:2], {"method": "lora:rank=99", "again": True}]


def test_a_loss_that_is_not_finite_is_a_failure(tmp_path):
    rows = make_task().train.arrays
    task = make_task(train.Rows({**rows, "y": rows["y"] * np.inf}, 8))
    (row,) = train.compare(task, ["probe"], tmp_path, steps=2)["results"]
    assert row["failure"].startswith("FloatingPointError: the loss of step 1 is")


@pytest.mark.parametrize("rates", [(1e-3, 1e-2), (1e-2, 1e-3)])
def test_the_head_has_a_learning_rate_of_its_own(tmp_path, rates):
    """The first step of Adam moves every number by the learning rate."""
    rate, head_rate = rates
    spec = train.read_spec(f"bitfit:lr={rate}")
    train.measure(make_task(), spec, tmp_path / "a", steps=1, head_rate=head_rate)
    _, adapter = jp.load(tmp_path / "a", model)
    moved = np.abs(adapter["head/w"]["value"] - make_params()["head"]["w"])
    np.testing.assert_allclose(moved, head_rate, rtol=1e-3)
    np.testing.assert_allclose(np.abs(adapter["layer/bias"]["value"]), rate, rtol=1e-3)


def test_the_heads_own_learning_rate(tmp_path):
    train.measure(make_task(), train.read_spec("probe:lr=0.1"), tmp_path / "a", steps=1)
    _, adapter = jp.load(tmp_path / "a", model)
    moved = np.abs(adapter["head/w"]["value"] - make_params()["head"]["w"])
    np.testing.assert_allclose(moved, 0.1, rtol=1e-3)


@pytest.mark.parametrize("text", ["[]", "{}", "{"])
def test_a_file_that_is_no_report(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match="no report of a comparison"):
        train.read_results(tmp_path / "results.json")
