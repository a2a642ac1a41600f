"""`jaxpeft merge`: a model with an adapter baked in, for any program that loads the model."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from rich.console import Console

from jaxpeft.cli import models as common
from jaxpeft.cli.adapters import load_adapter
from jaxpeft.cli.formats import Quantize, packed_as, quantization
from jaxpeft.cli.options import Dtype, File, Text

Place = tyro.conf.Positional[Path]


class Summed(NamedTuple):
    """Merged params, of which nothing was packed again."""

    params: Any
    errors: Mapping[str, Any] = {}


class Rounding(NamedTuple):
    """What a narrower dtype costs the merged weights.

    Attributes:
        relative: the largest error of a weight, relative to that weight.
        update: norm of the errors, relative to the norm of the adapter's update.
    """

    relative: float
    update: float


def merge(
    model: Annotated[Text, tyro.conf.arg(metavar="MODEL")],
    adapter: Annotated[Place, tyro.conf.arg(metavar="ADAPTER")],
    output: Annotated[Place, tyro.conf.arg(metavar="OUTPUT")],
    *,
    dtype: Dtype = "float32",
    quantize: Quantize = None,
    dense: bool = False,
    force: bool = False,
    cache: File = None,
) -> None:
    """Bake an adapter into its model's weights.

    Writes a Hugging Face directory (config.json, safetensors, the tokenizer's files) that
    transformers and every program that reads its models loads without any adapter.

    Args:
        model: a Hugging Face directory, a .gguf file, or smollm2-135m-instruct, which is fetched.
        adapter: directory of an adapter of `finetune`, PEFT or AdapterHub, or a file of ours.
        output: the directory to write.
        dtype: of the written weights. They are summed in float32 and rounded once.
        quantize: pack the model's weights first, as `finetune` did when it trained the adapter,
            such as nf4 or keep. What was packed is packed again after the sum, and how far each
            weight is from the sum is shown.
        dense: write all weights dense, also those that --quantize packed.
        force: write even if the output directory is not empty.
        cache: where a fetched model is kept, instead of ~/.cache/jaxpeft.
    """
    from jaxpeft import models

    packing = quantization(quantize)
    console = Console(highlight=False)
    path = common.locate(model, cache)
    check_output(output, path, force)
    with common.doing(f"Merging {adapter} into {path.name}"):
        decoder, params = models.load(path, quantize=packing)
        tuned, leaves = load_adapter(adapter, decoder, params)
        summed = _sum(tuned, leaves, params, again=packing is not None and not dense)
        written = _cast(summed.params, dtype, dense)
        models.save(output, decoder, written, tokenizer_from=path)
    size = common.megabytes(common.size_on_disk(output))
    packed = packed_as(written)
    console.print(f"Merged {len(leaves)} sites: {output}/, {dtype}, {size} on disk{packed}.")
    if summed.errors:
        console.print("Packing the sums again moves each weight by this much.")
        console.print(_table(summed.errors))
        if lost := _lost(summed.errors):
            console.print(lost, style="yellow", soft_wrap=True)
    if plain := [path for path in leaves if path not in summed.errors]:
        rounding = _rounding(params, summed.params, written, plain)
        console.print(
            f"Rounding to {dtype} changes a merged weight by at most {rounding.relative:.2g} of "
            f"it, and the update by {rounding.update:.2g} of its norm.",
            soft_wrap=True,
        )
        if rounding.update > 0.5:
            console.print(
                "That is half of what the adapter adds, or more. Use --dtype float32, or the "
                "adapter apart.", style="yellow", soft_wrap=True,
            )  # fmt: skip


def _sum(tuned: Any, leaves: Any, params: Any, *, again: bool) -> Any:
    """The merged params, and the errors of weights that are packed `again`."""
    from jaxpeft import quant

    return quant.merge(tuned, leaves, params) if again else Summed(tuned.merge(leaves, params))


def _table(errors: Mapping[str, Any]) -> Any:
    """The error of each weight that was packed again, against the exact sum."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    titles = ("weight", "rms", "largest, relative", "update, rms")
    table = Table(*titles, box=SIMPLE_HEAD, padding=(0, 1))
    for path, error in errors.items():
        numbers = (error.rms, error.max_relative, error.update)
        table.add_row(path, *(f"{number:.2g}" for number in numbers))
    return table


def _lost(errors: Mapping[str, Any]) -> str:
    """A warning where rounding takes away most of what the adapter adds; else nothing."""
    lost = sum(float(error.rms) > 0.5 * float(error.update) > 0 for error in errors.values())
    if not lost:
        return ""
    return (
        f"In {lost} of {len(errors)} weights the rounding is half as large as the update or more: "
        "much of the adapter's work is lost. Use --dense, a finer format, or the adapter apart."
    )


def check_output(output: Path, model: Path, force: bool) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"OUTPUT {output} is a file. Give a directory.")
    if output.resolve() in (model.resolve(), model.resolve().parent):
        raise ValueError(f"OUTPUT {output} is where the model itself is. Give another directory.")
    if not force and output.is_dir() and any(output.iterdir()):
        raise ValueError(
            f"OUTPUT {output} is not empty. Give another directory, or add --force to write there "
            "all the same."
        )
    common.check_writable(output, "OUTPUT")


def _cast(params: Any, dtype: str, dense: bool) -> Any:
    import jax
    import jax.numpy as jnp

    from jaxpeft.quant import QuantizedWeight

    def cast(x: Any) -> Any:
        wanted = jnp.dtype(dtype)
        if not isinstance(x, QuantizedWeight):
            return x.astype(wanted)
        # A packed weight keeps its arrays, and shows another dtype.
        return x.materialize(wanted) if dense else dataclasses.replace(x, dtype=wanted)

    return jax.tree.map(cast, params, is_leaf=lambda x: isinstance(x, QuantizedWeight))


def _rounding(params: Any, merged: Any, written: Any, paths: list[str]) -> Rounding:
    """Compares what was written with the float32 sum, at the merged weights."""
    import numpy as np

    from jaxpeft.core.structured import Structured, dense
    from jaxpeft.core.tree import leaves_with_paths

    whole = lambda x: isinstance(x, Structured)  # noqa: E731
    trees = (dict(leaves_with_paths(tree, whole)[0]) for tree in (params, merged, written))
    before, exact, rounded = trees
    relative, error, update = 0.0, 0.0, 0.0
    for path in paths:
        base, sum_, stored = (
            np.asarray(dense(t[path]), np.float32) for t in (before, exact, rounded)
        )
        off = np.abs(stored - sum_)
        nonzero = np.abs(sum_) > np.finfo(np.float16).tiny
        relative = max(relative, float(np.max(off[nonzero] / np.abs(sum_[nonzero]), initial=0.0)))
        error += float(np.sum(off**2, dtype=np.float64))
        update += float(np.sum((sum_ - base) ** 2, dtype=np.float64))
    return Rounding(relative, (error / update) ** 0.5 if update else 0.0)
