"""PEFT's files of methods that prompt: their root tensors, and modules that are trained whole.

`prompt_embeddings` is (tokens, width) for prompts and (tokens, layers * 2 * width) for prefixes,
of each layer the keys and then the values. A prompt that was computed (P-tuning, or a prefix with
a reparameterization) is saved as what it computes, as PEFT does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpeft.core.method import Leaves, Method, resolve
from jaxpeft.core.site import Site
from jaxpeft.core.transform import Adapter, Tuned
from jaxpeft.flax import transform
from jaxpeft.hf.collect import PeftFormatError, Stage
from jaxpeft.hf.config import CONFIG
from jaxpeft.hf.files import read_tensors, some
from jaxpeft.hf.paths import at_paths
from jaxpeft.hf.table import Row, Table
from jaxpeft.hf.tensors import torch_axes
from jaxpeft.methods.full import full
from jaxpeft.methods.p_tuning import flat_prompt
from jaxpeft.methods.prefix import flat_prefix, prefix_tuning
from jaxpeft.methods.prompt import prompt_tuning
from jaxpeft.models import Model

ROOT = "prompt_embeddings"
SAVED = "base_model."
Tensors = dict[str, np.ndarray]


class Kind(NamedTuple):
    """One of PEFT's types.

    Attributes:
        method: from the file's options to the method; `beside` says that the model's attentions
            take longer keys.
        read: `(tensors, sites, options) -> leaves by path`; takes what it uses out of `tensors`.
        names: of the methods here that are written as this type.
        write: from the leaves by path to tensors and options.
    """

    method: Callable[[Mapping[str, Any], bool], Method]
    read: Callable[[Tensors, Sequence[Site], Mapping[str, Any]], dict[str, Leaves]]
    names: tuple[str, ...]
    write: Callable[[Sequence[tuple[Site, Stage]]], tuple[Tensors, dict[str, Any]]]


def read_prompt(
    path: Path, config: Mapping[str, Any], model: Any, table: Table | None, sites: Any
) -> tuple[Tuned, Adapter]:
    """The tuned model and the adapter of a file; see `load_adapter`."""
    kind = KINDS[config["peft_type"]]
    tensors, _ = read_tensors(path)
    beside = getattr(model, "keys_take_prefix", False)
    try:
        method = kind.method(config, beside)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path.parent / CONFIG} lacks an option: {error}.") from error
    everywhere = _sites(model, method) if sites is None else sites
    found = resolve(method, everywhere)
    chosen = {site.path: method for site in everywhere if site.path in found}
    leaves = kind.read(tensors, [site for site in everywhere if site.path in found], config)
    for row, value in _saved(tensors, table, config.get("modules_to_save")):
        chosen[row.path], leaves[row.path] = full(), {"value": jnp.asarray(value)}
    if tensors:
        raise ValueError(f"{path} has tensors that the model has no place for: {some(tensors)}.")
    tuned = transform(model, at_paths(chosen))
    known = {site.path: site for site in everywhere}
    return tuned, Adapter(leaves, [known[path] for path in chosen])


def _sites(model: Any, method: Method) -> Sequence[Site]:
    if not isinstance(model, Model):
        raise ValueError(
            f"{type(model).__name__} is no model of jaxpeft.models: pass "
            f"sites=jaxpeft.transform(model, jaxpeft.{method.name}(...)).sites(params, *inputs)."
        )
    return transform(model, method).sites(nnx.state(model), *model.example())


def _saved(tensors: Tensors, table: Table | None, modules: Any) -> list[tuple[Row, np.ndarray]]:
    """Parameters of `modules_to_save`, which PEFT writes without the "model." of other files."""
    found = []
    for row in table.rows.values() if table else ():
        key = SAVED + row.tensor
        if modules and not row.stacked and key in tensors:
            axes, shape = torch_axes(row)
            value = _take(tensors, key, shape).reshape([row.site.shape[axis] for axis in axes])
            found.append((row, value.transpose(np.argsort(axes))))
    return found


def _take(tensors: Tensors, key: str, shape: tuple[int, ...]) -> np.ndarray:
    if key not in tensors:
        raise ValueError(f"the file lacks {key!r}. It has {some(tensors)}.")
    value = tensors.pop(key)
    if value.shape != shape:
        raise ValueError(
            f"{key!r} has shape {value.shape}, expected {shape}. Is it for this model?"
        )
    return value.astype(np.float32)


def write_prompt(
    stages: Mapping[str, Sequence[Stage]], adapter: Adapter, table: Table | None, model: Any
) -> tuple[Tensors, dict[str, Any]] | None:
    """Tensors and options in PEFT's form; None if no stage is of a method that prompts."""
    sites = {site.path: site for site in adapter.sites}
    flat = [(sites[path], stage) for path, found in stages.items() for stage in found]
    names = {stage.name for _, stage in flat}
    types = [kind for kind, spec in KINDS.items() if names & set(spec.names)]
    if not types:
        return None
    own = KINDS[types[0]].names
    others = names - set(own) - {"full"}
    if others or len(types) > 1:
        raise PeftFormatError(f"PEFT's {types[0]} stands alone, but there is {some(names)} too.")
    mine = [(site, stage) for site, stage in flat if stage.name in own]
    tensors, options = KINDS[types[0]].write(mine)
    whole = [(site, stage) for site, stage in flat if stage.name == "full"]
    saved = [_write_saved(site, stage, table) for site, stage in whole]
    tensors |= {SAVED + name: value for name, value in saved}
    modules = sorted({name.rpartition(".")[0] for name, _ in saved})
    return tensors, {
        "peft_type": types[0],
        "auto_mapping": None,
        "inference_mode": True,
        "revision": None,
        "num_attention_heads": getattr(getattr(model, "config", None), "num_attention_heads", None),
        "num_layers": getattr(getattr(model, "config", None), "num_hidden_layers", None),
        "num_transformer_submodules": 1,
        "modules_to_save": modules or None,
        **options,
    }


def _write_saved(site: Site, stage: Stage, table: Table | None) -> tuple[str, np.ndarray]:
    row = table.rows.get(site.path) if table else None
    if row is None or row.stacked:
        raise PeftFormatError(
            f"{site.path!r} is trained whole, and its torch name is not known or is one of several "
            "layers. Pass model=, or leave it out of the rules."
        )
    axes, shape = torch_axes(row)
    return row.tensor, np.asarray(stage.leaves["value"], np.float32).transpose(axes).reshape(shape)


def _prompt(config: Mapping[str, Any], beside: bool) -> Method:
    del beside
    return prompt_tuning(config["num_virtual_tokens"])


def _read_rows(
    tensors: Tensors, sites: Sequence[Site], config: Mapping[str, Any]
) -> dict[str, Leaves]:
    (site,) = sites
    blocks = config.get("num_transformer_submodules") or 1
    tokens = config["num_virtual_tokens"]
    rows = _take(tensors, ROOT, (blocks * tokens, site.shape[1]))
    # Of an encoder and a decoder, PEFT's prompt tuning uses the encoder's rows alone.
    return {site.path: {"prompt": jnp.asarray(rows[:tokens])}}


def _write_rows(found: Sequence[tuple[Site, Stage]]) -> tuple[Tensors, dict[str, Any]]:
    ((_, stage),) = found
    rows = np.asarray(_computed(stage), np.float32)
    options = {"num_virtual_tokens": rows.shape[0], "token_dim": rows.shape[1]}
    if stage.name == "p_tuning":
        return {ROOT: rows}, options | {
            "encoder_reparameterization_type": stage.options.get("encoder", "mlp").upper(),
            "encoder_hidden_size": stage.options.get("hidden"),
            "encoder_num_layers": stage.options.get("layers", 2),
            "encoder_dropout": 0.0,
        }
    return {ROOT: rows}, options | {"prompt_tuning_init": "RANDOM", "tokenizer_name_or_path": None}


def _computed(stage: Stage) -> Any:
    return flat_prompt(dict(stage.leaves))["prompt"]


def _prefix(config: Mapping[str, Any], beside: bool) -> Method:
    if (config.get("num_transformer_submodules") or 1) > 1:
        raise ValueError(
            "a prefix of an encoder-decoder: PEFT hands one prefix to self- and cross-attention of "
            "the decoder as past keys, which no call of the model here has. Use AdapterHub's file."
        )
    return prefix_tuning(config["num_virtual_tokens"], shift=beside)


def _by_layer(sites: Sequence[Site]) -> list[tuple[Site, Site]]:
    """The keys and values of each attention, in the order of the layers."""
    sides = {side: [site for site in sites if site.side == side] for side in ("key", "value")}
    return list(zip(sides["key"], sides["value"], strict=True))


def _read_prefix(
    tensors: Tensors, sites: Sequence[Site], config: Mapping[str, Any]
) -> dict[str, Leaves]:
    pairs, tokens = _by_layer(sites), config["num_virtual_tokens"]
    depth = sum(int(np.prod(key.sizes("stack"))) for key, _ in pairs)
    heads = pairs[0][0].shape[-2:]
    rows = _take(tensors, ROOT, (tokens, depth * 2 * heads[0] * heads[1]))
    rows = rows.reshape(tokens, depth, 2, *heads).transpose(1, 2, 0, 3, 4)
    leaves: dict[str, Leaves] = {}
    start = 0
    for pair in pairs:
        stack = pair[0].sizes("stack")
        layers = int(np.prod(stack))
        for i, site in enumerate(pair):
            part = rows[start : start + layers, i]
            leaves[site.path] = {"prefix": jnp.asarray(part.reshape(*stack, *part.shape[1:]))}
        start += layers
    return leaves


def _write_prefix(found: Sequence[tuple[Site, Stage]]) -> tuple[Tensors, dict[str, Any]]:
    leaves = {site.path: flat_prefix(dict(stage.leaves), site)["prefix"] for site, stage in found}
    parts = []
    for pair in _by_layer([site for site, _ in found]):
        both = [np.asarray(leaves[s.path], np.float32) for s in pair]
        shape = both[0].shape[-3:]
        parts.append(np.stack([value.reshape(-1, *shape) for value in both], axis=1))
    rows = np.concatenate(parts)  # (layers, 2, tokens, heads, width)
    tokens, heads, width = rows.shape[-3:]
    return {ROOT: rows.transpose(2, 0, 1, 3, 4).reshape(tokens, -1)}, {
        "num_virtual_tokens": tokens,
        "token_dim": heads * width,
        "num_attention_heads": heads,
        "num_layers": len(rows),
        "encoder_hidden_size": heads * width,
        "prefix_projection": False,
    }


KINDS: dict[str, Kind] = {
    "PROMPT_TUNING": Kind(_prompt, _read_rows, ("prompt_tuning",), _write_rows),
    "P_TUNING": Kind(_prompt, _read_rows, ("p_tuning",), _write_rows),
    "PREFIX_TUNING": Kind(_prefix, _read_prefix, ("prefix_tuning",), _write_prefix),
}
