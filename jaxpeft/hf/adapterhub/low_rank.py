"""LoRA and (IA)^3 in AdapterHub's files."""

from __future__ import annotations

from collections.abc import Iterator

from jaxpeft.hf import methods
from jaxpeft.hf.adapterhub.methods import gated_ia3, in_layers
from jaxpeft.hf.adapterhub.options import LowRank
from jaxpeft.hf.adapterhub.piece import AdapterHubFormatError, Context, Piece, added, at
from jaxpeft.hf.adapterhub.places import Place
from jaxpeft.hf.adapterhub.slots import Stacked
from jaxpeft.methods.bottleneck import bottleneck
from jaxpeft.methods.ia3 import ia3


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
            yield (_gated if part.use_gating else at_linear)(part, place, context)


def _modules(part: LowRank, place: Place, context: Context) -> tuple[list[bool], list[str]]:
    layers = place.layers(part.leave_out)
    return layers, added(place.modules(), layers, f"loras.{context.name}")


def _low_rank(part: LowRank, place: Place, context: Context) -> Piece:
    layers, modules = _modules(part, place, context)
    ranks = [part.r if on else 0 for on in layers]
    method = methods.lora_by_layer(ranks, [part.alpha] * len(ranks), dropout=part.dropout)
    path = f"{place.path}/kernel"
    a = Stacked(path, "a", at(modules, "lora_A"))
    return Piece(path, method, (a, Stacked(path, "b", at(modules, "lora_B"), "transposed")))


def _scale(part: LowRank, place: Place, context: Context) -> Piece:
    layers, modules = _modules(part, place, context)
    path = f"{place.path}:out"
    vector = Stacked(path, "l", at(modules, "lora_B"), "column")
    return Piece(path, in_layers(ia3("activations"), layers), (vector,))


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
        return Piece(path, in_layers(gated_ia3(), layers), tuple(slots))
    slots.append(Stacked(path, "down", at(modules, "lora_A")))
    slots.append(Stacked(path, "up", at(modules, "lora_B"), "transposed"))
    method = bottleneck(
        part.r, activation="identity", reads="input", residual="x", gate="sequence", bias=False,
        dropout=part.dropout, init="mam",
    )  # fmt: skip
    return Piece(path, in_layers(method, layers), tuple(slots))
