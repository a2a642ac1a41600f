"""Save a model as a Hugging Face directory that transformers loads."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxpeft.models.families import family_of
from jaxpeft.models.files import INDEX, WEIGHTS
from jaxpeft.models.gguf import find_gguf
from jaxpeft.models.gguf_save import save_gguf
from jaxpeft.models.model import Model
from jaxpeft.models.names import Name
from jaxpeft.models.packed_save import Writer, layer_of, writer
from jaxpeft.models.tokenizer import load_tokenizer
from jaxpeft.quant import QuantizedWeight

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_DTYPES = ("float32", "bfloat16", "float16")


def save(
    directory: str | Path,
    model: Model,
    params: nnx.State,
    *,
    tokenizer_from: str | Path | None = None,
    shard_bytes: int = 5 * 10**9,
    quant_method: str | None = None,
) -> None:
    """Write `config.json` and safetensors, and the tokenizer's files when asked.

    Quantized weights are written packed, as bitsandbytes (nf4, fp4, llm_int8) or
    compressed-tensors (int4, int8, fp8, mxfp4, and nvfp4 with `inverse`) have them, which
    transformers reads; `load(directory, quantize="keep")` gives the same arrays back.

    Everything is first written to a temporary directory beside the target and then renamed into
    place, so an interrupted save leaves no half-written file. `config.json` comes last.

    Args:
        directory: made when absent. Weights of an earlier save in it are replaced. Or the path of
            a .gguf file, for a decoder whose weights are dense or in GGUF's formats.
        model: of `load`, for its names and configuration; its leaves may be abstract.
        params: its weights, all of one dtype; quantized ones count by the dtype that they show.
        tokenizer_from: the Hugging Face directory or GGUF file whose tokenizer to save along; for
            a .gguf file, the one that the model came from, whose metadata it gets.
        shard_bytes: a larger model is split into several files of at most about this size.
        quant_method: "gptq" for int4 and int8 weights, or "awq" for int4, in place of
            compressed-tensors. Their scales have to be float16 or bfloat16.

    Raises:
        ValueError: the weights do not fit the model, have no dtype that transformers reads, or
            are quantized in formats that do not go into one directory.
        FileNotFoundError: `tokenizer_from` does not exist.

    Example:
        >>> model, params = load("SmolLM2.gguf")  # doctest: +SKIP
        >>> save("SmolLM2-hf", model, params, tokenizer_from="SmolLM2.gguf")  # doctest: +SKIP
    """
    leaves = _leaves(model, params)
    dtype = _dtype(leaves)
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    if directory.suffix == ".gguf":
        if quant_method is not None:
            raise ValueError(f"quant_method={quant_method!r} is for directories. Leave it out.")
        source = None if tokenizer_from is None else Path(tokenizer_from)
        save_gguf(directory, model, leaves, dtype, source)
        return
    packer = writer(model.names(), leaves, dtype, quant_method)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as name:
        written = Path(name)
        if tokenizer_from is not None:
            _save_tokenizer(written, Path(tokenizer_from))
        _save_weights(written, model, leaves, shard_bytes, packer)
        config = family_of(model.config.model_type).write(model.config, dtype)
        if packer is not None:
            config["quantization_config"] = packer.config
        (written / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _move(written, directory)


Leaves = dict[str, Any]  # arrays, and quantized weights


def _leaves(model: Model, params: nnx.State) -> Leaves:
    flat = nnx.to_flat_state(params)
    given = {"/".join(map(str, path)): leaf.get_value() for path, leaf in flat}
    abstract = nnx.to_flat_state(nnx.state(model))
    wanted = {"/".join(map(str, path)): tuple(leaf.shape) for path, leaf in abstract}
    for path in sorted(wanted.keys() | given.keys()):
        shape = tuple(given[path].shape) if path in given else "nothing"
        if shape != wanted.get(path, "nothing"):
            raise ValueError(
                f"params hold {shape} at {path!r} where the model has "
                f"{wanted.get(path, 'nothing')}. Save the params that belong to this model, "
                "merged if they carry adapters."
            )
    return given


def _dtype(leaves: Leaves) -> str:
    dtypes = sorted({str(leaf.dtype) for leaf in leaves.values()})
    if len(dtypes) != 1 or dtypes[0] not in _DTYPES:
        raise ValueError(
            f"params have dtypes {', '.join(dtypes)}; transformers needs a single one of "
            f"{', '.join(_DTYPES)}. Cast first: "
            "jax.tree.map(lambda x: x.astype('float32'), params)."
        )
    return dtypes[0]


def _save_weights(
    directory: Path, model: Model, leaves: Leaves, shard_bytes: int, packer: Writer | None
) -> None:
    shards = list(_shards(model, leaves, shard_bytes))
    if len(shards) == 1:
        _write(directory / WEIGHTS, shards[0], leaves, packer)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(_write(directory / file, shard, leaves, packer), file)
    total = sum(leaf.nbytes for leaf in leaves.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


Piece = tuple[str, Name, int]


def _shards(model: Model, leaves: Leaves, shard_bytes: int) -> Iterator[list[Piece]]:
    shard: list[Piece] = []
    size = 0
    for name in model.names():
        tensors = name.tensors(leaves[name.path].shape)
        each = leaves[name.path].nbytes // len(tensors)
        for layer, tensor in enumerate(tensors):
            if shard and size + each > shard_bytes:
                yield shard
                shard, size = [], 0
            shard.append((tensor, name, layer))
            size += each
    yield shard


def _write(path: Path, shard: list[Piece], leaves: Leaves, packer: Writer | None) -> Iterable[str]:
    """Writes a file, and gives the names of the tensors in it."""
    tensors: dict[str, np.ndarray] = {}
    for tensor, name, layer in shard:
        leaf = leaves[name.path]
        if packer is not None and isinstance(leaf, QuantizedWeight):
            module = tensor.removesuffix(".weight")
            parts = packer.tensors(layer_of(leaf, name, layer))
            tensors |= {f"{module}.{part}": array for part, array in parts.items()}
        else:
            tensors[tensor] = name.to_hf(np.asarray(leaf[layer] if name.stacked else leaf))
    # safetensors writes the memory behind an array, whatever its strides.
    tensors = {tensor: np.asarray(array, order="C") for tensor, array in tensors.items()}
    # safetensors makes files that their owner alone can read; these are like any other.
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}. Is the disk full?") from error
    path.chmod(mode)
    return tensors.keys()


def _save_tokenizer(directory: Path, source: Path) -> None:
    if not source.exists():
        raise FileNotFoundError(
            f"tokenizer_from={str(source)!r} does not exist. "
            "Give a model directory or a .gguf file."
        )
    if find_gguf(source) is not None:
        load_tokenizer(source).save_pretrained(directory)
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, directory / name)


def _move(source: Path, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    files = sorted(source.rglob("*"), key=lambda path: path.name == "config.json")
    files = [path for path in files if path.is_file()]
    for path in files:
        target = directory / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    kept = {path.name for path in files}
    # transformers prefers model.safetensors to shards: weights of an earlier save must go.
    stale = [*directory.glob("model*.safetensors"), directory / INDEX]
    for path in stale:
        if path.name not in kept:
            path.unlink(missing_ok=True)
