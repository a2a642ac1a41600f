"""`Site`: one parameter, or one call boundary, and how the model uses it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("stack", "batch", "in", "out")


@dataclasses.dataclass(frozen=True)
class Site:
    """One parameter and how the model uses it.

    Attributes:
        path: keys from the root joined by "/".
        shape: of the parameter.
        dtype: its name, such as "bfloat16".
        roles: for each axis what products do with it: "in" (contracted, or looked up by index),
            "out" (kept), "batch" (experts: one product an entry), "stack" (layers of a scan, taken
            one at a time), or "" where no product reaches it.
        uses: the products it takes part in ("dot_general", "gather", ...), in order.
        groups: feature groups of a grouped convolution.
        dense: primitives at which it would be materialized.
        lookups: the model's inputs that index it, such as "tokens".
        sources: of a call boundary, the further activations there and their widths.
        reads: the parameters and other boundaries that the method here reads.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    roles: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    groups: int = 1
    dense: tuple[str, ...] = ()
    lookups: tuple[str, ...] = ()
    sources: tuple[tuple[str, int], ...] = ()
    reads: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def axes(self, *roles: str) -> tuple[int, ...]:
        """The axes with one of these roles, in order."""
        return tuple(axis for axis, role in enumerate(self.roles) if role in roles)

    def sizes(self, *roles: str) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.axes(*roles))

    @property
    def boundary(self) -> bool:
        """Whether it is a module's input or output, not a parameter: a path such as "attn:out"."""
        return self.uses == ("call",)

    @property
    def side(self) -> str:
        """Of a call boundary what follows the colon: "in", "out", "key", ..."""
        return self.path.rpartition(":")[2] if self.boundary else ""

    @property
    def linear(self) -> bool:
        """Whether products use it as a map from some axes to others."""
        return bool(self.axes("in")) and bool(self.axes("out"))

    @property
    def table(self) -> bool:
        """Whether rows of it are looked up (an embedding, tied to an output head or not)."""
        return "gather" in self.uses

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Site:
        return cls(**{name: _tuples(value) for name, value in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def listing(sites: Sequence[Site]) -> str:
    """A table of sites as text, one a line."""
    width = max((len(site.path) for site in sites), default=0)
    rows = (
        f"{site.path:<{width}}  {'x'.join(map(str, site.shape)):<16} {site.dtype:<9} "
        f"{','.join(role or '-' for role in site.roles) or '-':<20} {','.join(site.uses) or '-'}"
        for site in sites
    )
    return "\n".join(rows)
