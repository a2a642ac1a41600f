"""Metrics of a run: one JSON object a line."""

import json
import math
import os
from pathlib import Path
from typing import Any


def append_metrics(path: str | os.PathLike[str], row: dict[str, Any]) -> None:
    """Adds a line; numbers that JSON cannot write (nan, inf) become null.

    Args:
      path: the file, made if it is missing.
      row: plain numbers by name.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/metrics.jsonl"
      >>> append_metrics(path, {"step": 1, "loss": 0.5})
      >>> append_metrics(path, {"step": 2, "loss": float("nan")})
      >>> read_metrics(path)
      [{'step': 1, 'loss': 0.5}, {'step': 2, 'loss': None}]
    """
    bad = lambda v: isinstance(v, float) and not math.isfinite(v)  # noqa: E731
    line = json.dumps({k: None if bad(v) else v for k, v in row.items()})
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the rows; a last line that a crash cut short is left out.

    Args:
      path: the file.

    Returns:
      The rows in order.

    Raises:
      FileNotFoundError: if there is no such file.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def rewind_metrics(path: str | os.PathLike[str], step: int) -> None:
    """Drops the rows after `step`: a run that continues from there writes them again.

    Args:
      path: the file; nothing happens if it is missing.
      step: the last step to keep.
    """
    path = Path(path)
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    part.replace(path)
