"""Reads AdapterHub's adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpeft.core.transform import Adapter, Tuned
from jaxpeft.flax import transform
from jaxpeft.hf.adapterhub import bottlenecks, fusions, low_rank, prefixes, prompts, refts
from jaxpeft.hf.adapterhub.config import CONFIG, Config, changed, read_config
from jaxpeft.hf.adapterhub.options import Bottleneck, LowRank, Part, Prefix, Prompt, Reft
from jaxpeft.hf.adapterhub.piece import AdapterHubFormatError, Context, Piece
from jaxpeft.hf.adapterhub.places import places
from jaxpeft.hf.adapterhub.slots import File, leaves_of, nested
from jaxpeft.hf.checks import check_size
from jaxpeft.hf.paths import at_paths
from jaxpeft.models import Model

_PARTS: dict[type[Part], Any] = {
    Bottleneck: bottlenecks.pieces,
    LowRank: low_rank.pieces,
    Prefix: prefixes.pieces,
    Prompt: prompts.pieces,
    Reft: refts.pieces,
}

# Tasks whose heads read the first position.
_POOLING = ("sequence-classification", "regression", "image-classification")


def load_adapterhub(
    directory: str | Path,
    model: Any,
    *,
    fused: Sequence[str | Path] | None = None,
    direft: bool = False,
) -> tuple[Tuned, Adapter]:
    """Reads an adapter that AdapterHub's library `adapters` saved.

    Every option of the file is followed or refused, and every tensor of it is used. Bottleneck
    adapters in all their forms, Compacter, invertible adapters, AdapterFusion, prefix and prompt
    tuning, LoRA, (IA)^3, ReFT, and unions of these (Mix-and-Match, UniPELT) compute what the
    library computes. ReFT counts positions among the tokens of `apply`'s `token_mask`; prompts are
    taken off again, so that outputs have the shapes of the model's own.

    Args:
        directory: holds `adapter_config.json` and `adapter.safetensors`, or `pytorch_adapter.bin`,
            of which only tensors are read and nothing is run; or the files of a fusion.
        model: what the adapter is for, of `jaxpeft.models.load`: BERT, RoBERTa, XLM-RoBERTa,
            DistilBERT, ViT, T5 or mT5.
        fused: of a fusion, the directories of the adapters that it fuses; by default those of their
            names, in the directory or beside it.
        direft: the file holds a DiReFT. The library does not write that down, and itself takes such
            a file for a NoReFT, which computes something else.

    Returns:
        `(tuned, adapter)`, the adapter in float32.

    Raises:
        FileNotFoundError: if a file is absent.
        AdapterHubFormatError: a `ValueError`, if the file asks for what no method here does.
        ValueError: if a file is damaged, or a tensor is missing, left over or misshapen.

    Example:
        >>> model, params = jp.models.load("bert-base-uncased")  # doctest: +SKIP
        >>> tuned, adapter = jp.hf.load_adapterhub("my-adapter", model)  # doctest: +SKIP
        >>> logits = tuned.apply(adapter, params, tokens, mask=mask)  # doctest: +SKIP
    """
    directory = Path(directory)
    fusion = not (directory / CONFIG).is_file() and (directory / fusions.CONFIG).is_file()
    path = directory / (fusions.CONFIG if fusion else CONFIG)
    config = read_config(path)
    config = changed(config, Reft, {"subtract_projection": False}) if direft else config
    folders = fusions.folders(directory, config.fused, fused) if fusion else []
    loaded = [load_adapterhub(folder, model) for folder in folders]
    try:
        context = context_of(model, config.name)
        _check_model(config, context, model)
        if fusion:
            file = File(directory, context.places.prefix, fusions.WEIGHTS, fusions.PICKLED)
            found = fusions.assemble(config, file, context, model, loaded)
        else:
            file = File(directory, context.places.prefix)
            found = _read(config, file, context, model)
    except AdapterHubFormatError as error:
        raise AdapterHubFormatError(f"{path}: {error}") from error
    file.check()
    return found


def _read(config: Config, file: File, context: Context, model: Any) -> tuple[Tuned, Adapter]:
    pieces = [*plan(_used(config, file), context)]
    tuned, shapes = fresh(model, pieces)
    leaves = read_leaves(file, pieces, shapes)
    return tuned, Adapter({path: nested(found) for path, found in leaves.items()}, shapes.sites)


def read_leaves(
    file: File, pieces: Sequence[Piece], shapes: Adapter
) -> dict[str, dict[str, jax.Array]]:
    """The leaves by path and name, of these shapes."""
    found = {key: tuple(leaf.shape) for key, leaf in leaves_of(shapes).items()}
    for shape in found.values():
        check_size(file.path, shape, file.tensors)
    leaves: dict[str, dict[str, jax.Array]] = {path: {} for path in shapes}
    for piece in pieces:
        for slot in piece.slots:
            for (path, name), value in slot.read(file, found).items():
                leaves[path][name] = jnp.asarray(value)
    return leaves


def context_of(model: Any, name: str) -> Context:
    """What a plan is made for: an adapter's name and a model.

    Raises:
        AdapterHubFormatError: if the places of the model are not known.
    """
    if not isinstance(model, Model):
        raise AdapterHubFormatError(
            f"{type(model).__name__} is no model of jaxpeft.models, whose places are known."
        )
    width = getattr(model.config, "hidden_size", None) or model.config.d_model
    return Context(name, places(model.config), width, model.task in _POOLING)


def _check_model(config: Config, context: Context, model: Any) -> None:
    asked, mine = (config.model_type, config.hidden_size), (model.config.model_type, context.width)
    if asked != mine:
        raise AdapterHubFormatError(
            f"it is for a {asked[0]!r} model of width {asked[1]}, this is a {mine[0]!r} model of "
            f"width {mine[1]}."
        )


def plan(config: Config, context: Context) -> Iterator[Piece]:
    """The methods of a configuration at their sites, and the tensors of their leaves.

    Leaves that sites have in common are in the slots of each of them.
    """
    for part in config.parts:
        yield from _PARTS[type(part)](part, context)


def fresh(model: Any, pieces: Sequence[Piece]) -> tuple[Tuned, Adapter]:
    """The tuned model, and its adapter in shapes."""
    tuned = transform(model, at_paths({piece.path: piece.method for piece in pieces}))

    def start(key: jax.Array, params: Any) -> Adapter:
        return tuned.init(key, params, *model.example())

    return tuned, jax.eval_shape(start, jax.random.key(0), nnx.state(model))


def _used(config: Config, file: File) -> Config:
    """Without the invertible adapters of early task adapters, which the files do not have."""
    stored = any("invertible_adapters." in name for name in file.tensors)
    if stored or not config.text_task:
        return config
    gone = {"inv_adapter": None, "inv_adapter_reduction_factor": None}
    return changed(config, Bottleneck, gone)
