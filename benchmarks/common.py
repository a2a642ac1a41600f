"""What every benchmark shares: workers that take turns, hardware and versions, results as JSON."""

import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft", "numpy")


def hardware() -> dict[str, Any]:
    """The processor, its cores, memory, accelerator if any, and the versions that were measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def digits(value: float) -> float:
    """Four of them, however small it is."""
    return float(f"{value:.4g}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def serve(step: Callable[[], Any], report: Callable[[], dict[str, Any]]) -> None:
    """A worker's loop: a step for each line read, its seconds written back; then `report()`."""
    for line in sys.stdin:
        if line.strip() == "end":
            break
        start, cpu = time.perf_counter(), time.process_time()
        step()
        seconds = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        print(json.dumps(seconds), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps({**report(), "peak_rss_mib": round(peak)}), flush=True)


class Worker:
    """One contender in a process of its own, stepped on request."""

    def __init__(self, script: str, name: str, arguments: Sequence[str] = ()):
        command = [sys.executable, script, "--worker", name, *arguments]
        self.name, self.times = name, []
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def step(self, keep: bool = True) -> None:
        seconds = self._ask("step")
        if keep:
            self.times.append(seconds)

    def end(self) -> dict[str, Any]:
        report = self._ask("end")
        self.process.wait()
        return {**report, **self.summary()}

    def summary(self) -> dict[str, Any]:
        wall, cpu = ([t[kind] for t in self.times] for kind in ("wall", "cpu"))
        return {
            "steps": len(wall),
            "seconds_median": digits(statistics.median(wall)),
            "seconds_min": digits(min(wall)),
            "cpu_seconds_median": digits(statistics.median(cpu)),
        }

    def _ask(self, what: str) -> dict[str, Any]:
        print(what, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker {self.name!r} died; run it alone: --worker {self.name}")
        return json.loads(line)


def alternate(workers: Sequence[Worker], steps: int, warm: int = 2) -> dict[str, dict[str, Any]]:
    """The workers' steps in turn, so that noise falls on all of them alike; their reports."""
    for turn in range(warm + steps):
        for worker in workers:
            worker.step(keep=turn >= warm)
    return {worker.name: worker.end() for worker in workers}


def write(name: str, result: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"hardware": hardware(), **result}, indent=2) + "\n")
    return path
