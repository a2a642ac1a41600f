"""Tensor and JSON files: written whole or not at all, and trusted with nothing when read."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxpeft.core.site import ROLES, Site


def write_directory(directory: Path, names: Sequence[str], write: Callable[[Path], None]) -> None:
    """Runs `write` on a temporary directory in the target, then moves `names` into place.

    Args:
        directory: the target, made if absent; other files in it stay.
        names: the files that `write` makes, in the order in which they are moved.
        write: makes the files in the directory that it is given.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as made:
        write(Path(made))
        for name in names:
            os.replace(Path(made) / name, directory / name)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    # safetensors makes files that their owner alone can read; these are like any other.
    path.touch()
    mode = path.stat().st_mode
    save_file(arrays, path, metadata=dict(metadata))
    path.chmod(mode)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    check_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no JSON file: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__} where an object is expected.")
    return value


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a safetensors file and its metadata.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, corrupt, or no safetensors file.
    """
    check_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file that numpy can hold: {error}. "
            "Copy or save it again."
        ) from error


def read_site(values: Any) -> Site:
    """A site from a file.

    Raises:
        ValueError: if a value is not what `Site.to_json` writes.
    """
    try:
        site = Site.from_json(values)
        names = isinstance(site.path, str) and set(site.roles) <= {*ROLES, ""}
        sizes = all(isinstance(size, int) and size >= 0 for size in site.shape)
        whole = names and sizes and len(site.roles) in (0, len(site.shape))
        jnp.dtype(site.dtype)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{values!r} is no site: {error}.") from error
    if not whole:
        raise ValueError(f"{values!r} is no site.")
    return site


def check_file(path: Path) -> None:
    if path.is_file():
        return
    found = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    holds = f"it holds {', '.join(found)}" if found else "it is empty or does not exist"
    raise FileNotFoundError(f"{path.name} is not in {str(path.parent)!r}: {holds}.")


def some(names: Any, limit: int = 6) -> str:
    """The first few of many names, sorted.

    >>> some(["b", "a"])
    'a, b'
    """
    ordered = sorted(names)
    rest = f", and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + rest
