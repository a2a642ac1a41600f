"""Prefix tuning in AdapterHub's files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jaxpeft.core.adapter import shared_site
from jaxpeft.hf.adapterhub.found import Found, at_places, one_group
from jaxpeft.hf.adapterhub.methods import hub_prefix
from jaxpeft.hf.adapterhub.options import Prefix
from jaxpeft.hf.adapterhub.piece import (
    AdapterHubFormatError,
    Context,
    Piece,
    activation,
    hub_activation,
)
from jaxpeft.hf.adapterhub.places import Place
from jaxpeft.hf.adapterhub.slots import Gates, Packed, Slot, Stacked
from jaxpeft.hf.collect import Stage
from jaxpeft.hf.files import some


def pieces(part: Prefix, context: Context) -> Iterator[Piece]:
    """The methods of a configuration, at the keys and values of attentions."""
    if part.leave_out:
        raise AdapterHubFormatError("leave_out of prefix tuning: here all layers have a prefix.")
    for location, places in context.places.attentions.items():
        for place in places if getattr(part, location, True) else ():
            yield from _at_attention(part, place, location, context)


def _at_attention(part: Prefix, place: Place, location: str, context: Context) -> Iterator[Piece]:
    shared = f"{context.name}.{location}"
    method = hub_prefix(
        part.prefix_length,
        None if part.flat else part.bottleneck_size,
        width=context.width,
        activation=activation(part.non_linearity),
        shared=shared,
        gate=part.use_gating,
        dropout=part.dropout,
        shift=context.places.keys_move,
    )
    paths = (f"{place.path}:key", f"{place.path}:value")
    slots = [*_values(part, paths, shared, context)]
    if part.use_gating:
        names = [f"{m}.prefix_tuning.prefix_gates.{context.name}" for m in place.modules()]
        slots.append(Gates(paths, tuple(names), 1 if part.shared_gating else 2))
    yield Piece(paths[0], method, tuple(slots))
    yield Piece(paths[1], method, ())


def _values(part: Prefix, paths: tuple[str, str], shared: str, context: Context) -> Iterator[Slot]:
    """Where keys and values are: in the model, and again in each of its attentions."""
    attentions = [p for places in context.places.attentions.values() for p in places]
    pools = [f"{module}.prefix_tuning.pool." for p in attentions for module in p.modules()]
    roots = [f"{at}prefix_tunings.{shared}" for at in ("prefix_tuning.", *pools)]

    def packed(leaf: str, end: str, form: str) -> Packed:
        names = tuple(f"{root}.{end}" for root in roots)
        return Packed(((paths[0], leaf), (paths[1], leaf)), names, form)

    def common(leaf: str, end: str, form: str = "") -> Stacked:
        copies = tuple((f"{roots[0]}.{end}", f"{root}.{end}") for root in roots[1:])
        site = shared_site(shared).path
        return Stacked(site, leaf, (f"{roots[0]}.{end}",), form, copies=copies, stacked=False)

    if part.flat:
        yield packed("prefix", "control_trans", "flat")
        return
    yield common("embedding", "wte.weight")
    yield common("down", "control_trans.0.weight", "transposed")
    yield common("down_bias", "control_trans.0.bias")
    yield packed("up", "control_trans.2.weight", "map")
    yield packed("up_bias", "control_trans.2.bias", "bias")


def parts(chosen: Mapping[str, Stage], context: Context) -> Iterator[tuple[Prefix, list[Found]]]:
    """The configuration of the methods at attentions, and where they are."""
    places = context.places.attentions
    names = ("hub_prefix", "prefix_tuning")
    found = at_places(chosen, places, lambda p: (f"{p.path}:key", f"{p.path}:value"), names)
    shift = context.places.keys_move
    together = one_group(found, lambda one: _options(one, shift), "prefix tuning")
    if not together:
        return
    used = {one.option for one in together}
    required = {name for name in places if name not in ("encoder_prefix", "cross_prefix")}
    if not required <= used:
        raise AdapterHubFormatError(f"prefix tuning without {some(required - used)}.")
    options = _options(together[0], shift)
    for name in {"encoder_prefix", "cross_prefix"} & places.keys():
        options[name] = name in used
    yield Prefix(**options), together


def _options(found: Found, shift: bool) -> dict[str, Any]:
    """What the library calls a method's options; `shift` is what it does with positions."""
    options = found.options
    if options["shift"] != shift:
        raise AdapterHubFormatError(
            f"a prefix with shift={options['shift']}: in the library it has shift={shift} in this "
            "model."
        )
    if found.method.name == "prefix_tuning":
        if options["place"] not in ("", "beside") or options["names"]:
            raise AdapterHubFormatError(f"a prefix with {options}: here it is beside the sequence.")
        options = options | {"hidden": None, "dropout": 0.0}
    flat = options["hidden"] is None
    own = {
        "bottleneck_size": options["hidden"],
        "non_linearity": hub_activation(options.get("activation", "tanh")),
    }
    return {
        "prefix_length": options["tokens"],
        "flat": flat,
        "dropout": options["dropout"],
        "use_gating": options["gate"],
        "shared_gating": not options["gate"],
        **({} if flat else own),
    }
