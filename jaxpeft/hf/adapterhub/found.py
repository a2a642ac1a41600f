"""Which of an adapter's methods are at places that AdapterHub knows, and in which layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxpeft.core.adapter import Adapter, is_shared
from jaxpeft.core.transform import Tuned
from jaxpeft.hf.adapterhub.piece import AdapterHubFormatError
from jaxpeft.hf.adapterhub.places import Place
from jaxpeft.hf.collect import Stage, stages_at
from jaxpeft.methods.layers import OPTION, selected


class Found(NamedTuple):
    """A method at a place.

    Attributes:
        option: that puts something there, such as "mh_adapter".
        place: where it is.
        method: what is there.
        path: of its site.
        options: of the method, without those that name layers.
        layers: for each layer whether it is there.
    """

    option: str
    place: Place
    method: Stage
    path: str
    options: dict[str, Any]
    layers: list[bool]


def alone(tuned: Tuned, adapter: Adapter) -> tuple[dict[str, Stage], Adapter]:
    """The method at each site, and the adapter with its leaves.

    Raises:
        AdapterHubFormatError: if there are several at one.
    """
    stages = stages_at(tuned, adapter)
    for path, found in stages.items():
        if len(found) > 1:
            names = " and ".join(repr(stage.name) for stage in found)
            raise AdapterHubFormatError(f"{names} one after the other at {path!r}.")
    leaves = {path: dict(found[0].leaves) for path, found in stages.items()}
    leaves |= {site.path: adapter[site.path] for site in adapter.sites if is_shared(site)}
    chosen = {path: found[0] for path, found in stages.items()}
    return chosen, Adapter(leaves, adapter.sites)


def shared_name(stage: Stage) -> str | None:
    """The name of the leaves that a method has in common with other sites."""
    options = stage.options
    if stage.name == "bottleneck":
        return options["phm"]["shared"] if options["phm"] else None
    if stage.name == "hub_prefix" and options["hidden"] is None:
        return None
    return options.get("shared")


def at_places(
    chosen: Mapping[str, Stage],
    places: Mapping[str, Sequence[Place]],
    paths: Callable[[Place], Sequence[str]],
    names: Sequence[str],
) -> list[Found]:
    """The methods with these names at places.

    Args:
        chosen: the methods by path.
        places: by option.
        paths: of the sites of a place.
        names: of methods.
    """
    found = []
    for option, wanted in places.items():
        for place in wanted:
            for path in paths(place):
                method = chosen.get(path)
                if method is not None and method.name in names:
                    options = dict(method.options)
                    kept = selected(options.pop(OPTION, None), place.depth)
                    layers = [layer in kept for layer in range(place.depth)]
                    found.append(Found(option, place, method, path, options, layers))
    return found


def groups(found: Sequence[Found], key: Callable[[Found], Any]) -> list[list[Found]]:
    """Those with equal keys together, keys being JSON values."""
    by_key: dict[str, list[Found]] = {}
    for one in found:
        by_key.setdefault(json.dumps(key(one), sort_keys=True), []).append(one)
    return list(by_key.values())


def left_out(found: Sequence[Found], places: Mapping[str, Sequence[Place]]) -> tuple[int, ...]:
    """The library's numbers of the layers that have nothing at the options that are used.

    Raises:
        AdapterHubFormatError: if a layer has something at one of them alone.
    """
    used = {one.option for one in found}
    off: dict[str, set[int]] = {option: set() for option in used}
    ids: dict[str, set[int]] = {option: set() for option in used}
    for option in used:
        for place in places[option]:
            here = next((o for o in found if (o.option, o.place) == (option, place)), None)
            layers = here.layers if here else [False] * place.depth
            ids[option] |= {place.first + i for i in range(place.depth)}
            off[option] |= {place.first + i for i, on in enumerate(layers) if not on}
    out = set().union(*off.values()) if off else set()
    for option in used:
        if off[option] != out & ids[option]:
            raise AdapterHubFormatError(
                f"layers {sorted(out)} are left out in some places but not at {option!r}: in these "
                "files they are left out everywhere."
            )
    return tuple(sorted(out))


def one_group(found: Sequence[Found], key: Callable[[Found], Any], what: str) -> list[Found]:
    """All of them, which must have one key."""
    together = groups(found, key)
    if len(together) > 1:
        paths = [group[0].path for group in together[:2]]
        raise AdapterHubFormatError(
            f"{what} has other options at {paths[0]!r} than at {paths[1]!r}: in these files they "
            "are the same everywhere."
        )
    return together[0] if together else []
