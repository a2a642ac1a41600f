"""The loop around the step: evaluation, metrics, checkpoints, and a safe stop."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optax

from jaxpeft.train.batches import Batch
from jaxpeft.train.checkpoint import latest_step, save
from jaxpeft.train.metrics import append_metrics, rewind_metrics
from jaxpeft.train.progress import describe, progress
from jaxpeft.train.step import Metrics, State, Step

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
_STOPPING = b"\nStopping after this step, with a checkpoint; once more stops at once, without.\n"


class NonFiniteLoss(FloatingPointError):
    """The loss or its gradient is not finite; `state` is the one before that step."""

    def __init__(self, message: str, state: State):
        super().__init__(message)
        self.state = state


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into a question to ask; the second acts as ever.

    Signals reach Python's main thread only; in any other thread this changes nothing.

    Yields:
      `stopped() -> bool`.

    Example:
      >>> import signal
      >>> with stop_on_signal() as stopped:
      ...     before = stopped()
      ...     signal.raise_signal(signal.SIGINT)
      ...     before, stopped()
      (False, True)
    """
    signals = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    old: dict[int, Any] = {s: signal.getsignal(s) for s in signals}
    seen: list[int] = []

    def handler(number: int, frame: Any) -> None:
        seen.append(number)
        signal.signal(number, old[number])
        os.write(2, _STOPPING)  # not print, which the signal may have come in the middle of

    for s in signals:
        signal.signal(s, handler)
    try:
        yield lambda: bool(seen)
    finally:
        for s in signals:
            signal.signal(s, old[s])


def fit(
    step: Step,
    state: State,
    params: Any,
    data: Callable[[int], Any],
    *,
    steps: int,
    directory: str | os.PathLike[str],
    learning_rate: optax.ScalarOrSchedule,
    evaluate: Callable[[Any], float] | None = None,
    eval_every: int | None = None,
    save_every: int | None = None,
    keep: int | None = 3,
    fingerprint: Mapping[str, Any] | None = None,
    place: Callable[[Any], Any] = lambda batch: batch,
    on_step: Callable[[dict[str, Any]], None] = lambda row: None,
) -> State:
    """Trains until `steps` updates are made in all, or until Ctrl-C or SIGTERM.

    Step `i` takes `data(i)`, so a state from `restore` continues the run as if it had never
    stopped. A checkpoint is written every `save_every` steps, at the end, on a signal (then the
    state of the moment is returned: `int(state.step) < steps`) and where the loss is not finite.

    Args:
      step: from `make_step`.
      state: from `init_state` or `restore`; given up to the step.
      params: the base weights.
      data: position -> batch, for instance a `Batches`.
      steps: number of updates of the whole run, those before a resume included.
      directory: gets `metrics.jsonl` (one object a step: step, loss, learning_rate, grad_norm,
        tokens, seconds; one an evaluation: step, eval_loss, seconds) and `checkpoints/`.
      learning_rate: the number or schedule that the optimizer has, for the metrics.
      evaluate: adapter -> loss.
      eval_every: evaluate after every so many steps and after the last; None for the last only.
      save_every: checkpoint after every so many steps and after the last; None for the last only.
      keep: number of checkpoints to keep; None keeps all.
      fingerprint: see `save`.
      place: what to do with each batch before the step, such as a `jax.device_put` to shards.
      on_step: called with each row of metrics.

    Returns:
      The last state.

    Raises:
      NonFiniteLoss: with the state before the step at fault, which is also checkpointed.
      ValueError: if `directory` holds checkpoints of later steps than `state`.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, optax
      >>> from jaxpeft.train import init_state, make_step, read_metrics
      >>> def loss_fn(adapter, params, batch, dropout_key):
      ...     return (adapter["x"] - batch) ** 2, jnp.ones(())
      >>> optimizer = optax.sgd(0.5)
      >>> state = init_state({"x": jnp.zeros(())}, optimizer, jax.random.key(0))
      >>> directory = tempfile.mkdtemp()
      >>> state = fit(make_step(loss_fn, optimizer), state, {}, lambda i: jnp.float32(i), steps=2,
      ...             directory=directory, learning_rate=0.5)
      >>> [(row["step"], row["loss"]) for row in read_metrics(directory + "/metrics.jsonl")]
      [(1, 0.0), (2, 1.0)]
    """
    folder, start = Path(directory), int(state.step)
    rate = learning_rate if callable(learning_rate) else lambda _: learning_rate

    def take(position: int) -> tuple[Any, int]:
        batch = data(position)
        return place(batch), _real_tokens(batch)

    def log(row: dict[str, Any]) -> None:
        append_metrics(folder / METRICS, row)
        on_step(row)

    def checkpoint(state: State) -> None:
        path = folder / CHECKPOINTS
        save(path, int(state.step), state, fingerprint=fingerprint, keep=keep)

    # From the first file on a signal waits until all of them are whole.
    with stop_on_signal() as stopped, progress(start, steps) as show:
        _enter(folder, start)
        batch, tokens = take(start) if start < steps else (None, 0)
        if stopped():
            checkpoint(state)
            return state
        for done in range(start + 1, steps + 1):
            began = time.perf_counter()
            state, metrics = step(state, params, batch)
            # The next batch is made while the device works on this one.
            after = take(done) if done < steps else (None, 0)
            row = _row(done, metrics, rate(done - 1), began)
            if not math.isfinite(row["loss"] + row["grad_norm"]):
                checkpoint(state)
                raise NonFiniteLoss(_not_finite(row, folder), state)
            log(row)
            show(done, describe(row, (tokens or row["tokens"]) / row["seconds"]))
            if evaluate and _due(done, steps, eval_every):
                log(_evaluated(done, evaluate, state.adapter))
            stop = stopped()
            if stop or _due(done, steps, save_every):
                checkpoint(state)
            if stop:
                break
            batch, tokens = after
    return state


def _enter(folder: Path, step: int) -> None:
    """Makes the run's directory continue at `step`, unless it holds a run that is further."""
    latest = latest_step(folder / CHECKPOINTS)
    if latest is not None and latest > step:
        raise ValueError(
            f"{str(folder)!r} has a checkpoint of step {latest}, but this run starts at step "
            f"{step}. Continue it with `state = restore({str(folder / CHECKPOINTS)!r}, state)`, "
            "or choose an empty directory."
        )
    folder.mkdir(parents=True, exist_ok=True)
    rewind_metrics(folder / METRICS, step)


def _real_tokens(batch: Any) -> int:
    return int(np.sum(batch.mask)) if isinstance(batch, Batch) else 0


def _due(done: int, steps: int, every: int | None) -> bool:
    return done == steps or bool(every and done % every == 0)


def _row(step: int, metrics: Metrics, rate: Any, began: float) -> dict[str, Any]:
    """Waits for the step, so that `seconds` is all of it."""
    row = {
        "step": step,
        "loss": float(metrics.loss),
        "learning_rate": float(rate),
        "grad_norm": float(metrics.grad_norm),
        "tokens": int(metrics.tokens),
    }
    return row | {"seconds": time.perf_counter() - began}


def _evaluated(step: int, evaluate: Callable[[Any], float], adapter: Any) -> dict[str, Any]:
    began = time.perf_counter()
    loss = float(evaluate(adapter))
    return {"step": step, "eval_loss": loss, "seconds": time.perf_counter() - began}


def _not_finite(row: Mapping[str, Any], folder: Path) -> str:
    return (
        f"step {row['step']}: the loss is {row['loss']} and its gradient's norm "
        f"{row['grad_norm']}. The update was not made; the state before it is in "
        f"{str(folder / CHECKPOINTS)!r}. Lower the learning rate, clip the gradient's norm, or "
        f"look at batch {row['step'] - 1} of the data."
    )
