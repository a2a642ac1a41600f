"""Plots: loss over steps, and methods against each other."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.train.metrics import read_metrics


def plot_loss(metrics: str | os.PathLike[str], image: str | os.PathLike[str]) -> None:
    """Draws training and evaluation loss over steps as a PNG.

    Args:
      metrics: a run's `metrics.jsonl`.
      image: the PNG to write.

    Raises:
      FileNotFoundError: if there is no such metrics file.
      ValueError: if it holds no loss yet.

    Example:
      >>> import tempfile, pathlib
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> _ = (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\\n')
      >>> plot_loss(folder / "metrics.jsonl", folder / "loss.png")
      >>> (folder / "loss.png").read_bytes()[1:4]
      b'PNG'
    """
    rows = read_metrics(metrics)
    if not any(_curve(rows, name)[0] for name in ("loss", "eval_loss")):
        raise ValueError(f"{os.fspath(metrics)!r} holds no loss yet. Train at least one step.")
    figure = _figure(7, 4)
    axes = figure.subplots()
    for name, label, marker in (("loss", "train", ""), ("eval_loss", "evaluation", "o")):
        steps, values = _curve(rows, name)
        if steps:
            axes.plot(steps, values, label=label, marker=marker)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(image, format="png", dpi=120)


def _curve(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


# Key of a row, label of the axis, in which unit it is shown, and on which scale.
_COSTS = (
    ("parameters", "trained parameters", 1, "log"),
    ("step_bytes", "memory of a step (MB)", 1e6, "linear"),
    ("adapter_bytes", "adapter on disk (kB)", 1e3, "log"),
    ("step_seconds", "seconds a step", 1, "linear"),
)


def plot_comparison(report: Mapping[str, Any], image: str | os.PathLike[str]) -> None:
    """Draws the quality of each method over what it costs as a PNG, one panel a cost.

    Args:
        report: what `compare` returns, or `read_results` of its file.
        image: the PNG to write.

    Raises:
        ValueError: if no method in it has results.

    Example:
        >>> import tempfile, pathlib
        >>> row = dict(method="lora", accuracy=0.8, parameters=100, step_bytes=2e6,
        ...            adapter_bytes=1e3, step_seconds=0.1)
        >>> report = dict(quality="accuracy", baseline={"accuracy": 0.5}, results=[row])
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "comparison.png"
        >>> plot_comparison(report, path)
        >>> path.read_bytes()[1:4]
        b'PNG'
    """
    quality, rows = report["quality"], [r for r in report["results"] if "failure" not in r]
    if not rows:
        raise ValueError("no method has results, so there is nothing to draw.")
    figure = _figure(10, 7)
    panels = figure.subplots(2, 2, sharey=True)
    for axes, (cost, label, unit, scale) in zip(panels.flat, _COSTS, strict=True):
        _panel(axes, rows, quality, cost, unit)
        if quality in report["baseline"]:
            _baseline(axes, report["baseline"][quality])
        axes.set(xlabel=label, xscale=scale)
        if scale == "linear":
            axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    for axes in panels[:, 0]:
        axes.set_ylabel(quality)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper")
    figure.savefig(image, format="png", dpi=120)


def _panel(
    axes: Any, rows: Sequence[Mapping[str, Any]], quality: str, cost: str, unit: float
) -> None:
    """One point a method; a method keeps its mark in all panels."""
    for i, row in enumerate(rows):
        if row.get(cost) and row.get(quality) is not None:
            mark = dict(color=f"C{i % 10}", marker="os^Dv"[i // 10 % 5], markersize=8)
            axes.plot([row[cost] / unit], [row[quality]], linestyle="", label=row["method"], **mark)


def _baseline(axes: Any, value: float) -> None:
    """A line, seen only near the methods: far away it would press these together."""
    low, high = axes.get_ylim()
    axes.axhline(value, color="grey", linestyle=":", label=f"baseline, {value:.3g}")
    if not low - (high - low) < value < high + (high - low):
        axes.set_ylim(low, high)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # the object API: no pyplot, no global figure
    return figure
