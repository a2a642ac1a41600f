"""Weights on disk, seen as named Hugging Face tensors that are read one at a time."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxpeft.models.families import family_of, read_config

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    `config` is what its family read; `shapes` maps Hugging Face tensor names to shapes; `read`
    gives one of these tensors as a numpy array in the stored (or dequantized) dtype; `where` names
    the file for error messages.
    """

    config: Any
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    where: str


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
    config = read_config(values, task, labels)
    opened = {path: _open(path) for path in _weight_files(directory)}
    owner = {name: file for file in opened.values() for name in file.keys()}
    shapes = {name: tuple(f.get_slice(name).get_shape()) for name, f in owner.items()}

    def read(name: str) -> np.ndarray:
        return owner[name].get_tensor(name)

    config = family_of(config.model_type).fit(config, shapes, read)
    return Checkpoint(config, shapes, read, str(directory))


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
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error


def _weight_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if not (directory / INDEX).is_file():
        found = sorted(p.name for p in directory.iterdir())
        raise FileNotFoundError(
            f"{directory} holds neither {WEIGHTS} nor {INDEX}, but {', '.join(found)}. "
            "Save the model as safetensors: `model.save_pretrained(directory)` in transformers."
        )
    index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    paths = [directory / name for name in sorted(set(index["weight_map"].values()))]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise FileNotFoundError(
            f"{directory / INDEX} names {len(paths)} files, of which {', '.join(absent)} "
            "do not exist. Download the missing shards."
        )
    return paths


def _open(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file: {error}. Download it again."
        ) from error
