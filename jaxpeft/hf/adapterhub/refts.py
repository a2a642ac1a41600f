"""Representation fine-tuning in AdapterHub's files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxpeft.hf.adapterhub.found import Found, at_places, one_group
from jaxpeft.hf.adapterhub.methods import somewhere
from jaxpeft.hf.adapterhub.options import Reft
from jaxpeft.hf.adapterhub.piece import (
    AdapterHubFormatError,
    Context,
    Piece,
    activation,
    added,
    at,
    hub_activation,
)
from jaxpeft.hf.adapterhub.slots import Rotation, Slot, Stacked, Unused
from jaxpeft.hf.collect import Stage
from jaxpeft.methods.reft import direft, loreft, noreft


def pieces(part: Reft, context: Context) -> Iterator[Piece]:
    """The methods of a configuration, at the outputs of layers."""
    if part.orthogonality and not part.subtract_projection:
        raise AdapterHubFormatError("orthogonality without subtract_projection.")
    subtracting = loreft if part.orthogonality else noreft
    method = (subtracting if part.subtract_projection else direft)(
        part.r,
        first=part.prefix_positions,
        last=part.suffix_positions,
        tied=part.tied_weights,
        activation=activation(part.non_linearity or "linear"),
        dropout=part.dropout,
        init="uniform",
    )
    for place in context.places.blocks:
        ids = range(place.first, place.first + place.depth)
        layers = [part.layers == "all" or i in part.layers for i in ids]
        if not any(layers):
            continue
        path = f"{place.path}:out"
        modules = added(place.modules(), layers, f"reft_layer.refts.{context.name}")
        yield Piece(path, somewhere(method, layers), tuple(_slots(part, path, modules)))


def _slots(part: Reft, path: str, modules: Sequence[str]) -> Iterator[Slot]:
    """A unit for the first positions and one for the last, both there even if one has no use."""
    used = {"first": part.prefix_positions > 0, "last": part.suffix_positions > 0}
    if part.tied_weights:
        yield from _unit(part, path, "first", modules, 0)
        return
    other = next(end for end, there in used.items() if there)
    for i, (end, there) in enumerate(used.items()):
        for slot in _unit(part, path, end if there else other, modules, i):
            yield slot if there else Unused(slot)


def _unit(part: Reft, path: str, end: str, modules: Sequence[str], i: int) -> Iterator[Slot]:
    yield Stacked(path, f"{end}/source", at(modules, f"units.{i}.learned_source.weight"))
    yield Stacked(path, f"{end}/bias", at(modules, f"units.{i}.learned_source.bias"))
    projection = f"units.{i}.projection"
    if part.orthogonality:
        yield Rotation(path, f"{end}/rotation", at(modules, f"{projection}.parametrizations"))
    else:
        yield Stacked(path, f"{end}/rotation", at(modules, f"{projection}.weight"))


def parts(chosen: Mapping[str, Stage], context: Context) -> Iterator[tuple[Reft, list[Found]]]:
    """The configuration of the methods at the outputs of layers, and where they are."""
    places = {"": context.places.blocks}
    names = ("loreft", "noreft", "direft")
    found = at_places(chosen, places, lambda p: (f"{p.path}:out",), names)
    together = one_group(found, _options, "ReFT")
    if not together:
        return
    options = _options(together[0])
    on = [one.place.first + i for one in together for i, there in enumerate(one.layers) if there]
    depth = sum(place.depth for place in context.places.blocks)
    yield Reft(layers="all" if len(on) == depth else tuple(on), **options), together


def _options(found: Found) -> dict[str, Any]:
    """What the library calls a method's options."""
    options, name = found.options, found.method.name
    if options["first"] is None:
        raise AdapterHubFormatError(f"{name} at every position of {found.path!r}.")
    act = hub_activation(options["activation"])
    if name == "direft" and act != "linear":
        raise AdapterHubFormatError(
            f"a DiReFT with an activation, at {found.path!r}: the library takes the file of any "
            "DiReFT for a NoReFT, which can stand for one without."
        )
    return {
        "prefix_positions": options["first"],
        "suffix_positions": options["last"],
        "r": options["rank"],
        "orthogonality": name == "loreft",
        "tied_weights": options["tied"],
        "dropout": options["dropout"],
        "non_linearity": None if act == "linear" else act,
    }


def as_noreft(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a DiReFT for a NoReFT that does the same: `W h = (W + R) h - R h`."""
    return {end: unit | {"source": unit["source"] + unit["rotation"]}
            for end, unit in leaves.items()}  # fmt: skip
