"""What the options in a configuration file may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Check = tuple[Callable[[Any], bool], str]

# No adapter has more layers; a leaf holds less than that many times the numbers of its file.
_LAYERS = 1000


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a finite number of float64, and no bool."""
    return is_int(value) or isinstance(value, float) and math.isfinite(value)


def is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1


def is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def is_indices(value: Any) -> bool:
    return isinstance(value, list) and all(is_int(item) and item >= 0 for item in value)


COUNT: Check = (lambda v: is_int(v) and v > 0, "a positive integer")
POSITIVE: Check = (is_positive, "a positive number")
NUMBER: Check = (is_number, "a number")
SIZE: Check = (lambda v: is_number(v) and v >= 0, "a number of 0 or more")
SHARE: Check = (is_share, "a number in [0, 1)")
FLAG: Check = (is_flag, "true or false")
NAMES: Check = (is_names, "a list of names")
INDICES: Check = (is_indices, "a list of integers of 0 or more")


def check_option(path: Path, name: str, value: Any, check: Check) -> None:
    """Raises ValueError where the value of an option is not what it must be."""
    good, wanted = check
    if not good(value):
        raise ValueError(f"{path}: {name}={value!r} must be {wanted}.")


def check_options(path: Path, config: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    """`check_option` of those options that are there and not null."""
    for name, check in checks.items():
        if config.get(name) is not None:
            check_option(path, name, config[name], check)


def check_size(path: Path, shape: Iterable[int], tensors: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError where a leaf is far too large to be made of a file's tensors.

    An option of a few digits can ask for more memory than there is, so it is held to what the file
    has before anything is made.
    """
    size, there = math.prod(shape), sum(tensor.size for tensor in tensors.values())
    if size > _LAYERS * max(there, 1):
        raise ValueError(
            f"{path} asks for {size:,} numbers of shape {tuple(shape)}, and the tensors beside it "
            f"hold {there:,}. It is damaged, or of other tensors."
        )
