"""What is said where a structured weight becomes a dense array."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable


class MaterializeWarning(UserWarning):
    """A structured weight became a dense array where no shortcut is known."""


class MaterializeError(ValueError):
    """The same under `strict=True`."""


@dataclasses.dataclass(frozen=True)
class Materialized:
    """One place where a weight became dense: its path, the primitive, and the source line."""

    site: str
    primitive: str
    source: str

    def __str__(self) -> str:
        site = self.site or "a structured weight"
        return f"{site!r} is materialized at `{self.primitive}` ({self.source})"


Report = Callable[[Materialized], None]


def warn(place: Materialized) -> None:
    warnings.warn(f"{place}: right, but slower than a structured product.", MaterializeWarning, 2)


def refuse(place: Materialized) -> None:
    raise MaterializeError(
        f"{place}, and strict=True refuses that. Drop the rule that matches it, use a method with "
        "a shortcut there, or pass strict=False to accept the dense array."
    )
