"""Rules for methods at known paths."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxpeft.core.method import Method
from jaxpeft.core.rules import rules


def at_paths(chosen: Mapping[str, Method]) -> Any:
    """Rules that put each method at its path; paths with the same method share a rule."""
    groups: dict[str, list[str]] = {}
    for path, method in chosen.items():
        same = json.dumps([method.name, method.options, method.fixed], sort_keys=True)
        groups.setdefault(same, []).append(path)
    return rules(*((OneOf(paths), chosen[paths[0]]) for paths in groups.values()))


class OneOf(frozenset[str]):
    """Paths as a predicate: `OneOf(["w"])("w", site)` is true."""

    def __call__(self, path: str, leaf: Any) -> bool:
        return path in self
