"""What an adapter does to each torch module."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpeft.core.adapter import is_shared
from jaxpeft.core.method import resolve
from jaxpeft.core.transform import Adapter, Tuned
from jaxpeft.hf.files import some
from jaxpeft.hf.table import Row, Table
from jaxpeft.hf.tensors import torch_axes
from jaxpeft.methods.layers import OPTION, selected


class PeftFormatError(ValueError):
    """An adapter that PEFT's LoRA format cannot express; `jaxpeft.save` can store it."""

    def __init__(self, problem: str):
        super().__init__(
            f"PEFT's LoRA format cannot express this adapter: {problem} "
            "Use jaxpeft.save(path, adapter, tuned), which stores any adapter."
        )


class Stage(NamedTuple):
    """One method at one site: its name, options and leaves."""

    name: str
    options: Mapping[str, Any]
    leaves: Mapping[str, Any]


class Pair(NamedTuple):
    """LoRA at one torch module; `a` is (rank, in), `b` is (out, rank)."""

    row: Row
    a: np.ndarray
    b: np.ndarray
    alpha: float
    rslora: bool
    dropout: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclasses.dataclass
class Found:
    """What an adapter does, by torch module."""

    pairs: dict[str, Pair] = dataclasses.field(default_factory=dict)
    full: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    lora_bias: dict[str, tuple[np.ndarray, float]] = dataclasses.field(default_factory=dict)
    tokens: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def stages_at(tuned: Tuned, adapter: Adapter) -> dict[str, list[Stage]]:
    own = [site for site in adapter.sites if not is_shared(site)]
    chosen = resolve(tuned.tuning, own, tuned.head, whole=False)
    return {
        path: stages_of(chosen[path].name, chosen[path].options, leaves)
        for path, leaves in adapter.items()
        if path in chosen
    }


def collect(stages: Mapping[str, Sequence[Stage]], table: Table) -> Found:
    found = Found()
    for path, at_path in stages.items():
        foreign = next((stage.name for stage in at_path if stage.name not in _ADD), None)
        if foreign:
            raise PeftFormatError(f"{path!r} is tuned with {foreign!r}, not with LoRA.")
        if path not in table.rows:
            raise ValueError(f"names has no torch module for {path!r}, which the adapter tunes.")
        row = table.rows[path]
        _check_site(row)
        for stage in at_path:
            _ADD[stage.name](stage, row, found)
    return found


def stages_of(name: str, options: Mapping[str, Any], leaves: Mapping[str, Any]) -> list[Stage]:
    """The methods of a chain at one site, or the only one."""
    if not options or not all(number.isdigit() for number in options):
        return [Stage(name, options, leaves)]
    names = name.split("+")
    if len(names) != len(options):
        raise PeftFormatError(f"{name!r} is a chain of chains.")
    pairs = zip(names, options, strict=True)
    return [Stage(part, options[number], leaves[number]) for part, number in pairs]


def _check_site(row: Row) -> None:
    if row.site.axes("batch") or (row.site.axes("stack") and not row.stacked):
        raise PeftFormatError(
            f"{row.path!r} (roles {row.site.roles}) holds more than {row.tensor!r} can."
        )
    if any("conv" in use for use in row.site.uses):
        raise PeftFormatError(f"{row.path!r} is a convolution.")


_LORA_OPTIONS = {"rank", "alpha", "dropout", "fused", "scale", "rslora", "ranks", "alphas", OPTION}


def _add_lora(stage: Stage, row: Row, found: Found) -> None:
    options = stage.options
    if unknown := options.keys() - _LORA_OPTIONS:
        raise PeftFormatError(f"LoRA at {row.path!r} has the options {some(unknown)}.")
    if options.get("fused"):
        raise PeftFormatError(f"LoRA at {row.path!r} has pairs for fused={options['fused']}.")
    kept = selected(options.get(OPTION), len(row.modules))
    stack = (len(kept),) if row.stacked else (1,)
    a, b = (np.asarray(stage.leaves[name], np.float32) for name in ("a", "b"))
    top = a.shape[1 if row.stacked else 0]
    a, b = a.reshape(*stack, top, -1), b.reshape(*stack, top, -1)
    rslora = bool(options.get("rslora"))
    ranks = options.get("ranks", [top] * len(kept))
    alphas = options.get("alphas", [options["alpha"]] * len(kept))
    for at, module in enumerate(row.modules[layer] for layer in kept):
        rank, alpha = ranks[at], alphas[at]
        if a[at, rank:].any() or b[at, rank:].any():
            alpha = _same_scale(rank, alpha, top, options["scale"], rslora)
            rank = top
        if rank:
            if module in found.pairs:
                raise PeftFormatError(f"{row.path!r} has more than one LoRA.")
            pair = Pair(row, a[at, :rank], b[at, :rank].T, alpha, rslora, options["dropout"])
            found.pairs[module] = pair


def _same_scale(rank: int, alpha: float, top: int, otherwise: float, rslora: bool) -> float:
    """The alpha at rank `top` with the scale that `alpha` gives at `rank`."""
    size = math.sqrt if rslora else float
    return (alpha / size(rank) if rank else otherwise) * size(top)


def _add_full(stage: Stage, row: Row, found: Found) -> None:
    kept = selected(stage.options.get(OPTION), len(row.modules))
    layers = stage.options.get("layers", kept)
    values = _torch_values(stage.leaves["value"], row, len(kept))
    for at, layer in enumerate(kept):
        if layer in layers:
            found.full.setdefault(row.modules[layer], {})[row.attribute] = values[at]


def _torch_values(value: Any, row: Row, count: int) -> np.ndarray:
    axes, shape = torch_axes(row)
    ordered = np.asarray(value, np.float32).transpose(axes)
    return ordered.reshape(count, *shape)


def _add_base(stage: Stage, row: Row, found: Found) -> None:
    values = _torch_values(stage.leaves["value"], row, len(row.modules))
    for layer in stage.options.get("layers", range(len(row.modules))):
        found.tensors[f"{row.modules[layer]}.base_layer.weight"] = values[layer]


def _add_lora_bias(stage: Stage, row: Row, found: Found) -> None:
    values = _torch_values(stage.leaves["b"], row, len(row.modules))
    for layer, scale in enumerate(stage.options["scales"]):
        if scale:
            found.lora_bias[row.modules[layer]] = values[layer], scale


def _add_tokens(stage: Stage, row: Row, found: Found) -> None:
    module = row.modules[0]
    found.tokens[module] = list(stage.options["rows"])
    key = f"{module}.token_adapter.trainable_tokens_delta"
    found.tensors[key] = np.asarray(stage.leaves["value"], np.float32)


_ADD = {
    "lora": _add_lora,
    "full": _add_full,
    "base": _add_base,
    "lora_bias": _add_lora_bias,
    "token_rows": _add_tokens,
}
