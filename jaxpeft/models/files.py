"""Weights on disk, seen as named Hugging Face tensors that are read one at a time."""

import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxpeft.models.families import family_of, read_config
from jaxpeft.models.packed_files import Packed, find_packed, sensible
from jaxpeft.models.packed_methods import Stored
from jaxpeft.quant.formats import dequantize

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# AutoGPTQ's, AutoAWQ's and ModelOpt's.
_QUANTIZATION = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
_OLD_GPTQ = "gptq_model-*.safetensors"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    `config` is what its family read; `shapes` maps Hugging Face tensor names to shapes; `read`
    gives one of these tensors as a numpy array in the stored (or dequantized) dtype; `where` names
    the file for error messages; `packed` are those weights that the files hold packed.
    """

    config: Any
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    where: str
    packed: Mapping[str, Packed] = dataclasses.field(default_factory=dict)


def open_directory(
    directory: str | Path, task: str | None = None, labels: Any = None
) -> Checkpoint:
    """A Hugging Face directory: `config.json` and one or several safetensors files.

    Args:
        directory: the model directory.
        task: what the model is to be for; None for what config.json says.
        labels: names or number of the classes; None for those in config.json.

    Returns:
        The checkpoint; tensors are memory-mapped until they are read.

    Raises:
        FileNotFoundError: the configuration or a weight file is absent.
        ValueError: a file is damaged, or asks for something that is not supported.
    """
    directory = Path(directory)
    values = read_json(directory / "config.json") | _pooling(directory)
    quantization = values.pop("quantization_config", None) or _beside(directory)
    config = sensible(directory / "config.json", lambda: read_config(values, task, labels))
    stored = {name: t for path in _weight_files(directory) for name, t in _tensors(path).items()}
    packed, used = find_packed(quantization, stored) if quantization else ({}, set())
    shapes = {name: tensor.shape for name, tensor in stored.items() if name not in used}
    shapes |= {name: weight.shape for name, weight in packed.items()}

    def read(name: str) -> np.ndarray:
        return unpacked(packed[name]) if name in packed else _dense(name, stored[name])

    config = family_of(config.model_type).fit(config, shapes, read)
    return Checkpoint(config, shapes, read, str(directory), packed)


def check_layers(count: int, tensors: Collection[str], where: Any) -> None:
    """Refuses more layers than there are tensors, before they are listed one by one."""
    if count > len(tensors):
        raise ValueError(
            f"{where} has {len(tensors)} tensors, too few for the {count} layers that its "
            "configuration asks for. Does the configuration belong to these weights?"
        )


def _beside(directory: Path) -> dict[str, Any] | None:
    """The `quantization_config` of directories that have it in a file of its own."""
    for name, method in _QUANTIZATION.items():
        if (directory / name).is_file():
            said = read_json(directory / name)
            return {"quant_method": method} | said
    return None


def unpacked(weight: Packed) -> np.ndarray:
    """The dense weight (out, in), in float32."""
    return np.asarray(dequantize(*weight.read())).T


def _dense(name: str, tensor: Stored) -> np.ndarray:
    value = tensor.read()
    if value.dtype.name not in ("float64", "float32", "float16", "bfloat16"):
        raise ValueError(
            f"{name!r} in {tensor.file} is {value.dtype}{value.shape}, which is no dense weight, "
            "and it has no scales beside it. Add quantization_config to config.json if the model "
            "is quantized, or download its files again."
        )
    return value


def _pooling(directory: Path) -> dict[str, str]:
    """What sentence-transformers keeps beside the model: how a text's states become one."""
    path = directory / "1_Pooling" / "config.json"
    modes = read_json(path) if path.is_file() else {}
    return {"pooling": "cls"} if modes.get("pooling_mode_cls_token") else {}


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary in a model's `config.json`, or in another file beside it."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Give the directory of a Hugging Face model "
            "(config.json and model.safetensors), or a .gguf file."
        )
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {values!r:.80}, but should hold a dictionary.")
    return values


def _weight_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if not (directory / INDEX).is_file():
        if len(old := list(directory.glob(_OLD_GPTQ))) == 1:
            return old
        found = sorted(p.name for p in directory.iterdir())
        raise FileNotFoundError(
            f"{directory} holds neither {WEIGHTS} nor {INDEX}, but {', '.join(found)}. "
            "Save the model as safetensors: `model.save_pretrained(directory)` in transformers."
        )
    paths = [directory / name for name in _shards(directory / INDEX)]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise FileNotFoundError(
            f"{directory / INDEX} names {len(paths)} files, of which {', '.join(absent)} "
            "do not exist. Download the missing shards."
        )
    return paths


def _shards(index: Path) -> list[str]:
    """The names of the files that an index lists, all of them in its own directory."""
    tensors = read_json(index).get("weight_map")
    names: list[Any] = list(tensors.values()) if isinstance(tensors, dict) else [None]
    if wrong := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise ValueError(
            f"{index} has a weight_map with {wrong[0]!r:.80}, which is no name of a file beside "
            "it. Download it again."
        )
    return sorted(set(names))


def _tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a file; they are read when asked for."""
    opened, names = _open(path)
    header = functools.cache(lambda: _header(path))

    def stored(name: str) -> Stored:
        part = opened.get_slice(name)
        kind = _FLOAT8.get(part.get_dtype())
        plain = lambda: _read_plain(path, opened, name, part.get_dtype())  # noqa: E731
        read = plain if kind is None else lambda: _read_float8(path, *header(), name, kind)
        return Stored(tuple(part.get_shape()), read, str(path))

    return {name: stored(name) for name in names}


# The names that files have for what numpy has no dtype for, and safetensors does not read for it.
_FLOAT8 = {
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E8M0": jnp.float8_e8m0fnu,
}


def _read_plain(path: Path, opened: Any, name: str, kind: str) -> np.ndarray:
    try:
        return opened.get_tensor(name)
    except (SafetensorError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{name!r} in {path} is of dtype {kind}, which is not supported. Save the model in "
            "another dtype, with the program that wrote it."
        ) from error


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a file start, and its header, which safetensors has checked."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return 8 + size, json.loads(file.read(size))


def _read_float8(
    path: Path, first: int, header: Mapping[str, Any], name: str, dtype: Any
) -> np.ndarray:
    start, end = header[name]["data_offsets"]
    with path.open("rb") as file:
        file.seek(first + start)
        return np.frombuffer(file.read(end - start), dtype).reshape(header[name]["shape"])


def _open(path: Path):
    try:
        opened = safe_open(path, framework="numpy")
        return opened, opened.keys()
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file: {error}. Download it again."
        ) from error
