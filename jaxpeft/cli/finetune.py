"""`jaxpeft finetune`: from a JSONL file to an adapter."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from jaxpeft.cli import models as common
from jaxpeft.cli.adapters import NATIVE, WEIGHTS, save_adapter
from jaxpeft.cli.formats import packed_as, quantization
from jaxpeft.cli.options import Options, check, spec_of, write_options
from jaxpeft.cli.tunings import in_dtype, is_offloaded, peak_rate, policy, tuning

# Options that have to be the same for a run to continue. What is not here nor in `fingerprint` may
# differ: where files are, how often to evaluate and save, and remat and offload, which change the
# last bits at most.
_IDENTITY = (
    "model", "targets", "schedule", "warmup", "optimizer", "adapter_dtype", "weight_decay",
    "clip_norm", "accumulate", "seed", "dtype", "quantize",
)  # fmt: skip


class Data(NamedTuple):
    """Batches to train on and, if asked for, to evaluate on."""

    train: Any
    evaluation: Any | None


def finetune(training: Options) -> None:
    """Tune a model on your own data, with LoRA or another method.

    Writes an adapter in Hugging Face PEFT's format, or in our own where PEFT has none, with
    metrics.jsonl, loss.png and checkpoints beside it. Ctrl-C writes a checkpoint first; --resume
    continues from it to the same bits.
    """
    options, began = training, time.perf_counter()
    console = Console(highlight=False)
    check(options)
    _check_output(options)
    path = common.locate(options.model, options.cache)
    with common.doing(f"Reading {options.data}"):
        data = _data(options, common.load_tokenizer(path))
    model, params = _load(path, options)
    tuned, adapter = _tuned(model, params, options)
    steps = options.steps or options.epochs * len(data.train)
    console.print(_plan(path, params, tuned, adapter, data, steps, options.max_length))
    state = _train(options, tuned, adapter, params, data, steps)
    if int(state.step) < steps:
        raise KeyboardInterrupt(
            f"Stopped at step {int(state.step)} of {steps}; a checkpoint is in {options.output}/. "
            "Continue with the same command and --resume."
        )
    saved = _save(options, tuned, state.adapter, model)
    console.print(_summary(options, saved, began))
    console.print("\nTry it:\n")
    packed = ("--quantize", options.quantize) if options.quantize else ()
    ask = common.command(
        "jaxpeft", "generate", options.model, "--adapter", options.output, *packed,
        "--prompt", "...",
    )  # fmt: skip
    console.print(f"  {ask}", style="bold", soft_wrap=True, markup=False)


def _check_output(options: Options) -> None:
    from jaxpeft.train import latest_step

    checkpoints = options.output / "checkpoints"
    if options.output.exists() and not options.output.is_dir():
        raise ValueError(f"--output {options.output} is a file. Give a directory.")
    latest = latest_step(checkpoints)
    if options.resume and latest is None:
        raise FileNotFoundError(
            f"--resume, but {options.output} holds no checkpoint. Leave out --resume to start."
        )
    if not options.resume and latest is not None:
        raise ValueError(
            f"{options.output} holds a run with a checkpoint of step {latest}. Add --resume to "
            "continue it, or choose another --output."
        )
    there = [name for name in (WEIGHTS, NATIVE) if (options.output / name).is_file()]
    if not options.resume and there:
        raise ValueError(
            f"{options.output} holds an adapter, {there[0]}, which would be overwritten. Choose "
            "another --output."
        )
    common.check_writable(options.output, "--output")


def _load(path: Path, options: Options) -> tuple[Any, Any]:
    import jax.numpy as jnp

    import jaxpeft as jp
    from jaxpeft import models

    with common.doing(f"Loading {path.name}"):
        model, params = models.load(
            path,
            dtype=jnp.dtype(options.dtype),
            quantize=quantization(options.quantize),
            task="causal-lm",
        )
        if is_offloaded("weights", options.offload):
            params = jp.offload(params)
    model.remat = policy(options.remat)
    return model, params


def _data(options: Options, tokenizer: Any) -> Data:
    from jaxpeft import train

    records = train.read_jsonl(options.data)
    held_out = train.read_jsonl(options.eval_data) if options.eval_data else []
    if options.eval_fraction:
        records, held_out = _hold_out(records, options)
    length = options.max_length
    examples = train.encode(records, tokenizer, max_length=length)
    batches = train.Batches(examples, options.batch_size, seed=options.seed)
    if not held_out:
        return Data(batches, None)
    held = train.encode(held_out, tokenizer, max_length=length)
    return Data(batches, train.Batches(held, options.batch_size, seed=None))


def _hold_out(records: list[Any], options: Options) -> tuple[list[Any], list[Any]]:
    import numpy as np

    n = round(len(records) * options.eval_fraction)
    if not 0 < n < len(records):
        raise ValueError(
            f"--eval-fraction {options.eval_fraction} of {len(records)} records is {n}. Use a "
            "fraction that leaves some on both sides, or --eval-data."
        )
    order = np.random.default_rng(options.seed).permutation(len(records))
    return [records[i] for i in sorted(order[n:])], [records[i] for i in sorted(order[:n])]


def _tuned(model: Any, params: Any, options: Options) -> tuple[Any, Any]:
    import jax

    import jaxpeft as jp

    tuned = jp.transform(model, tuning(spec_of(options), options.targets, model))
    tokens = jax.ShapeDtypeStruct((1, 8), "int32")
    adapter = tuned.init(jax.random.key(options.seed), params, tokens)
    return tuned, in_dtype(tuned, adapter, options.adapter_dtype)


def _train(options: Options, tuned: Any, adapter: Any, params: Any, data: Data, steps: int) -> Any:
    import jax

    from jaxpeft import train

    peak = peak_rate(options.learning_rate, spec_of(options))
    rate = train.schedule(options.schedule, peak, steps, warmup=options.warmup)
    optimizer = train.optimizer(
        rate,
        name=options.optimizer,
        weight_decay=options.weight_decay,
        clip_norm=options.clip_norm or None,
    )
    if is_offloaded("optimizer", options.offload):
        optimizer = train.offload(optimizer)
    trainable, loss_fn = tuned.trainable(adapter), train.causal_lm_loss(tuned.apply)
    state = train.init_state(adapter, optimizer, jax.random.key(options.seed), trainable=trainable)
    same = fingerprint(options, data, steps)
    if options.resume:
        checkpoints = options.output / "checkpoints"
        state = train.restore(checkpoints, state, fingerprint=same)
    step = train.make_step(
        loss_fn,
        optimizer,
        trainable=trainable,
        micro_batches=options.accumulate,
        stochastic_rounding=options.adapter_dtype != "float32",
    )
    return train.fit(
        step,
        state,
        params,
        data.train,
        steps=steps,
        directory=options.output,
        learning_rate=rate,
        evaluate=_evaluate(loss_fn, params, data),
        eval_every=options.eval_every,
        save_every=options.save_every,
        keep=options.keep,
        fingerprint=same,
    )


def _evaluate(loss_fn: Any, params: Any, data: Data) -> Callable[[Any], float] | None:
    from jaxpeft import train

    batches = data.evaluation
    if batches is None:
        return None
    evaluation = train.make_evaluation(loss_fn)
    return lambda adapter: train.evaluate(evaluation, adapter, params, batches)


def fingerprint(options: Options, data: Data, steps: int) -> dict[str, Any]:
    """What has to be the same for a run to continue.

    Args:
        options: of the run. Rank, batch size and the like are in the method and the data.
        data: its batches.
        steps: number of its steps.

    Returns:
        JSON values, for `jaxpeft.train.save`.
    """
    method = spec_of(options)
    made = {
        "method": method,
        "learning_rate": peak_rate(options.learning_rate, method),
        "data": data.train.fingerprint(),
        "steps": steps,
    }
    return {name: getattr(options, name) for name in _IDENTITY} | made


def _save(options: Options, tuned: Any, adapter: Any, model: Any) -> Path:
    """The file with the adapter's tensors."""
    from jaxpeft import train

    output = options.output
    path = save_adapter(output, tuned, adapter, model, options.model)
    train.plot_loss(output / "metrics.jsonl", output / "loss.png")
    write_options(output / "options.yaml", options)
    return path


def _plan(
    path: Path, params: Any, tuned: Any, adapter: Any, data: Data, steps: int, limit: int
) -> Table:
    trained, total = common.trained(tuned, adapter), common.count(params)
    held = f", {len(data.evaluation.examples):,} held out" if data.evaluation else ""
    full = sum(len(example.tokens) == limit for example in data.train.examples)
    held += f"; {full:,} fill --max-length {limit} or were cut to it" if full else ""
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("model", f"{path.name}, {total:,} parameters, all frozen{packed_as(params)}"),
        ("adapter", f"{len(adapter)} sites, {trained:,} parameters to train"),
        ("data", f"{len(data.train.examples):,} examples{held}"),
        ("train", f"{steps:,} steps of {data.train.batch_size}"),
    ):
        table.add_row(f"[bold]{name}", value)
    return table


def _summary(options: Options, saved: Path, began: float) -> Table:
    from jaxpeft import train

    rows = train.read_metrics(options.output / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    evaluated = [row["eval_loss"] for row in rows if "eval_loss" in row]
    minutes, seconds = divmod(round(time.perf_counter() - began), 60)
    table = Table(show_header=False)
    table.add_row("training loss, first and last step", f"{losses[0]:.4f}  {losses[-1]:.4f}")
    if evaluated:
        table.add_row("evaluation loss", f"{evaluated[-1]:.4f}")
    table.add_row("time", f"{minutes} min {seconds} s")
    table.add_row("peak memory", common.megabytes(train.memory_bytes()))
    table.add_row("adapter", f"{saved}, {common.megabytes(saved.stat().st_size)}")
    return table
