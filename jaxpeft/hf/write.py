"""Writes PEFT's LoRA adapters."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft.core.site import Site
from jaxpeft.core.transform import Adapter, Tuned
from jaxpeft.hf.collect import Found, Pair, PeftFormatError, collect, stages_at
from jaxpeft.hf.config import CONFIG, WEIGHTS, Options, full_config
from jaxpeft.hf.files import some, write_directory, write_json, write_tensors
from jaxpeft.hf.match import ends, parts, saved, search, shortest
from jaxpeft.hf.prompts import write_prompt
from jaxpeft.hf.read import NOTES
from jaxpeft.hf.shadows import write_shadow
from jaxpeft.hf.table import (
    HEAD,
    TASK_HEADS,
    Table,
    of_adapter,
    of_model,
    of_names,
    task_type_of,
)
from jaxpeft.hf.tensors import PREFIX, low_rank_keys


def save_adapter(
    directory: str | Path,
    tuned: Tuned,
    adapter: Adapter,
    *,
    model: Any = None,
    names: Mapping[str, str] | None = None,
    sites: Sequence[Site] | None = None,
    base_model_name: str | None = None,
    task_type: str | None = "auto",
) -> None:
    """Writes LoRA, a prompt or a prefix as PEFT does, for `peft.PeftModel.from_pretrained`.

    Tensors are float32. `full()` on whole modules becomes `modules_to_save`; on the biases of all
    modules, or of all modules with LoRA, it becomes PEFT's `bias` option. A file `jaxpeft.json`
    beside those of LoRA keeps the names and sites, so that `load_adapter` needs neither. Each file
    is written whole and then moved into place.

    Args:
        directory: made if absent; an adapter in it is replaced.
        tuned: of `jaxpeft.transform` or `load_adapter`.
        adapter: what to save.
        model: the model that `tuned` was made of. Needed for encoders, whose names depend on their
            task, and where biases are trained, to know which others there are.
        names: the torch modules of a model that is not of this library, as for `load_adapter`.
        sites: all of that model's parameters, as for `load_adapter`; what `model` is good for.
        base_model_name: directory or hub name of the base model, for PEFT's users.
        task_type: PEFT's; "auto" for that of `model`'s task, "CAUSAL_LM" where it is not known.
            PEFT trains the classifier of a classification model whole, as full() does here.

    Raises:
        PeftFormatError: a `ValueError`, if PEFT's LoRA cannot express the adapter.
        ValueError: if torch names are not known.

    Example:
        >>> jp.hf.save_adapter("my-adapter", tuned, adapter)  # doctest: +SKIP
        >>> peft.PeftModel.from_pretrained(torch_model, "my-adapter")  # doctest: +SKIP
    """
    stages = stages_at(tuned, adapter)
    task_type = task_type_of(model) if task_type == "auto" else task_type
    about = {"base_model_name_or_path": base_model_name, "task_type": task_type}
    prompt = write_shadow(stages, model) or write_prompt(stages, adapter, of_model(model), model)
    if prompt:
        tensors, options = prompt
        _write(Path(directory), tensors, options | about, None)
        return
    table = _find_table(adapter, model, names, sites)
    found = collect(stages, table)
    config = _config(found, table, task_type)
    _check_config(config, found, table)
    notes = {"format": "jaxpeft", "version": 1, **table.to_json(adapter.sites)}
    _write(Path(directory), _tensors(found, config, table), config | about, notes)


def _write(directory: Path, tensors: Any, config: Any, notes: Any) -> None:
    def write(made: Path) -> None:
        write_tensors(made / WEIGHTS, tensors, {"format": "pt"})
        if notes:
            write_json(made / NOTES, notes)
        write_json(made / CONFIG, config)

    write_directory(directory, (WEIGHTS, *([NOTES] if notes else []), CONFIG), write)


def _find_table(adapter: Adapter, model: Any, names: Any, sites: Any) -> Table:
    if names is not None:
        return of_names(names, adapter.sites if sites is None else sites, sites is not None)
    return of_model(model) or of_adapter(adapter)


def _config(found: Found, table: Table, task_type: str | None) -> dict[str, Any]:
    if not found.pairs:
        raise PeftFormatError("it has no LoRA, and PEFT needs at least one module with it.")
    dropouts = {pair.dropout for pair in found.pairs.values()}
    if len(dropouts) > 1:
        raise PeftFormatError(f"lora_dropout is one value, but sites have {sorted(dropouts)}.")
    modules = _modules(table)
    tied = _tied(found, table)
    rslora = all(pair.rslora for pair in found.pairs.values())
    ranks = {module: pair.rank for module, pair in found.pairs.items()}
    alphas = {module: _alpha(pair, rslora) for module, pair in found.pairs.items()}
    if tied in found.pairs:  # PEFT looks up the head's sizes by the head's own name.
        ranks[HEAD], alphas[HEAD] = ranks[tied], alphas[tied]
    rank, alpha = _usual(ranks.values()), _usual(alphas.values())
    whole = [m for m in found.full if "weight" in found.full[m]]
    to_target = shortest(found.pairs, modules, lambda name, module: ends(module, [name]))
    to_save = _to_save(whole, modules, table, TASK_HEADS.get(task_type or "", ()))
    return full_config(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropouts.pop(),
        use_rslora=rslora,
        rank_pattern=_pattern(ranks, rank),
        alpha_pattern=_pattern(alphas, alpha),
        target_modules=to_target if table.shortens else sorted(found.pairs),
        modules_to_save=to_save or None,
        bias=_bias(found, whole, table),
        lora_bias=_has_lora_bias(found),
        trainable_token_indices=found.tokens or None,
        ensure_weight_tying=bool(tied),
    )


def _to_save(
    whole: Sequence[str], modules: Sequence[str], table: Table, heads: Sequence[str]
) -> list[str]:
    """`modules_to_save`; with PEFT's own names of a task's head if it is trained whole."""
    head = [module for module in table.modules if saved(heads, module)]
    if not head or set(head) - set(whole):
        head, heads = [], ()
    rest = [module for module in whole if module not in head]
    if table.shortens:
        rest = shortest(rest, modules, lambda name, module: module.endswith(name))
    return [*heads, *sorted(rest)]


def _modules(table: Table) -> list[str]:
    """All modules, with those that only hold others, and a tied head."""
    known = [*table.modules, *table.others]
    found = {part for module in known for part in parts(module)}
    return sorted(found | ({HEAD} if table.tied else set()))


def _alpha(pair: Pair, rslora: bool) -> float:
    alpha = pair.alpha if pair.rslora == rslora else pair.scale * pair.rank
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def _usual(values: Iterable[Any]) -> Any:
    """The most frequent value, the largest among equals."""
    return max(Counter(values).items(), key=lambda item: (item[1], item[0]))[0]


def _pattern(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for value in sorted(set(values.values()) - {usual}):
        wanted = [module for module in values if values[module] == value]
        for name in shortest(wanted, values, _fits_pattern):
            found[name] = value
    return found


def _fits_pattern(key: str, module: str) -> bool:
    return search(rf"(.*\.)?({key})$", "rank_pattern").match(module) is not None


def _bias(found: Found, whole: Sequence[str], table: Table) -> str:
    _check_whole(found, whole, table)
    tuned = {m for m in found.full if "bias" in found.full[m]} - set(whole)
    if not tuned:
        return "none"
    if not table.complete:
        raise ValueError(
            "biases are trained, and PEFT needs to know whether these are all. Pass model=, or "
            "sites= for a model with names=."
        )
    biased = {m for m, held in table.modules.items() if "bias" in held} - set(whole)
    if tuned == biased & found.pairs.keys():
        return "lora_only"
    if tuned == biased:
        return "all"
    raise PeftFormatError(
        f"full() is on the biases of {len(tuned)} modules ({some(tuned, 3)}), where PEFT's `bias` "
        f"can train those of all {len(biased)} modules, or of the modules with LoRA."
    )


def _check_whole(found: Found, whole: Sequence[str], table: Table) -> None:
    modules = table.modules
    for module in whole:
        if module in found.pairs:
            raise PeftFormatError(f"{module!r} has both LoRA and full().")
        missing = modules[module].keys() - found.full[module].keys()
        if missing:
            raise PeftFormatError(
                f"full() is on the weight of {module!r} but not on its {some(missing)}; "
                "PEFT's modules_to_save trains whole modules."
            )
        linear = modules[module]["weight"].linear
        if linear and not table.complete and "bias" not in found.full[module]:
            raise ValueError(
                f"full() is on {module!r}, and PEFT needs to know whether it has a bias. "
                "Pass model=, or sites= for a model with names=."
            )


def _has_lora_bias(found: Found) -> bool:
    without = found.pairs.keys() - found.lora_bias.keys()
    if found.lora_bias and (without or found.lora_bias.keys() - found.pairs.keys()):
        raise PeftFormatError(f"lora_bias is on some modules with LoRA, not on {some(without)}.")
    return bool(found.lora_bias)


def _tied(found: Found, table: Table) -> str:
    """The embedding, if it is changed and is the head too, which PEFT takes for two weights."""
    module = table.tied.modules[0] if table.tied else ""
    return module if module in found.pairs or module in found.full else ""


def _check_config(config: Mapping[str, Any], found: Found, table: Table) -> None:
    """That PEFT will choose these modules, and no others."""
    options = Options(**{f.name: config[f.name] for f in dataclasses.fields(Options)})
    held = table.modules
    for module in _modules(table):
        chosen = options.targets(module, False, HEAD)
        inside = [m for m in held if m.startswith(f"{module}.")] or [module]
        whole = all("weight" in found.full.get(m, {}) for m in inside)
        # All that a module holds may also be named one by one.
        saves = options.saves(module) or whole and module not in held
        pair = found.pairs.get(module)
        right = chosen == bool(pair) and saves == whole
        if pair:
            sizes = pair.rank, _alpha(pair, options.use_rslora)
            right &= sizes == (options.rank(module), options.alpha(module))
        if not right:
            raise PeftFormatError(f"no configuration chooses {module!r} as the adapter does.")


def _tensors(found: Found, config: Mapping[str, Any], table: Table) -> dict[str, np.ndarray]:
    tensors = dict(found.tensors)
    for module, pair in found.pairs.items():
        a_key, b_key = low_rank_keys(pair.row, module)
        tensors |= {a_key: pair.a, b_key: pair.b}
    for module, values in found.full.items():
        inner = "base_layer." if module in found.pairs else ""
        tensors |= {f"{module}.{inner}{name}": value for name, value in values.items()}
    for module, (value, scale) in found.lora_bias.items():
        tensors[f"{module}.lora_B.bias"] = value * np.float32(scale / found.pairs[module].scale)
    if config["ensure_weight_tying"] and table.tied:
        tensors |= _head_tensors(table.tied.modules[0], tensors)
    return {PREFIX + name: tensor for name, tensor in sorted(tensors.items())}


def _head_tensors(module: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tied head once more, as PEFT lists it."""
    if f"{module}.weight" in tensors:
        return {f"{HEAD}.weight": tensors[f"{module}.weight"]}
    return {
        f"{HEAD}.lora_A.weight": tensors[f"{module}.lora_embedding_B"].T,
        f"{HEAD}.lora_B.weight": tensors[f"{module}.lora_embedding_A"].T,
    }
