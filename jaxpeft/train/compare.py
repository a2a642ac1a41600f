"""Several methods on one task under one budget: quality, parameters, memory and time of each."""

import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxpeft.core.rules import compile_pattern
from jaxpeft.core.tree import leaves_with_paths, map_with_path
from jaxpeft.flax import transform
from jaxpeft.hf import save
from jaxpeft.train.optim import optimizer, schedule
from jaxpeft.train.specs import Spec, read_specs
from jaxpeft.train.step import init_state, make_step
from jaxpeft.train.tasks import Task

RESULTS = "results.json"
HEAD_RATE = 1e-2
Row = dict[str, Any]
Show = Callable[[int, str], None]


def compare(
    task: Task,
    specs: Sequence[str],
    directory: str | os.PathLike[str],
    *,
    steps: int,
    seed: int = 0,
    head_rate: float = HEAD_RATE,
    about: Mapping[str, Any] | None = None,
    resume: bool = False,
    show: Show = lambda done, text: None,
) -> dict[str, Any]:
    """Tunes a model by each of several methods: the same steps on the same batches.

    Results are written after each method, so a crash loses the method at work at most. A method
    that fails (it does not fit the model, its loss is not finite, memory runs out) gets a row with
    `failure`, and the others go on.

    Args:
      task: such as `classification(...)`.
      specs: see `read_spec`.
      directory: gets `results.json` and each trained adapter in `adapters/`, for `jp.load`.
      steps: of each method; Adam, the learning rate rising for a tenth of them, then falling to 0.
      seed: of the adapters' starts and dropout.
      head_rate: learning rate of the task's head, the same for all methods.
      about: JSON values that say which run this is, kept with the results and compared on resuming.
      resume: skip the methods that `directory` has results of. Those that failed are tried again.
      show: called with the number of steps done, over all methods, and a text.

    Returns:
      What `results.json` holds: `run` (the settings), `quality`, `higher`, `baseline`, and
      `results`, a row of `measure` for each method.

    Raises:
      ValueError: a specification cannot be read, or `directory` holds results: of any run if not
        resuming, else of another run.
    """
    folder, read = Path(directory), read_specs(specs)
    run = {**(about or {}), "steps": steps, "seed": seed, "head_rate": head_rate}
    run |= {"data": task.train.fingerprint()}
    rows = _enter(folder, run, resume)
    report: dict[str, Any] = {"run": run, "quality": task.quality, "higher": task.higher}
    report |= {"baseline": dict(task.baseline), "results": rows}
    done = {row["method"] for row in rows}
    for i, spec in enumerate(read):
        if spec.text not in done:
            row = _attempt(task, spec, steps, seed, head_rate, folder, _within(show, i * steps))
            rows.append(row)
            write_results(folder / RESULTS, report)
        show((i + 1) * steps, f"{spec.text}  done")
    return report


def _within(show: Show, start: int) -> Show:
    return lambda step, text: show(start + step, text)


def _enter(folder: Path, run: Mapping[str, Any], resume: bool) -> list[Row]:
    """The rows of a run that is resumed, without those that failed."""
    path = folder / RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return []
    if not resume:
        raise ValueError(
            f"{path} holds results. Keep them with resume=True (--resume), or choose another "
            "directory."
        )
    report = read_results(path)
    now = json.loads(json.dumps(dict(run)))
    differ = [k for k in sorted({*now, *report["run"]}) if now.get(k) != report["run"].get(k)]
    if differ:
        lines = "; ".join(f"{k}: then {report['run'].get(k)}, now {now.get(k)}" for k in differ)
        raise ValueError(f"{path} is of another run: {lines}. Choose another directory.")
    return [row for row in report["results"] if "failure" not in row]


def _attempt(
    task: Task, spec: Spec, steps: int, seed: int, head_rate: float, folder: Path, show: Show
) -> Row:
    name = re.sub(r"[^A-Za-z0-9.]+", "-", spec.text)
    try:
        return measure(
            task, spec, folder / "adapters" / f"{name}.safetensors", steps=steps, seed=seed,
            head_rate=head_rate, show=show,
        )  # fmt: skip
    except (ValueError, FloatingPointError, jax.errors.JaxRuntimeError) as error:
        return {"method": spec.text, "failure": f"{type(error).__name__}: {error}"}


def measure(
    task: Task,
    spec: Spec,
    path: str | os.PathLike[str],
    *,
    steps: int,
    seed: int = 0,
    head_rate: float = HEAD_RATE,
    show: Show = lambda done, text: None,
) -> Row:
    """Tunes a model by one method and measures.

    Args:
      task: the task.
      spec: from `read_spec`.
      path: where to write the trained adapter.
      steps: as for `compare`, like the arguments below.
      seed: of the adapter's start.
      head_rate: learning rate of the head.
      show: called with the number of steps done and a text.

    Returns:
      `method`, `learning_rate`; `parameters` that were trained, `head_parameters` among them;
      `train_loss`, the mean of the last tenth of the steps; the task's scores; `step_bytes`,
      arguments and temporaries of the compiled step, `temp_bytes` of these (None where the device
      does not tell); `adapter_bytes` on disk; `step_seconds`, the fastest; `compile_seconds`; and
      `seconds`, all of it with the evaluation.

    Raises:
      ValueError: if the method does not fit the model.
      FloatingPointError: if the loss is not finite.
    """
    began = time.perf_counter()
    show(0, f"{spec.text}  compiling")
    tuned = transform(task.model, spec.tuning(task.head, getattr(task.model, "output_head", None)))
    example = task.example or task.model.example()
    adapter = tuned.init(jax.random.key(seed), task.params, *example)
    trainable = tuned.trainable(adapter)
    rule = _optimizer(spec, head_rate, steps, _head(task))
    state = init_state(adapter, rule, jax.random.key(seed), trainable=trainable)
    step: Any = make_step(task.loss(tuned.apply), rule, trainable=trainable)
    compiled = step.lower(state, task.params, task.train(0)).compile()
    compile_seconds = time.perf_counter() - began
    state, losses, seconds = _train(compiled, state, task, steps, spec.text, show)
    show(steps, f"{spec.text}  evaluating")
    scores = task.score(tuned.apply)(state.adapter, task.params)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save(Path(path), state.adapter, tuned)
    return {
        "method": spec.text,
        "learning_rate": spec.rate,
        "parameters": _count(adapter, trainable, lambda path: True),
        "head_parameters": _count(adapter, trainable, _head(task)),
        "train_loss": float(np.mean(losses[-max(1, steps // 10) :])),
        **scores,
        **_memory(compiled),
        "adapter_bytes": Path(path).stat().st_size,
        "step_seconds": min(seconds),
        "compile_seconds": compile_seconds,
        "seconds": time.perf_counter() - began,
    }


def _train(
    compiled: Any, state: Any, task: Task, steps: int, name: str, show: Show
) -> tuple[Any, list[float], list[float]]:
    """The last state, and the loss and the seconds of each step."""
    losses, seconds = [], []
    for position in range(steps):
        batch = task.train(position)
        began = time.perf_counter()
        state, metrics = compiled(state, task.params, batch)
        losses.append(float(metrics.loss))  # waits for the step
        seconds.append(time.perf_counter() - began)
        if not math.isfinite(losses[-1] + float(metrics.grad_norm)):
            raise FloatingPointError(
                f"the loss of step {position + 1} is {losses[-1]}. Lower the learning rate, "
                f'for instance "{name.partition(":")[0]}:lr=1e-4".'
            )
        show(position + 1, f"{name}  loss {losses[-1]:.4f}")
    return state, losses, seconds


def _head(task: Task) -> Callable[[str], bool]:
    """Whether a leaf of an adapter belongs to the task's head, by its path."""
    patterns = [compile_pattern(f"{glob}/**") for glob in task.head]
    return lambda path: any(matches(path, None) for matches in patterns)


def _optimizer(
    spec: Spec, head_rate: float, steps: int, is_head: Callable[[str], bool]
) -> optax.GradientTransformation:
    """Adam whose updates of the head are scaled to a learning rate of their own."""

    def scaled(updates: Any, params: Any = None) -> Any:
        del params
        factor = head_rate / spec.rate if spec.methods else 1.0
        return map_with_path(lambda path, x: x * factor if is_head(path) else x, updates)

    adam = optimizer(schedule("linear", spec.rate, steps, warmup=steps // 10))
    return optax.chain(adam, optax.stateless(scaled))


def _count(adapter: Any, trainable: Any, wanted: Callable[[str], bool]) -> int:
    """Number of trained parameters at the paths that are wanted."""
    pairs, _ = leaves_with_paths(adapter)
    marks = jax.tree.leaves(trainable)
    return sum(
        leaf.size for (path, leaf), mark in zip(pairs, marks, strict=True) if mark and wanted(path)
    )


def _memory(compiled: Any) -> dict[str, int | None]:
    found = compiled.memory_analysis()
    if found is None:
        return {"step_bytes": None, "temp_bytes": None}
    temporary = int(found.temp_size_in_bytes)
    return {
        "step_bytes": temporary + int(found.argument_size_in_bytes),
        "temp_bytes": temporary,
    }


def write_results(path: str | os.PathLike[str], report: Mapping[str, Any]) -> None:
    """Writes a report of `compare` as JSON; after a crash the file is the old one or the new one.

    Args:
      path: of the file.
      report: what `compare` returns.
    """
    path = Path(path)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(_plain(report), indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _plain(value: Any) -> Any:
    """JSON values: numbers that JSON cannot write (nan, inf) become null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    bad = isinstance(value, float) and not math.isfinite(value)
    return None if bad else value


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `compare` wrote.

    Args:
      path: a `results.json`.

    Returns:
      The report.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no report of `compare`.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        report = json.loads(text)
        whole = {"run", "quality", "higher", "baseline", "results"} <= report.keys()
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no report of a comparison ({error}).") from error
    if not whole:
        raise ValueError(f"{path} is no report of a comparison: it has {sorted(report)}.")
    return report
