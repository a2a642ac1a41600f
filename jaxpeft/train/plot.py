"""Loss curves from a run's metrics."""

import os
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics)
    if not any(_curve(rows, name)[0] for name in ("loss", "eval_loss")):
        raise ValueError(f"{os.fspath(metrics)!r} holds no loss yet. Train at least one step.")
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)  # the object API: no pyplot, no global figure
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
