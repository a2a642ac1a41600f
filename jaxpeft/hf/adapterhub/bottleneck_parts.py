"""From bottleneck adapters here to AdapterHub's options for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxpeft.hf.adapterhub.forms import Form, flags_of
from jaxpeft.hf.adapterhub.found import Found, at_places, groups, left_out
from jaxpeft.hf.adapterhub.options import Bottleneck
from jaxpeft.hf.adapterhub.piece import AdapterHubFormatError, Context, hub_activation
from jaxpeft.hf.adapterhub.places import Place
from jaxpeft.hf.collect import Stage
from jaxpeft.methods.parts import first_there

Parts = list[tuple[Bottleneck, list[Found]]]

_NORM_OUT: dict[str | None, dict[str, bool]] = {
    None: {},
    "update": {"ln_after": True},
    "result": {"ln_after": True, "adapter_residual_before_ln": True},
}


def parts(
    chosen: Mapping[str, Stage], context: Context
) -> Iterator[tuple[Bottleneck, list[Found]]]:
    """The configurations of the methods at sublayers and embeddings, and where they are.

    Sublayers whose methods have other options make a part of their own.
    """
    found = _at_sublayers(chosen, context)
    listed: Parts = []
    for together in groups(found, lambda one: [_options(one), _size(one)]):
        used = {one.option for one in together}
        part = Bottleneck(
            mh_adapter="mh_adapter" in used,
            output_adapter="output_adapter" in used,
            cross_adapter="cross_adapter" in used,
            leave_out=left_out(together, context.places.sublayers),
            reduction_factor=_factor(together, context.width),
            **_options(together[0]),
        )
        listed.append((part, together))
    yield from _with_inverse(listed, chosen, context)


def _at_sublayers(chosen: Mapping[str, Stage], context: Context) -> list[Found]:
    def paths(place: Place) -> tuple[str, str]:
        return f"{place.path}:delta", f"{place.norm}:out"

    return at_places(chosen, context.places.sublayers, paths, ("bottleneck",))


def _options(found: Found) -> dict[str, Any]:
    """What the library calls a method's options, but for its width."""
    options = found.options
    channels = options["scale"] == "channel"
    flags = flags_of(_form(found), bool(found.place.norm), channels)
    unknown = options["gate"] == "token" or not (options["bias"] or options["phm"])
    parallel = bool(flags and flags["is_parallel"])
    if flags is None or unknown or (parallel and _only_sequential(options)):
        shown = {name: options[name] for name in ("reads", "residual", "gate", "bias", "norm_out")}
        raise AdapterHubFormatError(f"a bottleneck adapter at {found.path!r} with {shown}.")
    scale = options["scale"]
    return {
        **flags,
        **_NORM_OUT[options["norm_out"]],
        **_phm(options),
        "non_linearity": hub_activation(options["activation"]),
        "ln_before": options["norm_in"],
        "scaling": scale if isinstance(scale, str) else float(scale),
        "use_gating": options["gate"] is not None,
        "dropout": options["dropout"],
        "stochastic_depth": options["stochastic_depth"],
        "init_weights": "mam_adapter" if parallel else "houlsby" if channels else "bert",
    }


def _only_sequential(options: Mapping[str, Any]) -> bool:
    return options["norm_out"] == "result" or options["stochastic_depth"] > 0


def _form(found: Found) -> Form:
    side = "delta" if found.path.endswith(":delta") else "norm"
    there = ["x", "input"] if side == "norm" else ["x", "stream", "sum", "input"]
    there += ["norm"] if found.place.norm and side == "delta" else []
    reads, residual = found.options["reads"], found.options["residual"]
    z = first_there([reads] if isinstance(reads, str) else reads, there, found.path)
    weights = {residual: 1.0} if isinstance(residual, str) else residual
    return Form(side, z, {z if name == "read" else name: w for name, w in weights.items()})


def _phm(options: Mapping[str, Any]) -> dict[str, Any]:
    given = options["phm"]
    if given is None:
        return {}
    if given["rule_rank"] not in (None, 1):
        raise AdapterHubFormatError(f"PHM rules of rank {given['rule_rank']}: here whole or of 1.")
    return {
        "phm_layer": True,
        "phm_dim": given["n"],
        "factorized_phm_W": given["rank"] is not None,
        "phm_rank": given["rank"] or 1,
        "factorized_phm_rule": given["rule_rank"] is not None,
        "shared_phm_rule": given["shared"] is not None,
        "shared_W_phm": given["sizes"] is not None,
        "learn_phm": given["learn_rule"],
        "phm_init_range": given["spread"],
        "phm_bias": options["bias"],
    }


def _size(found: Found) -> Any:
    """The width, unless layers differ in it."""
    if "widths" in found.options:
        return "by layer"
    return [found.options["reduction"], found.options["width"]]


def _factor(found: Sequence[Found], width: int) -> float | dict[str, float]:
    """The reduction factor, or that of each layer."""
    options = found[0].options
    if "widths" not in options:
        return options["reduction"] or _ratio(width, options["width"])
    factors: dict[str, float] = {}
    for one in found:
        for layer, inner in enumerate(one.options["widths"]):
            factor = _ratio(width, inner) if inner else None
            name = str(one.place.first + layer)
            if factor and factors.setdefault(name, factor) != factor:
                raise AdapterHubFormatError(f"layer {name} with bottlenecks of several widths.")
    return factors


def _ratio(width: int, inner: int) -> float:
    """The factor that the library makes this inner width of."""
    factor = width // inner if width % inner == 0 else width / inner
    return factor if int(width // factor) == inner else width / (inner + 0.5)


def _with_inverse(listed: Parts, chosen: Mapping[str, Stage], context: Context) -> Parts:
    """With the invertible adapter, which the library gives the activation of a part."""
    place = {"": (context.places.embeddings,)}
    paths = (":in",) if context.places.first_input else (":out",)
    found = at_places(chosen, place, lambda p: [p.path + end for end in paths], ("invertible",))
    if not found:
        return listed
    options = found[0].options
    if options["coupling"] != "additive" or options["inverse"]:
        shown = {name: options[name] for name in ("coupling", "inverse")}
        raise AdapterHubFormatError(
            f"an invertible adapter with {shown}; the library runs coupling='additive' there only. "
            "jp.save writes every form."
        )
    act = hub_activation(options["activation"])
    own = {"inv_adapter": "nice", "inv_adapter_reduction_factor": options["reduction"]}
    if not listed:
        return [(Bottleneck(False, False, 16, act, **own), found)]
    for i, (part, together) in enumerate(listed):
        if part.non_linearity == act:
            listed[i] = (dataclasses.replace(part, **own), together + found)
            return listed
    raise AdapterHubFormatError("an invertible adapter whose activation no bottleneck has.")
