"""`adapter_config.json` of PEFT's LoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpeft.hf.checks import (
    COUNT,
    FLAG,
    POSITIVE,
    SHARE,
    Check,
    check_option,
    is_indices,
    is_int,
    is_names,
    is_positive,
)
from jaxpeft.hf.files import read_json, some
from jaxpeft.hf.match import ALL_LINEAR, chosen, in_layers, pattern_value, saved, search

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# The version of PEFT whose format is written.
VERSION = "0.21.2"

# Every key that PEFT writes and the value that leaves it without effect.
DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": VERSION,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}

# Keys that say nothing about what the adapter computes. The four `*_config`s belong to values of
# `init_lora_weights`, which is checked; `fan_in_fan_out` is about torch's Conv1D alone.
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out",
    "inference_mode", "loftq_config", "lora_ga_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip

_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class Options:
    """What a configuration says that an adapter here can do; named as in the file."""

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    bias: str = "none"
    lora_bias: bool = False
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False

    def targets(self, module: str, linear: bool, head: str) -> bool:
        """Whether PEFT puts LoRA on a module.

        Args:
            module: its dotted name.
            linear: whether it is a linear map, for "all-linear".
            head: the output head, which "all-linear" leaves alone.
        """
        if self.exclude_modules and chosen(self.exclude_modules, module, "exclude_modules"):
            return False
        if any(_part_of(module, name) for name in self.modules_to_save or ()):
            return False
        target = self.target_modules or []
        if isinstance(target, str):
            if target.lower() == ALL_LINEAR:
                return linear and module != head
            return chosen(target, module, "target_modules")
        if module in target:
            return True
        return chosen(target, module, "target_modules") and in_layers(
            module, _listed(self.layers_to_transform), _listed(self.layers_pattern)
        )

    def saves(self, module: str) -> bool:
        """Whether PEFT trains a module whole."""
        return saved(self.modules_to_save or (), module)

    def rank(self, module: str) -> int:
        return pattern_value(self.rank_pattern or {}, module, self.r, "rank_pattern")

    def alpha(self, module: str) -> float:
        return pattern_value(self.alpha_pattern or {}, module, self.lora_alpha, "alpha_pattern")


def _part_of(module: str, name: str) -> bool:
    return search(rf"(^|.*\.){name}($|\..*)", "modules_to_save").match(module) is not None


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, (int, str)) else value or []


def read_options(path: Path) -> Options:
    """The options of a file.

    Args:
        path: an `adapter_config.json`.

    Returns:
        The options that say what the adapter computes.

    Raises:
        FileNotFoundError: if the file is absent.
        ValueError: if it is damaged, of another method than LoRA, or has an option that an adapter
            here cannot express. No option is passed over.
    """
    config = read_json(path)
    _check_type(config, path)
    known = {field.name for field in dataclasses.fields(Options)}
    for name in sorted(config.keys() - known - _NEUTRAL - {"init_lora_weights"}):
        _check_unused(name, config[name], path)
    _check_init(config.get("init_lora_weights", True), path)
    given = {name: config[name] for name in known & config.keys() if config[name] is not None}
    for name, value in given.items():
        check_option(path, name, value, _CHECKS[name])
    options = Options(**given)
    if options.target_modules is None:
        raise ValueError(
            f"{path}: target_modules is null. List the modules, such as ['q_proj', 'v_proj']."
        )
    if isinstance(options.target_modules, str) and options.layers_to_transform is not None:
        raise ValueError(f"{path}: layers_to_transform needs target_modules to be a list.")
    return options


def _check_type(config: Mapping[str, Any], path: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"{path}: peft_type is {kind!r}; read are LORA, SHADOW, and prompts and prefixes. In "
            "PEFT, `save_as_lora` turns other adapters into LoRA."
        )


def _check_unused(name: str, value: Any, path: Path) -> None:
    if not value or (name in DEFAULTS and value == DEFAULTS[name]):
        return
    what = "is not supported" if name in DEFAULTS else "is not known (from a newer PEFT?)"
    raise ValueError(
        f"{path}: the option {name}={value!r} {what}, and leaving it out would change the result. "
        "Merge the adapter with PEFT (`merge_and_unload`) and load the merged model."
    )


def _check_init(value: Any, path: Path) -> None:
    if any(value is allowed or value == allowed for allowed in _INITS):
        return
    if isinstance(value, str) and value.lower().startswith(_MUTATING):
        raise ValueError(
            f"{path}: init_lora_weights={value!r} changed the base weights before training, so the "
            "adapter does not fit the original ones. Save it from PEFT with "
            "`path_initial_model_for_weight_conversion=`, which makes it a plain LoRA adapter."
        )
    raise ValueError(
        f"{path}: init_lora_weights={value!r} is not supported. Supported are true, false, "
        "'gaussian', 'eva' and 'orthogonal', which leave the base weights and training as they are."
    )


def _is_ranks(value: Any) -> bool:
    return isinstance(value, dict) and all(is_int(rank) and rank > 0 for rank in value.values())


def _is_alphas(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_positive, value.values()))


_TEXTS: Check = (lambda v: isinstance(v, str) or is_names(v), "a string or strings")
_CHECKS: dict[str, Check] = {
    "r": COUNT,
    "lora_alpha": POSITIVE,
    "lora_dropout": SHARE,
    "target_modules": _TEXTS,
    "exclude_modules": _TEXTS,
    "rank_pattern": (_is_ranks, "an object of positive integers"),
    "alpha_pattern": (_is_alphas, "an object of positive numbers"),
    "use_rslora": FLAG,
    "modules_to_save": (lambda v: is_names(v) and all(v), "a list of names"),
    "layers_to_transform": (lambda v: is_int(v) or is_indices(v), "layer indices"),
    "layers_pattern": _TEXTS,
    "bias": (lambda v: v in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "lora_bias": FLAG,
    "trainable_token_indices": (
        lambda v: is_indices(v) or isinstance(v, dict) and all(map(is_indices, v.values())),
        "a list of token ids, or an object of them",
    ),
    "ensure_weight_tying": FLAG,
}


def full_config(**values: Any) -> dict[str, Any]:
    """A configuration with every key that PEFT writes.

    Raises:
        ValueError: if a key is not one of PEFT's.
    """
    unknown = values.keys() - DEFAULTS.keys()
    if unknown:
        raise ValueError(f"PEFT has no option {some(unknown)}.")
    return DEFAULTS | values
