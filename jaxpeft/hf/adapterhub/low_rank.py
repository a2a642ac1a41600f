"""LoRA and (IA)^3 in AdapterHub's files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jaxpeft.hf.adapterhub.found import Found, at_places, left_out, one_group
from jaxpeft.hf.adapterhub.methods import gated_ia3, somewhere
from jaxpeft.hf.adapterhub.options import LowRank
from jaxpeft.hf.adapterhub.piece import AdapterHubFormatError, Context, Piece, added, at
from jaxpeft.hf.adapterhub.places import Place
from jaxpeft.hf.adapterhub.slots import Stacked
from jaxpeft.hf.collect import Stage
from jaxpeft.methods.bottleneck import bottleneck
from jaxpeft.methods.ia3 import ia3
from jaxpeft.methods.lora import lora

# LoRA with a gate, as a bottleneck adapter beside the map.
_GATED: dict[str, Any] = {
    "activation": "identity", "reads": "input", "residual": "x", "gate": "sequence", "bias": False,
}  # fmt: skip


def pieces(part: LowRank, context: Context) -> Iterator[Piece]:
    """The methods of a configuration, at linear maps."""
    if part.use_dora or part.vera_d is not None or part.vera_b is not None:
        raise AdapterHubFormatError("use_dora and vera_*, which the library does as nobody else.")
    if part.composition_mode == "scale" and (part.r, part.alpha) != (1, 1):
        raise AdapterHubFormatError(f"(IA)^3 with r={part.r} and alpha={part.alpha}, not 1.")
    on = {
        **{name: part.selfattn_lora and name in part.attn_matrices for name in "qkv"},
        "intermediate": part.intermediate_lora,
        "output": part.output_lora,
    }
    at_linear = _scale if part.composition_mode == "scale" else _low_rank
    for name, places in context.places.linears.items():
        for place in places if on[name] else ():
            if not any(place.layers(part.leave_out)):
                continue
            yield (_gated if part.use_gating else at_linear)(part, place, context)


def _modules(part: LowRank, place: Place, context: Context) -> tuple[list[bool], list[str]]:
    layers = place.layers(part.leave_out)
    return layers, added(place.modules(), layers, f"loras.{context.name}")


def _low_rank(part: LowRank, place: Place, context: Context) -> Piece:
    layers, modules = _modules(part, place, context)
    method = somewhere(lora(part.r, part.alpha, dropout=part.dropout), layers)
    path = f"{place.path}/kernel"
    a = Stacked(path, "a", at(modules, "lora_A"))
    return Piece(path, method, (a, Stacked(path, "b", at(modules, "lora_B"), "transposed")))


def _scale(part: LowRank, place: Place, context: Context) -> Piece:
    layers, modules = _modules(part, place, context)
    path = f"{place.path}:out"
    vector = Stacked(path, "l", at(modules, "lora_B"), "column")
    return Piece(path, somewhere(ia3("activations"), layers), (vector,))


def _gated(part: LowRank, place: Place, context: Context) -> Piece:
    """With a gate, which the library puts in the place of LoRA's scale."""
    layers, modules = _modules(part, place, context)
    path = f"{place.path}:out"
    slots = [
        Stacked(path, "gate", at(modules, "gate.weight"), "row"),
        Stacked(path, "gate_bias", at(modules, "gate.bias"), "row"),
    ]
    if part.composition_mode == "scale":
        slots.append(Stacked(path, "l", at(modules, "lora_B"), "column"))
        return Piece(path, somewhere(gated_ia3(), layers), tuple(slots))
    slots.append(Stacked(path, "down", at(modules, "lora_A")))
    slots.append(Stacked(path, "up", at(modules, "lora_B"), "transposed"))
    method = bottleneck(part.r, dropout=part.dropout, init="mam", **_GATED)
    return Piece(path, somewhere(method, layers), tuple(slots))


_NAMES = ("lora", "ia3", "gated_ia3", "bottleneck")


def parts(chosen: Mapping[str, Stage], context: Context) -> Iterator[tuple[LowRank, list[Found]]]:
    """The configuration of the methods at linear maps, and where they are."""
    places = context.places.linears
    found = at_places(chosen, places, lambda p: (f"{p.path}/kernel", f"{p.path}:out"), _NAMES)
    together = one_group(found, _options, "LoRA")
    if not together:
        return
    used = {one.option for one in together}
    yield (
        LowRank(
            selfattn_lora=bool(used & set("qkv")),
            intermediate_lora="intermediate" in used,
            output_lora="output" in used,
            attn_matrices=tuple(name for name in "qkv" if name in used),
            leave_out=left_out(together, places),
            **_options(together[0]),
        ),
        together,
    )


def _options(found: Found) -> dict[str, Any]:
    """What the library calls a method's options."""
    options, name = found.options, found.method.name
    if name == "gated_ia3" or (name == "ia3" and options["on"] == "activations"):
        return {
            "r": 1, "alpha": 1, "composition_mode": "scale", "init_weights": "ia3",
            "use_gating": name == "gated_ia3",
        }  # fmt: skip
    if name == "lora" and not options["fused"]:
        rank = _rank(found)
        alpha = options["scale"] * rank if options.get("rslora") else options["alpha"]
        return {"r": rank, "alpha": alpha, "dropout": options["dropout"]}
    gated = dict(bottleneck(1, **_GATED).options)
    if name == "bottleneck" and options | {"width": 1, "dropout": 0.0} == gated:
        rank = options["width"]
        return {"r": rank, "alpha": rank, "dropout": options["dropout"], "use_gating": True}
    raise AdapterHubFormatError(f"{name!r} at {found.path!r} with the options {options}.")


def _rank(found: Found) -> int:
    """The rank, which all layers with LoRA have in common."""
    if "ranks" in found.options:
        raise AdapterHubFormatError(f"LoRA of several ranks or alphas at {found.path!r}.")
    return int(found.options["rank"])
