import io
import json
import os
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from rich.console import Console

from jaxpeft import train


def start(tiny):
    key = jax.random.key(5)
    return train.init_state(tiny.adapter(True), tiny.optimizer, key, trainable=tiny.trainable)


def fit(tiny, directory, steps=6, *, state=None, data=None, **options):
    state = start(tiny) if state is None else state
    data = data or tiny.batches()
    options = {"steps": steps, "directory": directory, "learning_rate": 0.05} | options
    return train.fit(tiny.step, state, tiny.params, data, **options)


def raw(state):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves((state.adapter, state.opt_state))]


def losses(directory):
    return [r["loss"] for r in train.read_metrics(directory / "metrics.jsonl") if "loss" in r]


def test_fit_is_the_plain_loop(tiny, tmp_path):
    state = start(tiny)
    expected, rows = [], tiny.batches()
    for i in range(6):
        state, metrics = tiny.step(state, tiny.params, rows(i))
        expected.append(metrics)
    schedule = train.schedule("linear", 0.05, 6)
    seen = []
    fitted = fit(tiny, tmp_path, learning_rate=schedule, on_step=seen.append)
    assert raw(fitted) == raw(state)
    written = train.read_metrics(tmp_path / "metrics.jsonl")
    assert written == seen
    for i, (row, metrics) in enumerate(zip(written, expected, strict=True)):
        assert row["step"] == i + 1
        assert row["loss"] == float(metrics.loss) and row["grad_norm"] == float(metrics.grad_norm)
        assert row["tokens"] == rows(i).targets[:, 1:].sum()
        np.testing.assert_allclose(row["learning_rate"], 0.05 * (1 - i / 6), rtol=1e-6)
        assert row["seconds"] > 0


def test_evaluation_and_checkpoints_come_on_time(tiny, tmp_path):
    seen = []

    def evaluate(adapter):
        seen.append(train.latest_step(tmp_path / "checkpoints"))
        return 1.5

    fit(tiny, tmp_path, 5, evaluate=evaluate, eval_every=2, save_every=2, keep=None)
    rows = [r for r in train.read_metrics(tmp_path / "metrics.jsonl") if "eval_loss" in r]
    assert [(r["step"], r["eval_loss"]) for r in rows] == [(2, 1.5), (4, 1.5), (5, 1.5)]
    assert seen == [None, 2, 4]
    saved = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert {"2", "4", "5"} <= saved and not {"1", "3"} & saved


def test_a_finished_run_returns_at_once(tiny, tmp_path):
    state = fit(tiny, tmp_path, 2)
    assert int(fit(tiny, tmp_path, 2, state=state).step) == 2


def test_an_older_state_may_not_overwrite_a_run(tiny, tmp_path):
    fit(tiny, tmp_path, 2)
    with pytest.raises(ValueError, match="checkpoint of step 2, but this run starts at step 0"):
        fit(tiny, tmp_path, 2)


def test_metrics_after_the_checkpoint_are_written_again(tiny, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(tiny, whole, 6)

    def crash(row):
        if row["step"] == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fit(tiny, cut, 6, save_every=3, on_step=crash)
    assert len(losses(cut)) == 5
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # cut short
    fit(tiny, cut, 6, state=train.restore(cut / "checkpoints", start(tiny)))
    assert losses(cut) == losses(whole)


def test_a_loss_that_is_not_finite_stops_and_loses_nothing(tiny, tmp_path):
    good = fit(tiny, tmp_path / "good", 2)
    batches = tiny.batches()

    def data(position):
        batch = batches(position)
        return batch if position < 2 else batch._replace(mask=batch.mask & False)

    with pytest.raises(train.NonFiniteLoss, match="step 3: the loss is nan.*not made") as error:
        fit(tiny, tmp_path / "bad", 6, data=data)
    assert raw(error.value.state) == raw(good)
    saved = train.restore(tmp_path / "bad" / "checkpoints", start(tiny))
    assert int(saved.step) == 2 and raw(saved) == raw(good)
    assert losses(tmp_path / "bad") == losses(tmp_path / "good")
    whole = fit(tiny, tmp_path / "whole", 4)
    assert raw(fit(tiny, tmp_path / "bad", 4, state=saved)) == raw(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(tiny, tmp_path, number, capfd):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    raised = lambda row: row["step"] == 2 and signal.raise_signal(number)  # noqa: E731
    state = fit(tiny, tmp_path, 6, on_step=raised)
    assert int(state.step) == 2 == train.latest_step(tmp_path / "checkpoints")
    assert "Stopping after this step" in capfd.readouterr().err
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    resumed = fit(tiny, tmp_path, state=train.restore(tmp_path / "checkpoints", start(tiny)))
    assert raw(resumed) == raw(fit(tiny, tmp_path / "whole"))
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_a_signal_before_the_first_step_makes_none(tiny, tmp_path):
    batches = tiny.batches()
    early = lambda i: signal.raise_signal(signal.SIGINT) or batches(i)  # noqa: E731
    assert int(fit(tiny, tmp_path, 4, data=early).step) == 0
    assert train.latest_step(tmp_path / "checkpoints") == 0
    state = fit(tiny, tmp_path, 4, state=train.restore(tmp_path / "checkpoints", start(tiny)))
    assert int(state.step) == 4


def test_the_second_signal_is_not_held_back():
    # A shell lets its background jobs ignore Ctrl-C; this one is to heed it.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), train.stop_on_signal():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_signals_are_left_alone_in_a_thread():
    seen = []

    def ask():
        with train.stop_on_signal() as stopped:
            seen.append((stopped(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert seen == [(False, signal.getsignal(signal.SIGINT))]


SCRIPT = """
import jax, jax.numpy as jnp, optax, sys
from jaxpeft import train

def loss_fn(adapter, params, batch, dropout_key):
    return jnp.sum((adapter["x"] - batch + jax.random.normal(dropout_key)) ** 2), jnp.float32(3)

directory, steps = sys.argv[1], int(sys.argv[2])
optimizer = optax.adam(0.1)
state = train.init_state({"x": jnp.zeros(3)}, optimizer, jax.random.key(0))
if train.latest_step(directory + "/checkpoints"):
    state = train.restore(directory + "/checkpoints", state)
step = train.make_step(loss_fn, optimizer)
data = lambda i: jnp.sin(jnp.arange(3.0) + i)
tell = lambda row: print(row["step"], flush=True)
state = train.fit(step, state, {}, data, steps=steps, directory=directory, learning_rate=0.1,
                  on_step=tell)
print("done", int(state.step), state.adapter["x"].tolist())
"""


def script(directory, steps):
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(directory), str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_another_process_continues_an_interrupted_one(tmp_path):
    process = script(tmp_path / "a", 10**6)
    while process.stdout.readline() != "20\n":
        assert process.poll() is None, process.stderr.read()
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "step 1/1000000  loss" in err  # plain lines where there is no terminal
    at = train.latest_step(tmp_path / "a" / "checkpoints")
    assert 20 <= at < 10**6 and f"done {at} " in out
    (resumed, _), (whole, _) = (
        script(tmp_path / name, at + 5).communicate(timeout=300) for name in ("a", "b")
    )
    assert resumed.splitlines()[-1] == whole.splitlines()[-1]
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_ends_with_the_last_step(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with train.progress(0, 3, console=console) as show:
        for step in (1, 2, 3):
            show(step, f"loss {step}.5")
    text = console.file.getvalue()
    assert "3/3" in text and "loss 3.5" in text
    assert terminal or "loss 2.5" not in text  # lines come every ten seconds
    assert ("\x1b[" in text) == terminal


def test_memory_is_at_least_this_arrays(tmp_path):
    array = np.ones(2**22)
    assert train.memory_bytes() > array.nbytes


def test_metrics_are_json_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    rows = [{"step": i, "loss": v} for i, v in enumerate((0.1, float("inf"), 3))]
    for row in rows:
        train.append_metrics(path, row)
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [0.1, None, 3]
    train.rewind_metrics(path, 0)
    assert train.read_metrics(path) == rows[:1]
    train.rewind_metrics(tmp_path / "none.jsonl", 0)
