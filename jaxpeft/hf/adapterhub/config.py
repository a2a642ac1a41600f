"""`adapter_config.json` of AdapterHub's library `adapters`: what it says, checked, and its options.

An adapter has one part, or several in a union; each is one of the classes of
`adapterhub_options`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxpeft.hf.adapterhub.options import (
    Bottleneck,
    Fusion,
    LowRank,
    Part,
    Prefix,
    Prompt,
    Reft,
)
from jaxpeft.hf.checks import (
    COUNT,
    FLAG,
    NUMBER,
    SHARE,
    Check,
    check_option,
    check_options,
    is_indices,
    is_int,
    is_number,
)
from jaxpeft.hf.files import read_json, some

CONFIG = "adapter_config.json"

# The version of the library whose format is written.
VERSION = "adapters.1.3.0"


_KINDS: dict[str | None, type[Part]] = {
    None: Bottleneck,
    "prefix_tuning": Prefix,
    "prompt_tuning": Prompt,
    "lora": LowRank,
    "reft": Reft,
}

# Options of former versions of the library that it passes over.
_FORMER = {
    "attention_type",
    "new_attention_norm",
    "invertible_adapter",
    "invertible_adapter_config",
}
# What the library called activations before its files told their version.
_FORMER_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
# Of reduction factors: no adapter is a thousand times as wide as its model.
_SMALLEST = 1e-3
# The version that corrected the scale of LoRA.
_SCALED = (1, 1)


class Config(NamedTuple):
    """An `adapter_config.json`.

    Attributes:
        name: of the adapter, a part of the names of its tensors.
        parts: its methods; more than one in a union.
        model_type: of the model that it is for.
        hidden_size: of that model.
        fused: of a fusion, the names of the adapters that it fuses.
        text_task: whether it is a task adapter of an early version, whose invertible adapter, which
            every configuration had, was neither used nor saved.
    """

    name: str
    parts: tuple[Part, ...]
    model_type: str
    hidden_size: int | None
    fused: tuple[str, ...] = ()
    text_task: bool = False


def changed(config: Config, kind: type[Part], options: Mapping[str, Any]) -> Config:
    """The configuration with other options in its parts of a kind."""
    parts = (dataclasses.replace(p, **options) if type(p) is kind else p for p in config.parts)
    return config._replace(parts=tuple(parts))


def read_config(path: Path) -> Config:
    """The configuration of an adapter, or of a fusion.

    Args:
        path: an `adapter_config.json`, or an `adapter_fusion_config.json`.

    Returns:
        The configuration, with what former versions wrote put in today's terms.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or has a method or an option that is not known. No option is
            passed over.
    """
    values = read_json(path)
    check_options(path, values, _TOP)
    given, version = values.get("config"), values.get("version") or ""
    name = values.get("name")
    if not isinstance(given, dict) or not isinstance(name, str):
        raise ValueError(
            f"{path} has no `config` object and `name`: it was not written by `adapters`. "
            "Adapters of PEFT are read with jaxpeft.hf.load_adapter."
        )
    fused = tuple(values.get("adapter_names") or ())
    union = given.get("architecture") == "union"
    listed = given.get("configs", []) if union else [given]
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise ValueError(f"{path}: `configs` must be a list of objects, not {listed!r}.")
    parts = tuple(_part(_renewed(one, version), bool(fused), path) for one in listed)
    return Config(
        name, parts, str(values.get("model_type")), values.get("hidden_size"), fused,
        values.get("type") == "text_task",
    )  # fmt: skip


def to_json(config: Config, **more: Any) -> dict[str, Any]:
    """The dictionary of a file, as the library writes it.

    Args:
        config: what it says.
        **more: further keys at its top, such as `model_class` and `model_name`.

    Returns:
        Values for `jaxpeft.hf.files.write_json`.

    Example:
        >>> to_json(Config("a", (Prompt(),), "bert", 16))["config"]["prompt_length"]
        10
    """
    parts = [_values(part) for part in config.parts]
    union = {"architecture": "union", "configs": parts}
    return {
        "config": parts[0] if len(parts) == 1 else union,
        "hidden_size": config.hidden_size,
        "model_type": config.model_type,
        "name": config.name,
        "version": VERSION,
        **({"adapter_names": list(config.fused)} if config.fused else {}),
        **more,
    }


def _values(part: Part) -> dict[str, Any]:
    values = dataclasses.asdict(part)
    values.pop("subtract_projection", None)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _renewed(given: Mapping[str, Any], version: str) -> dict[str, Any]:
    """The options of a former version, in today's terms."""
    values = dict(given)
    if not version and "non_linearity" in values:
        name = values["non_linearity"]
        values["non_linearity"] = _FORMER_ACTIVATIONS.get(name, name)
    inverse = values.get("invertible_adapter")
    if isinstance(inverse, dict):
        values["inv_adapter"] = inverse.get("block_type")
        values["inv_adapter_reduction_factor"] = inverse.get("reduction_factor")
    if _before_scale(version) and values.get("architecture") == "lora" and "r" in values:
        values["alpha"] = values["r"]
    return {name: value for name, value in values.items() if name not in _FORMER}


def _before_scale(version: str) -> bool:
    """Whether a version of the library scaled LoRA by one, whatever alpha was."""
    found = re.match(r"adapters\.(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) < _SCALED


def _part(values: Mapping[str, Any], fusion: bool, path: Path) -> Part:
    architecture = values.get("architecture")
    if not isinstance(architecture, str | None) or architecture not in _KINDS:
        known = ", ".join(str(name) for name in _KINDS if name)
        raise ValueError(
            f"{path}: the method {architecture!r} is not supported. Supported: bottleneck "
            f"adapters, {known}, and unions of these."
        )
    kind: type[Part] = Fusion if fusion else _KINDS[architecture]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    wanted = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    given = {name: value for name, value in values.items() if name in fields}
    if wanted - given.keys():
        raise ValueError(f"{path}: the options {some(wanted - given.keys())} are missing.")
    for name in sorted(values.keys() - fields.keys()):
        if name != "architecture" and values[name]:
            raise ValueError(
                f"{path}: the option {name}={values[name]!r} is not known (from a newer version?), "
                "and leaving it out could change the result."
            )
    for name, value in given.items():
        _check(name, value, str(fields[name].type), path)
    return kind(**{name: _frozen(value) for name, value in given.items()})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_folder(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and not set(value) & {*"/\\\0"}


def _is_factor(value: Any) -> bool:
    if not isinstance(value, dict):
        return is_number(value) and value >= _SMALLEST
    named = all(name == "default" or name.isdigit() for name in value)
    return named and all(is_number(factor) and factor >= _SMALLEST for factor in value.values())


# By name, where the type of a field does not say all.
_NAMED: dict[str, Check] = {
    "reduction_factor": (
        _is_factor,
        f"a number of {_SMALLEST} or more, or an object of them by layer",
    ),
    "scaling": (lambda v: is_number(v) or v in ("learned", "channel"), "a number or a known word"),
    "residual_before_ln": (lambda v: isinstance(v, bool) or v == "post_add", "a known choice"),
    "inv_adapter": (lambda v: v in (None, "nice", "glow"), "null, 'nice' or 'glow'"),
    "layers": (lambda v: v == "all" or is_indices(v), "'all' or a list of layers"),
    "combine": (lambda v: v in ("prefix", "prefix_after_bos"), "'prefix' or 'prefix_after_bos'"),
    "composition_mode": (lambda v: v in ("add", "scale"), "'add' or 'scale'"),
    "attn_matrices": (
        lambda v: isinstance(v, list) and all(name in ("q", "k", "v", "o") for name in v),
        "a list of 'q', 'k', 'v' and 'o'",
    ),
    "dropout": SHARE,
    "stochastic_depth": SHARE,
    **dict.fromkeys(
        ("r", "phm_dim", "phm_rank", "prefix_length", "prompt_length", "bottleneck_size"),
        COUNT,
    ),
    **dict.fromkeys(
        ("prefix_positions", "suffix_positions"),
        (lambda v: is_int(v) and v >= 0, "an integer of 0 or more"),
    ),
}
_TOP: dict[str, Check] = {
    "version": (lambda v: isinstance(v, str), "a string"),
    "adapter_names": (
        lambda v: isinstance(v, list) and all(map(_is_folder, v)),
        "a list of names, which are those of folders",
    ),
}
_TYPED: dict[str, Check] = {
    "bool": FLAG,
    "str": (lambda v: isinstance(v, str), "a string"),
    "float": NUMBER,
    "int": (is_int, "an integer"),
    "tuple[int, ...]": (is_indices, "a list of layers"),
}


def _check(name: str, value: Any, kind: str, path: Path) -> None:
    if value is None and (kind.endswith("| None") or name == "inv_adapter"):
        return
    check_option(path, name, value, _NAMED.get(name) or _TYPED[kind.removesuffix(" | None")])
