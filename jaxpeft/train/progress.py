"""What a run shows while it goes: a bar on a terminal, else a plain line now and then."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Show = Callable[[int, str], None]
"""`show(step, text)`."""


def memory_bytes() -> int:
    """Peak memory: the first device's where it tells, else this process's.

    Example:
      >>> memory_bytes() > 2**20
      True
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe(row: dict[str, Any], tokens_per_second: float) -> str:
    """One line about a step.

    Example:
      >>> describe({"loss": 1.25, "learning_rate": 1e-3}, 1500.0).split("  ")[:3]
      ['loss 1.2500', 'lr 1.0e-03', '1500 tokens/s']
    """
    return (
        f"loss {row['loss']:.4f}  lr {row['learning_rate']:.1e}  {tokens_per_second:.0f} tokens/s"
        f"  {memory_bytes() / 2**30:.2f} GiB"
    )


@contextmanager
def progress(start: int, steps: int, *, console: Console | None = None) -> Iterator[Show]:
    """Shows steps `start` to `steps`.

    Args:
      start: number of steps already made.
      steps: number of steps of the whole run.
      console: where to; by default standard error.

    Yields:
      `show(step, text)`: moves the bar, or prints a line at the first and last step and every
      ten seconds.
    """
    console = console or Console(stderr=True)
    if console.is_terminal:
        columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.description}"), console=console) as bar:
            task = bar.add_task("compiling", total=steps, completed=start)
            yield lambda step, text: bar.update(task, completed=step, description=text)
        return
    yield _lines(start, steps, console)


def _lines(start: int, steps: int, console: Console, every: float = 10.0) -> Show:
    began = time.monotonic()
    last = -every

    def show(step: int, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < every and step != steps:
            return
        last = now
        left = (now - began) / max(step - start, 1) * (steps - step)
        console.print(f"step {step}/{steps}  {text}  {left:.0f} s left", highlight=False)

    return show
