"""How PEFT chooses modules by name, and the shortest names that choose given ones.

A module is named by its dotted path in the torch model, `model.layers.0.self_attn.q_proj`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

ALL_LINEAR = "all-linear"


def ends(module: str, names: Collection[str]) -> bool:
    """Whether a module has one of these names, or one of them as its last parts.

    >>> ends("layers.0.q_proj", ["q_proj"]), ends("layers.0.xq_proj", ["q_proj"])
    (True, False)
    """
    return any(module == name or module.endswith(f".{name}") for name in names)


def search(pattern: str, option: str) -> re.Pattern[str]:
    """A compiled pattern of an adapter's configuration.

    Raises:
        ValueError: if it is no regular expression.
    """
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{option}={pattern!r} is no regular expression: {error}.") from error


def chosen(names: str | Sequence[str], module: str, option: str) -> bool:
    """A string is a regular expression for the whole name; a list holds names or last parts."""
    if isinstance(names, str):
        return search(names, option).fullmatch(module) is not None
    return ends(module, names)


def saved(names: Sequence[str], module: str) -> bool:
    """Whether `modules_to_save` holds a module, or one that it is part of.

    PEFT compares plain endings here: "norm" is also the end of "input_layernorm".

    >>> saved(["norm"], "layers.0.input_layernorm"), saved(["mlp"], "layers.0.mlp.up_proj")
    (True, True)
    """
    return any(part.endswith(tuple(names)) for part in parts(module))


def parts(module: str) -> list[str]:
    """A module and all that it is part of.

    >>> parts("a.b")
    ['a', 'a.b']
    """
    names = module.split(".")
    return [".".join(names[: i + 1]) for i in range(len(names))]


def in_layers(module: str, layers: Sequence[int] | None, patterns: Sequence[str]) -> bool:
    """Whether a module is in one of the layers of `layers_to_transform`."""
    if not layers:
        return True
    expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns]
    for expression in expressions or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
        found = search(expression, "layers_pattern").match(module)
        if found:
            return int(found["idx"]) in layers
    return False


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any, option: str) -> Any:
    """The value of the first key of `rank_pattern` or `alpha_pattern` that fits a module.

    >>> pattern_value({r"layers\\.0\\..*": 4}, "model.layers.0.q_proj", 8, "rank_pattern")
    4
    """
    for key, value in patterns.items():
        if search(rf"(.*\.)?({key})$", option).match(module):
            return value
    return default


def shortest(
    wanted: Collection[str],
    others: Iterable[str],
    matches: Callable[[str, str], bool],
) -> list[str]:
    """Names, as short as they can be, that choose `wanted` and none of `others`.

    Args:
        wanted: modules to choose.
        others: modules to leave alone.
        matches: `(name, module) -> bool`, how a name chooses.

    Returns:
        Sorted names; the whole path where nothing shorter will do.

    Example:
        >>> shortest(["l.0.q", "l.1.q"], ["l.0.k"], lambda name, m: ends(m, [name]))
        ['q']
    """
    others = [module for module in others if module not in wanted]
    names: set[str] = set()
    left = sorted(wanted)
    while left:
        name = next(
            (n for n in _endings(left[0]) if not any(matches(n, other) for other in others)),
            left[0],
        )
        names.add(name)
        left = [module for module in left if module != left[0] and not matches(name, module)]
    return _needed(names, {name: [m for m in wanted if matches(name, m)] for name in names})


def _needed(names: Iterable[str], chosen: Mapping[str, list[str]]) -> list[str]:
    """The names without those whose modules others choose as well."""
    times = Counter(module for modules in chosen.values() for module in modules)
    kept = []
    for name in sorted(names):
        if all(times[module] > 1 for module in chosen[name]):
            times.subtract(chosen[name])
        else:
            kept.append(name)
    return kept


def _endings(module: str) -> list[str]:
    names = module.split(".")
    return [".".join(names[i:]) for i in reversed(range(len(names)))]
