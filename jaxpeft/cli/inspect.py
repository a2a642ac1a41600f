"""`jaxpeft inspect`: what is in a model, an adapter or a checkpoint."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jaxpeft.cli import models as common
from jaxpeft.cli.adapters import describe_adapter, is_adapter
from jaxpeft.cli.options import File, Text


def inspect(path: Annotated[Text, tyro.conf.arg(metavar="PATH")], *, cache: File = None) -> None:
    """Say what is in a model, an adapter or a checkpoint.

    For a model: its architecture, and each parameter with its path (which --targets matches),
    shape, and what each axis does: "in" is contracted, "out" is kept, "stack" counts the layers.
    For an adapter: its method, where it is, its parameters, base model and format.

    Args:
        path: a model's directory or .gguf file; an adapter of `finetune`, PEFT or AdapterHub, or a
            file of ours; a directory of checkpoints; or smollm2-135m-instruct, which is fetched.
        cache: where a fetched model is kept, instead of ~/.cache/jaxpeft.
    """
    console = Console(highlight=False)
    place = common.locate(path, cache)
    steps = {} if place.is_file() else _checkpoints(place)
    adapter = is_adapter(place)
    if adapter:
        form, about = describe_adapter(place)
        console.print(f"[bold]Adapter[/] in {form} format: {place}")
        _pairs(console, about)
    if steps:
        _run(place, steps, console)
    if steps or adapter:
        return
    if place.is_dir() and not (place / "config.json").is_file() and not any(place.glob("*.gguf")):
        raise FileNotFoundError(
            f"{place} holds nothing to inspect: no model (config.json or a .gguf file), no adapter "
            "(adapter_config.json or adapter.safetensors), no checkpoints."
        )
    _model(place, console)


def _checkpoints(place: Path) -> dict[int, Path]:
    """The checkpoints in a run's directory, or in its `checkpoints`, by step."""
    for folder in (place / "checkpoints", place):
        if folder.is_dir():
            found = [p for p in folder.iterdir() if (p / "about" / "metadata").is_file()]
            if found:
                return {int(p.name): p for p in sorted(found, key=lambda p: int(p.name))}
    about = place / "about" / "metadata"
    return {int(place.name): place} if about.is_file() and place.name.isdigit() else {}


def _run(place: Path, steps: Mapping[int, Path], console: Console) -> None:
    last = max(steps)
    about = json.loads((steps[last] / "about" / "metadata").read_text(encoding="utf-8"))
    console.print(f"[bold]Checkpoints[/] of the steps {', '.join(map(str, steps))}: {place}")
    _pairs(console, {k: v for k, v in about["fingerprint"].items() if v is not None})
    arrays = {k: v for k, v in about["arrays"].items() if k.startswith("adapter/")}
    table = Table(title=f"The adapter at step {last}")
    table.add_column("path", overflow="fold")
    table.add_column("dtype and shape")
    for name, kind in arrays.items():
        table.add_row(name.removeprefix("adapter/"), kind.replace("[", r"\["))
    console.print(table)
    size = sum(p.stat().st_size for p in steps[last].rglob("*") if p.is_file())
    others = len(about["arrays"]) - len(arrays)
    console.print(f"and {others} arrays of the optimizer; {common.megabytes(size)} a checkpoint")


def _model(place: Path, console: Console) -> None:
    from jaxpeft.models.load import open_checkpoint

    checkpoint = open_checkpoint(place)
    config = checkpoint.config
    sites = _sites(config)
    total = sum(site.size for site in sites)
    console.print(f"[bold]Model[/]: {place}, {common.megabytes(common.size_on_disk(place))}")
    shown = _decoder(config) if hasattr(config, "num_key_value_heads") else _options(config)
    rows = {"architecture": config.model_type} | shown | {"parameters": f"{total:,}"}
    _pairs(console, rows | _packed(checkpoint))
    console.print(_table(sites))
    wide, narrow = common.megabytes(4 * total), common.megabytes(2 * total)
    console.print(f"{wide} in float32, {narrow} in bfloat16")


def _packed(checkpoint: Any) -> dict[str, str]:
    """How many weights are packed, and the format of the first of them."""
    if not checkpoint.packed:
        return {}
    name, weight = next(iter(checkpoint.packed.items()))
    number = f"{len(checkpoint.packed)} of {len(checkpoint.shapes)} tensors"
    return {"packed": f"{number}, such as {name} in {weight.read().format}"}


def _decoder(config: Any) -> dict[str, Any]:
    return {
        "layers": config.num_hidden_layers,
        "width": f"{config.hidden_size}, {config.intermediate_size} in the MLP",
        "heads": f"{config.num_attention_heads} for queries, {config.num_key_value_heads} for "
        f"keys and values, of width {config.head_dim}",
        "vocabulary": f"{config.vocab_size:,}" + _tied(config),
        "context": f"{config.max_position_embeddings:,} tokens",
    }


def _options(config: Any) -> dict[str, Any]:
    """A config's fields, under their own names."""
    fields = [field.name for field in dataclasses.fields(config) if field.name != "model_type"]
    return {name: getattr(config, name) for name in fields}


def _tied(config: Any) -> str:
    return ", the head shares the embedding" if config.tie_word_embeddings else ""


def _sites(config: Any) -> list[Any]:
    """How the model uses its parameters, from its shapes alone."""
    import jaxpeft as jp

    model, params = common.skeleton(config)
    sites = jp.transform(model, jp.lora(1)).sites(params, *model.example())
    return [site for site in sites if not site.boundary]


def _table(sites: Iterable[Any]) -> Table:
    # Narrow enough for whole paths in 80 columns.
    table = Table(title="Parameters", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("path", overflow="fold")
    for column in ("shape", "axes", "float32"):
        table.add_column(column)
    for site in sites:
        shape = " x ".join(f"{n:,}" for n in site.shape)
        roles = ", ".join(role or "-" for role in site.roles)
        table.add_row(site.path, shape, roles, common.megabytes(4 * math.prod(site.shape)))
    return table


def _pairs(console: Console, rows: Mapping[str, Any]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(f"  {name}", str(value).replace("[", r"\["))
    console.print(table)
