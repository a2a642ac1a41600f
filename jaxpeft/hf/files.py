"""Tensor and JSON files: written whole or not at all, and trusted with nothing when read."""

from __future__ import annotations

import json
import math
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

# Of the axes of a site.
_LARGEST = 2**40


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
    try:
        save_file(arrays, path, metadata=dict(metadata))
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}. Is the disk full?") from error
    path.chmod(mode)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; see `parse_json`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    check_file(path)
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no JSON file: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__} where an object is expected.")
    return value


def parse_json(text: str) -> Any:
    """A JSON value, whose numbers are finite and whose integers have 64 bits.

    >>> parse_json("[1, NaN]")
    Traceback (most recent call last):
        ...
    ValueError: the number NaN is out of range
    """
    real = _number(float)
    return json.loads(text, parse_int=_number(int), parse_float=real, parse_constant=real)


def _number(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = kind(text)
        if not abs(value) < (math.inf if kind is float else 2**64):
            raise ValueError(f"the number {text[:40]} is out of range")
        return value

    return read


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
        whole = _is_site(site) and bool(jnp.dtype(site.dtype))
    except (TypeError, AttributeError, ValueError, SyntaxError) as error:
        raise ValueError(f"{values!r} is no site: {error}.") from error
    if not whole:
        raise ValueError(f"{values!r} is no site.")
    return site


def _is_site(site: Site) -> bool:
    words = (site.roles, site.uses, site.dense, site.lookups, site.reads)
    named = all(_all(str, word) for word in words) and _all(str, (site.path, site.dtype))
    sizes = (site.shape, (site.groups,), tuple(width for _, width in site.sources))
    counted = all(_all(int, size) and all(0 <= n < _LARGEST for n in size) for size in sizes)
    roles = {*site.roles} <= {*ROLES, ""} and len(site.roles) in (0, len(site.shape))
    return named and counted and roles and all(isinstance(name, str) for name, _ in site.sources)


def _all(kind: type, values: Any) -> bool:
    return isinstance(values, tuple) and all(type(value) is kind for value in values)


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
