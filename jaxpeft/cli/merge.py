"""`jaxpeft merge`: a model with an adapter baked in, for any program that loads the model."""

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from rich.console import Console

from jaxpeft.cli import models as common
from jaxpeft.cli.options import Dtype, File, Text

Place = tyro.conf.Positional[Path]


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
    force: bool = False,
    cache: File = None,
) -> None:
    """Bake an adapter into its model's weights.

    Writes a Hugging Face directory (config.json, safetensors, the tokenizer's files) that
    transformers and every program that reads its models loads without any adapter.

    Args:
        model: a Hugging Face directory, a .gguf file, or smollm2-135m-instruct, which is fetched.
        adapter: directory of a LoRA adapter in Hugging Face PEFT's format.
        output: the directory to write.
        dtype: of the written weights. They are summed in float32 and rounded once.
        force: write even if the output directory is not empty.
        cache: where a fetched model is kept, instead of ~/.cache/jaxpeft.
    """
    from jaxpeft import hf, models

    console = Console(highlight=False)
    path = common.locate(model, cache)
    _check_output(output, path, force)
    with console.status(f"Merging {adapter} into {path.name}"):
        decoder, params = models.load(path)
        tuned, leaves = hf.load_adapter(adapter, decoder, params=params)
        merged = tuned.merge(leaves, params)
        written = _cast(merged, dtype)
        models.save(output, decoder, written, tokenizer_from=path)
    rounding = _rounding(params, merged, written, list(leaves))
    console.print(f"Merged {len(leaves)} sites: {output}/, {dtype}, {_size(output)}.")
    console.print(
        f"Rounding to {dtype} changes a merged weight by at most {rounding.relative:.2g} of it, "
        f"and the update by {rounding.update:.2g} of its norm.",
        soft_wrap=True,
    )


def _check_output(output: Path, model: Path, force: bool) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"OUTPUT {output} is a file. Give a directory.")
    if output.resolve() in (model.resolve(), model.resolve().parent):
        raise ValueError(f"OUTPUT {output} is where the model itself is. Give another directory.")
    if not force and output.is_dir() and any(output.iterdir()):
        raise ValueError(
            f"OUTPUT {output} is not empty. Give another directory, or add --force to write there "
            "all the same."
        )


def _cast(params: Any, dtype: str) -> Any:
    import jax
    import jax.numpy as jnp

    return jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)


def _rounding(params: Any, merged: Any, written: Any, paths: list[str]) -> Rounding:
    """Compares what was written with the float32 sum, at the merged weights."""
    import numpy as np

    from jaxpeft.core.tree import leaves_with_paths

    trees = (dict(leaves_with_paths(tree)[0]) for tree in (params, merged, written))
    before, exact, rounded = trees
    relative, error, update = 0.0, 0.0, 0.0
    for path in paths:
        base, sum_, stored = (np.asarray(t[path], np.float32) for t in (before, exact, rounded))
        off = np.abs(stored - sum_)
        nonzero = np.abs(sum_) > np.finfo(np.float16).tiny
        relative = max(relative, float(np.max(off[nonzero] / np.abs(sum_[nonzero]), initial=0.0)))
        error += float(np.sum(off**2, dtype=np.float64))
        update += float(np.sum((sum_ - base) ** 2, dtype=np.float64))
    return Rounding(relative, (error / update) ** 0.5 if update else 0.0)


def _size(output: Path) -> str:
    return common.megabytes(common.size_on_disk(output))
