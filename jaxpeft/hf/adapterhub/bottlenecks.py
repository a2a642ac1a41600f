"""Bottleneck adapters, Compacter and invertible adapters in AdapterHub's files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jaxpeft.core.adapter import shared_site
from jaxpeft.core.method import Method
from jaxpeft.hf.adapterhub.forms import form_of
from jaxpeft.hf.adapterhub.methods import somewhere, uneven_bottleneck
from jaxpeft.hf.adapterhub.options import Bottleneck
from jaxpeft.hf.adapterhub.piece import (
    AdapterHubFormatError,
    Context,
    Piece,
    activation,
    added,
    at,
)
from jaxpeft.hf.adapterhub.places import Place
from jaxpeft.hf.adapterhub.slots import Slot, Stacked
from jaxpeft.methods.bottleneck import bottleneck
from jaxpeft.methods.invertible import invertible
from jaxpeft.methods.phm import Phm, phm

INITS = {"bert": "bert", "mam_adapter": "mam", "houlsby": "houlsby"}


def pieces(part: Bottleneck, context: Context) -> Iterator[Piece]:
    """The methods of a configuration, at the sublayers and behind the embeddings."""
    for option, places in context.places.sublayers.items():
        for place in places if getattr(part, option) else ():
            if not any(place.layers(part.leave_out)):
                continue
            yield _at_sublayer(part, place, context)
    if part.inv_adapter:
        yield _invertible(part, context)


def _at_sublayer(part: Bottleneck, place: Place, context: Context) -> Piece:
    form = form_of(part, bool(place.norm))
    if form is None:
        raise AdapterHubFormatError(
            f"original_ln_before={part.original_ln_before}, original_ln_after="
            f"{part.original_ln_after}, residual_before_ln={part.residual_before_ln!r} and "
            f"is_parallel={part.is_parallel} together leave out the model's own residual, or mean "
            "nothing in this model."
        )
    layers = place.layers(part.leave_out)
    factors = [part.factor(place.first + i) if on else 0 for i, on in enumerate(layers)]
    widths = [max(1, int(context.width // factor)) if factor else 0 for factor in factors]
    path = f"{place.norm}:out" if form.side == "norm" else f"{place.path}:delta"
    options: dict[str, Any] = {
        "activation": activation(part.non_linearity),
        "reads": form.reads,
        "residual": form.residual if len(form.residual) > 1 else next(iter(form.residual)),
        "scale": part.scaling,
        "gate": "sequence" if part.use_gating else None,
        "norm_in": part.ln_before,
        "norm_out": _norm_out(part),
        "bias": part.phm_bias if part.phm_layer else True,
        "dropout": part.dropout,
        "stochastic_depth": 0.0 if part.is_parallel else part.stochastic_depth,
        "phm": _phm(part, context) if part.phm_layer else None,
        "init": "bert" if part.phm_layer else INITS.get(part.init_weights, "bert"),
    }
    method: Method
    if isinstance(part.reduction_factor, dict):
        method = uneven_bottleneck(widths, **options)
    else:
        method = somewhere(bottleneck(reduction=part.reduction_factor, **options), layers)
    modules = added(place.modules(), layers, f"adapters.{context.name}")
    return Piece(path, method, tuple(_slots(part, path, modules, widths, context.name)))


def _norm_out(part: Bottleneck) -> str | None:
    if not part.ln_after:
        return None
    return "result" if part.adapter_residual_before_ln and not part.is_parallel else "update"


def _phm(part: Bottleneck, context: Context) -> Phm:
    if isinstance(part.reduction_factor, dict):
        raise AdapterHubFormatError("phm_layer with a reduction_factor for each layer.")
    if part.shared_W_phm and not part.shared_phm_rule:
        raise AdapterHubFormatError("shared_W_phm without shared_phm_rule.")
    width = max(1, int(context.width // part.reduction_factor))
    return phm(
        part.phm_dim,
        rank=part.phm_rank if part.factorized_phm_W else None,
        rule_rank=1 if part.factorized_phm_rule else None,
        shared=context.name if part.shared_phm_rule else None,
        sizes=(context.width, width) if part.shared_W_phm else None,
        learn_rule=part.learn_phm,
        spread=part.phm_init_range,
    )


def _slots(
    part: Bottleneck, path: str, modules: Sequence[str], widths: Sequence[int], name: str
) -> Iterator[Slot]:
    uneven = tuple(w for w in widths if w) if isinstance(part.reduction_factor, dict) else ()
    down = f"adapter_down.{int(part.ln_before)}"
    if part.phm_layer:
        yield from _phm_slots(part, path, modules, down, name)
    else:
        yield Stacked(path, "down", at(modules, f"{down}.weight"), rows=uneven)
        yield Stacked(path, "down_bias", at(modules, f"{down}.bias"), rows=uneven)
        yield Stacked(path, "up", at(modules, "adapter_up.weight"), "transposed", uneven)
        yield Stacked(path, "up_bias", at(modules, "adapter_up.bias"))
    if isinstance(part.scaling, str):
        form = "" if part.scaling == "channel" else "row"
        yield Stacked(path, "scale", at(modules, "scaling"), form)
    if part.use_gating:
        yield Stacked(path, "gate", at(modules, "gate.weight"), "row")
        yield Stacked(path, "gate_bias", at(modules, "gate.bias"), "row")
    for ours, theirs in (("scale", "weight"), ("bias", "bias")):
        if part.ln_before:
            copies = ((f"adapter_norm_before.{theirs}", f"adapter_down.0.{theirs}"),)
            names = at(modules, f"adapter_norm_before.{theirs}")
            yield Stacked(path, f"norm_in_{ours}", names, copies=copies)
        if part.ln_after:
            yield Stacked(path, f"norm_out_{ours}", at(modules, f"adapter_norm_after.{theirs}"))


def _phm_slots(
    part: Bottleneck, path: str, modules: Sequence[str], down: str, name: str
) -> Iterator[Slot]:
    halves = ("_left", "_right")
    weights = halves if part.factorized_phm_W else ("",)
    rules = halves if part.factorized_phm_rule else ("",)
    common, stored = shared_site(name).path, f"shared_parameters.{name}"
    for ours, theirs in (("down", down), ("up", "adapter_up")):
        for half in weights:
            if part.shared_W_phm:
                names = (f"{stored}.W_{ours}{half}",)
                yield Stacked(common, f"{ours}{half}", names, stacked=False)
            else:
                yield Stacked(path, f"{ours}{half}", at(modules, f"{theirs}.W{half}"))
        if part.phm_bias:
            yield Stacked(path, f"{ours}_bias", at(modules, f"{theirs}.b"))
        for half in () if part.shared_phm_rule else rules:
            yield Stacked(path, f"{ours}_rule{half}", at(modules, f"{theirs}.phm_rule{half}"))
    for half in rules if part.shared_phm_rule else ():
        yield Stacked(common, f"rule{half}", (f"{stored}.phm_rule{half}",), stacked=False)


def _invertible(part: Bottleneck, context: Context) -> Piece:
    if part.inv_adapter != "nice":
        raise AdapterHubFormatError(
            f"inv_adapter={part.inv_adapter!r}, which the library saves but cannot run, so that "
            "nobody knows its result. 'nice' is read; a new adapter with scales is made with "
            f"jp.invertible({context.width}, coupling='affine')."
        )
    name, place = context.name, context.places.embeddings
    method = invertible(
        context.width,
        reduction=part.inv_adapter_reduction_factor or 2,
        activation=activation(part.non_linearity),
        shared=f"{name}.invertible",
        init="bert",
    )
    path = f"{place.path}:out"
    if context.places.first_input:
        path = f"{place.path}:in"
        method = somewhere(method, [layer == 0 for layer in range(place.depth)])
    at_shared = shared_site(f"{name}.invertible").path
    module = f"{place.module}invertible_adapters.{name}"
    slots = [
        Stacked(at_shared, f"{net}/{leaf}", (f"{module}.{net.upper()}.{tensor}",), form,
                stacked=False)
        for net in "fg"
        for leaf, tensor, form in (
            ("down", "0.weight", ""), ("down_bias", "0.bias", ""),
            ("up", "2.weight", "transposed"), ("up_bias", "2.bias", ""),
        )
    ]  # fmt: skip
    return Piece(path, method, tuple(slots))
