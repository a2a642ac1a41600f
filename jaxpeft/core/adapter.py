"""`Adapter`: the trainable partition, a pytree of arrays by site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxpeft.core.method import SHARED, Leaves, Method
from jaxpeft.core.site import Site, listing


class Sites(tuple[Site, ...]):
    """The sites of an adapter. Hashed once, as it is looked at in every call of a jitted step."""

    def __hash__(self) -> int:
        if not hasattr(self, "_hash"):
            self._hash = super().__hash__()
        return self._hash

    def __str__(self) -> str:
        return listing(self)


@jax.tree_util.register_pytree_with_keys_class
class Adapter(Mapping[str, Leaves]):
    """The trainable partition: `{site path: {leaf name: array}}`, a pytree of arrays.

    What is known of each site travels along as static metadata, `adapter.sites`, so that `merge`
    and files need no example inputs.
    """

    def __init__(self, leaves: Mapping[str, Leaves], sites: Sequence[Site]):
        self._leaves = dict(sorted(leaves.items()))
        self.sites = sites if isinstance(sites, Sites) else Sites(sites)

    def __getitem__(self, path: str) -> Leaves:
        return self._leaves[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)

    def __repr__(self) -> str:
        count = sum(getattr(leaf, "size", 0) for leaf in jax.tree.leaves(self))
        return f"Adapter({len(self)} sites, {count:,} parameters)"

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        keyed = [(jax.tree_util.DictKey(path), leaves) for path, leaves in self._leaves.items()]
        return keyed, (tuple(self._leaves), self.sites)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Adapter:
        paths, sites = static
        return cls(dict(zip(paths, children, strict=True)), sites)


def shared_site(name: str) -> Site:
    """The place of leaves that several sites have in common."""
    return Site(f"{SHARED}:{name}", (), "float32", uses=(SHARED,))


def is_shared(site: Site) -> bool:
    return site.uses == (SHARED,)


def shared_inits(chosen: Mapping[str, Method]) -> dict[str, Any]:
    """How the leaves that sites have in common start, by the path where they stand."""
    inits = {name: f for method in chosen.values() for name, f in method.shared.items()}
    return {shared_site(name).path: start for name, start in sorted(inits.items())}
