"""The options of `finetune`, typed or read from a YAML file."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxpeft.cli.formats import Quantize, quantization
from jaxpeft.cli.models import DTYPES
from jaxpeft.cli.tunings import Narrow, Offload, Remat, Rule, is_offloaded, specification

Text = tyro.conf.Positional[str]
Integer = Annotated[int | None, tyro.conf.arg(metavar="INT")]
Number = Annotated[float | None, tyro.conf.arg(metavar="FLOAT")]
File = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
Glob = Annotated[str | None, tyro.conf.arg(metavar="GLOB")]
Dtype = Literal[DTYPES]  # type: ignore[valid-type]


@dataclasses.dataclass(frozen=True)
class Options:
    """What `finetune` can be told.

    Args:
        model: a Hugging Face directory, a .gguf file, or smollm2-135m-instruct, which is fetched.
        data: JSONL, one object a line with "messages", "prompt" and "completion", "instruction"
            and "output", or "text". Only the answers are learned.
        config: a YAML file with any of the options below; what is typed here wins.
        output: directory for the adapter, metrics.jsonl, loss.png and the checkpoints.
        method: another one than LoRA, as for `compare`, such as prefix:tokens=20 or pfeiffer.
        rank: of the LoRA update; 8 where not given. Other methods have their options in --method.
        alpha: the LoRA update is multiplied by alpha / rank; twice the rank where not given.
        dropout: share of the inputs that the LoRA update does not see in training.
        targets: which parameters get an adapter, such as "**/{q,v}_proj/kernel"; by default every
            linear layer but the output head. `jaxpeft inspect MODEL` lists the paths.
        learning_rate: at its peak; 5e-4 for LoRA, else the method's usual one.
        schedule: how the learning rate falls after the warmup.
        warmup: steps over which the learning rate rises from 0.
        optimizer: the update rule; adamw8bit keeps AdamW's state in bytes.
        adapter_dtype: of the trained parameters. In bfloat16 they take half the memory, and updates
            are rounded stochastically, so that small ones are not lost.
        weight_decay: decoupled, multiplied by the learning rate.
        clip_norm: largest norm of the gradient; 0 for no limit.
        batch_size: examples in a step.
        accumulate: work on a batch in that many parts, one after another, to save memory.
        epochs: how often to see each example.
        steps: number of steps, instead of epochs.
        max_length: tokens; what is longer is cut from the end.
        eval_data: JSONL to evaluate on.
        eval_fraction: share of the data to hold out and evaluate on, instead of eval-data.
        eval_every: evaluate every so many steps, and at the end.
        save_every: write a checkpoint every so many steps, and at the end.
        keep: number of checkpoints to keep.
        resume: continue from the newest checkpoint in the output directory, to the same bits. Only
            the options of files, evaluation, save-every, keep, remat and offload may differ.
        seed: of the adapter's start, the order of the examples and the dropout.
        remat: what the backward pass finds kept of a layer: its projections' outputs; only the
            layer's input ("layers"), for a third more time; or everything ("none").
        offload: what waits in host memory and is on the device only while it is used: the frozen
            "weights", a layer at a time; the state of the "optimizer"; or "all" of these.
        dtype: of the frozen weights.
        quantize: pack the frozen linear layers, such as nf4 (QLoRA), int8 or int4:block=64; or
            "keep" for a model whose files hold them packed, which else become dense.
        cache: where a fetched model is kept, instead of ~/.cache/jaxpeft.
    """

    model: Annotated[Text, tyro.conf.arg(metavar="MODEL")]
    data: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA.jsonl")]
    config: File = None
    output: Path = Path("finetuned")
    method: Annotated[str | None, tyro.conf.arg(metavar="METHOD")] = None
    rank: Integer = None
    alpha: Number = None
    dropout: Number = None
    targets: Glob = None
    learning_rate: Number = None
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: int = 0
    optimizer: Rule = "adamw"
    adapter_dtype: Narrow = "float32"
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    batch_size: int = 8
    accumulate: int = 1
    epochs: int = 1
    steps: Integer = None
    max_length: int = 512
    eval_data: File = None
    eval_fraction: float = 0.0
    eval_every: Integer = None
    save_every: Integer = None
    keep: int = 3
    resume: bool = False
    seed: int = 0
    remat: Remat = "projections"
    offload: Offload | None = None
    dtype: Dtype = "float32"
    quantize: Quantize = None
    cache: File = None


IN_FILES = tuple(
    field.name
    for field in dataclasses.fields(Options)
    if field.name not in ("model", "data", "config", "resume")
)


def flag(name: str) -> str:
    """The option as it is typed.

    Example:
        >>> flag("learning_rate")
        '--learning-rate'
    """
    return "--" + name.replace("_", "-")


def spec_of(options: Options) -> str:
    """What is tuned, as `jaxpeft.cli.tunings.tuning` reads it.

    Raises:
        ValueError: the method is unknown, or LoRA's own options are given beside it.
    """
    lora = {"rank": options.rank, "alpha": options.alpha, "dropout": options.dropout}
    return specification(options.method, **lora)


def check(options: Options) -> None:
    """Raises ValueError, saying what is allowed, where an option is out of its range."""
    given = dataclasses.asdict(options)
    whole = ("batch_size", "accumulate", "epochs", "max_length", "keep")
    for name in (*whole, "rank", "steps", "eval_every", "save_every"):
        check_range(name, given[name], given[name] is None or given[name] >= 1, "1 or more")
    for name in ("weight_decay", "clip_norm", "warmup"):
        check_range(name, given[name], given[name] >= 0, "0 or more")
    for name in ("learning_rate", "alpha"):
        check_range(name, given[name], given[name] is None or given[name] > 0, "a number above 0")
    for name in ("dropout", "eval_fraction"):
        good = given[name] is None or 0 <= given[name] < 1
        check_range(name, given[name], good, "a share from 0 to below 1")
    quantization(options.quantize)
    check_offload(options.offload, spec_of(options))
    if options.eval_data and options.eval_fraction:
        raise ValueError("--eval-data and --eval-fraction are both given. Use one of them.")
    check_parts(options.batch_size, options.accumulate)


def check_offload(offload: str | None, method: str) -> None:
    """Raises ValueError where the weights are to wait in host memory and to be trained."""
    from jaxpeft import train

    trained = any(part.name == "full" for part in train.read_spec(method).methods)
    if trained and is_offloaded("weights", offload):
        raise ValueError(
            f"--offload {offload} is for frozen weights, and --method {method} trains them. Use "
            "--offload optimizer."
        )


def check_parts(batch_size: int, accumulate: int) -> None:
    """Raises ValueError where a batch cannot be split into equal parts."""
    if batch_size % accumulate:
        raise ValueError(
            f"--batch-size {batch_size} cannot be split into --accumulate {accumulate} equal "
            "parts. Use a batch size that is a multiple of it."
        )


def check_range(name: str, value: Any, good: bool, allowed: str) -> None:
    if not good:
        raise ValueError(f"{flag(name)} {value} is out of range. Use {allowed}.")


def with_file(args: list[str]) -> list[str]:
    """Puts what a `--config` file says before what was typed, which then wins.

    Args:
        args: a command and its arguments.

    Returns:
        The arguments, longer if there is a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML mapping, or has a key that is no option.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.yaml"
        >>> _ = path.write_text("rank: 4")
        >>> with_file(["finetune", "m", "d", "--config", str(path)])[:3]
        ['finetune', '--rank', '4']
    """
    path = _config_path(args)
    if args[:1] != ["finetune"] or path is None:
        return args
    given = read_options(path)
    typed = [word for name, value in given.items() for word in (flag(name), str(value))]
    return [args[0], *typed, *args[1:]]


def _config_path(args: list[str]) -> Path | None:
    found: Path | None = None
    for word, following in zip(args, [*args[1:], None], strict=False):
        if word == "--config" and following is not None:
            found = Path(following)
        elif word.startswith("--config="):
            found = Path(word.removeprefix("--config="))
    return found


def read_options(path: Path) -> dict[str, Any]:
    """The options in a YAML file, under their names in `Options`."""
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r} to read options from.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f'{path} holds a {type(values).__name__}. Give lines such as "rank: 8".')
    named = {str(key).replace("-", "_"): value for key, value in values.items()}
    if unknown := [key for key in named if key not in IN_FILES]:
        raise ValueError(
            f"{path} has the unknown options {', '.join(unknown)}. "
            f"There are: {', '.join(IN_FILES)}."
        )
    if many := [key for key, value in named.items() if isinstance(value, list | dict)]:
        raise ValueError(f"{path}: {many[0]} is a {type(named[many[0]]).__name__}. Give one value.")
    return {key: value for key, value in named.items() if value is not None}


def write_options(path: Path, options: Options) -> None:
    """Writes options as a file for `--config`."""
    import yaml

    values = {name: getattr(options, name) for name in IN_FILES}
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
    text = f"# jaxpeft finetune {options.model} {options.data} --config {path.name}\n"
    path.write_text(text + yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
