"""How each of PEFT's prompting types stands in its files, and which method it is here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.core.method import Leaves, Method
from jaxpeft.core.site import Site
from jaxpeft.hf.checks import COUNT, INDICES, NAMES, SIZE, Check
from jaxpeft.hf.collect import PeftFormatError, Stage
from jaxpeft.hf.files import some
from jaxpeft.methods.cpt import cpt, moved_context
from jaxpeft.methods.llama_adapter import llama_adapter
from jaxpeft.methods.multitask_prompt import multitask_prompt_tuning
from jaxpeft.methods.p_tuning import flat_prompt
from jaxpeft.methods.prefix import flat_prefix, prefix_tuning
from jaxpeft.methods.prompt import prompt_tuning

ROOT = "prompt_embeddings"
DECODER = "decoder/block/layer/0/SelfAttention:"
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


def take(tensors: Tensors, key: str, shape: tuple[int, ...]) -> np.ndarray:
    if key not in tensors:
        raise ValueError(f"the file lacks {key!r}. It has {some(tensors)}.")
    value = tensors.pop(key)
    if value.shape != shape:
        raise ValueError(
            f"{key!r} has shape {value.shape}, expected {shape}. Is it for this model?"
        )
    return value.astype(np.float32)


def _prompt(config: Mapping[str, Any], beside: bool) -> Method:
    del beside
    return prompt_tuning(config["num_virtual_tokens"])


def _read_rows(
    tensors: Tensors, sites: Sequence[Site], config: Mapping[str, Any]
) -> dict[str, Leaves]:
    (site,) = sites
    blocks = config.get("num_transformer_submodules") or 1
    tokens = config["num_virtual_tokens"]
    rows = take(tensors, ROOT, (blocks * tokens, site.shape[1]))
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
    if (config.get("num_transformer_submodules") or 1) == 1:
        return prefix_tuning(config["num_virtual_tokens"], shift=beside)
    # Of an encoder and a decoder, PEFT gives past keys to the decoder's self-attentions alone.
    method = prefix_tuning(config["num_virtual_tokens"], shift="queries")
    return method._replace(bare=lambda site: method.bare(site) and DECODER in site.path)


def _used(layers: int, stored: int) -> list[int]:
    """Which layer's rows of a file each layer of a decoder behind an encoder gets: PEFT cuts them
    two to a layer, and goes on from the start where they end."""
    return [(2 * i) % stored for i in range(layers)]


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
    behind = (config.get("num_transformer_submodules") or 1) > 1
    stored = config["num_layers"] if behind else depth
    rows = take(tensors, ROOT, (tokens, stored * 2 * heads[0] * heads[1]))
    rows = rows.reshape(tokens, stored, 2, *heads).transpose(1, 2, 0, 3, 4)
    rows = rows[_used(depth, stored)] if behind else rows
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
    behind = [DECODER in site.path for site, _ in found]
    if all(behind) and any(stage.options["shift"] != "queries" for _, stage in found):
        raise PeftFormatError('in a decoder behind an encoder, PEFT has shift="queries".')
    if all(behind):
        rows = _shared_out(rows)
    elif any(behind):
        raise PeftFormatError("PEFT's prefixes of a T5 are in its decoder's self-attentions alone.")
    return {ROOT: rows.transpose(2, 0, 1, 3, 4).reshape(tokens, -1)}, {
        "num_virtual_tokens": tokens,
        "token_dim": heads * width,
        "num_attention_heads": heads,
        "num_layers": len(rows),
        "num_transformer_submodules": 2 if all(behind) else 1,
        "encoder_hidden_size": heads * width,
        "prefix_projection": False,
    }


def _shared_out(rows: np.ndarray) -> np.ndarray:
    """The rows of a file from which each layer of a decoder gets its own: of an odd number none is
    shared."""
    stored = np.zeros((len(rows) | 1, *rows.shape[1:]), rows.dtype)
    stored[_used(len(rows), len(stored))] = rows
    return stored


def _multitask(config: Mapping[str, Any], beside: bool) -> Method:
    del beside
    if (config.get("num_transformer_submodules") or 1) > 1:
        raise ValueError(
            "a multitask prompt of an encoder-decoder, whose decoder has rows of its own, which "
            "jaxpeft does not know. Save it from PEFT for the encoder alone."
        )
    return multitask_prompt_tuning(
        config["num_virtual_tokens"], config["num_tasks"], ranks=config["num_ranks"]
    )


def _read_multitask(
    tensors: Tensors, sites: Sequence[Site], config: Mapping[str, Any]
) -> dict[str, Leaves]:
    (site,) = sites
    n, tasks, ranks = (config[k] for k in ("num_virtual_tokens", "num_tasks", "num_ranks"))
    width = site.shape[1]
    found = {
        "prompt": take(tensors, ROOT, (n, width)),
        "columns": take(tensors, "prefix_task_cols", (tasks, n, ranks)),
        "rows": take(tensors, "prefix_task_rows", (tasks, ranks, width)),
    }
    return {site.path: {name: jnp.asarray(value) for name, value in found.items()}}


def _write_multitask(found: Sequence[tuple[Site, Stage]]) -> tuple[Tensors, dict[str, Any]]:
    ((_, stage),) = found
    names = {"prompt": ROOT, "columns": "prefix_task_cols", "rows": "prefix_task_rows"}
    tensors = {key: np.asarray(stage.leaves[name], np.float32) for name, key in names.items()}
    tasks, n, ranks = tensors["prefix_task_cols"].shape
    return tensors, {
        "num_virtual_tokens": n,
        "token_dim": tensors[ROOT].shape[1],
        "num_tasks": tasks,
        "num_ranks": ranks,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_task": 0,
    }


def _cpt(config: Mapping[str, Any], beside: bool) -> Method:
    del beside
    if len(config["cpt_token_ids"]) != config["num_virtual_tokens"]:
        raise ValueError(
            f"num_virtual_tokens={config['num_virtual_tokens']}, but cpt_token_ids are "
            f"{len(config['cpt_token_ids'])}: give one id for each."
        )
    return cpt(
        config["cpt_token_ids"],
        config["cpt_tokens_type_mask"],
        epsilon=config.get("opt_projection_epsilon", 0.1),
        format_epsilon=config.get("opt_projection_format_epsilon", 0.1),
    )


def _read_cpt(
    tensors: Tensors, sites: Sequence[Site], config: Mapping[str, Any]
) -> dict[str, Leaves]:
    """The file holds the moved context alone: that is the context from which it moves again."""
    (site,) = sites
    context = jnp.asarray(take(tensors, ROOT, (config["num_virtual_tokens"], site.shape[1])))
    method = _cpt(config, False)
    blank = method.init(None, site, jnp.zeros(site.shape))  # type: ignore[arg-type]
    return {site.path: blank | {"context": context}}


def _write_cpt(found: Sequence[tuple[Site, Stage]]) -> tuple[Tensors, dict[str, Any]]:
    ((_, stage),) = found
    rows = np.asarray(moved_context(dict(stage.leaves)), np.float32)
    return {ROOT: rows}, {
        "num_virtual_tokens": rows.shape[0],
        "token_dim": rows.shape[1],
        "cpt_token_ids": list(stage.options["ids"]),
        "cpt_mask": [1] * len(rows),
        "cpt_tokens_type_mask": list(stage.options["types"]),
        "opt_weighted_loss_type": "decay",
        "opt_loss_decay_factor": 1.0,
        "opt_projection_epsilon": stage.options["epsilon"],
        "opt_projection_format_epsilon": stage.options["format_epsilon"],
        "tokenizer_name_or_path": None,
    }


def _adaption(config: Mapping[str, Any], beside: bool) -> Method:
    del beside
    return llama_adapter(config["adapter_len"], layers=config["adapter_layers"])


def _read_adaption(
    tensors: Tensors, sites: Sequence[Site], config: Mapping[str, Any]
) -> dict[str, Leaves]:
    (site,) = sites
    method = _adaption(config, False)
    start = lambda: method.init(jax.random.key(0), site, None)  # noqa: E731
    shape = jax.eval_shape(start)["prompt"].shape[1:]
    (depth,) = site.sizes("stack")
    shapes = {"prompt": (1, *shape), "gate": (1,)}
    found: dict[str, list[np.ndarray]] = {name: [] for name in shapes}
    for layer in range(depth - config["adapter_layers"], depth):
        module = f"base_model.model.model.layers.{layer}.self_attn.adaption_"
        for name, wanted in shapes.items():
            found[name].append(take(tensors, module + name, wanted)[0])
    # The first layers' leaves are there, and never used.
    leaves = start()
    last = {name: np.stack(parts) for name, parts in found.items()}
    values = {n: jnp.zeros_like(leaves[n]).at[-len(v) :].set(v) for n, v in last.items()}
    return {site.path: leaves | values}


def _write_adaption(found: Sequence[tuple[Site, Stage]]) -> tuple[Tensors, dict[str, Any]]:
    ((site, stage),) = found
    if site.path != "layers/self_attn:context":
        raise PeftFormatError(f"PEFT's adaption prompts are of Llama's layers, not {site.path!r}.")
    prompt, gate = (np.asarray(stage.leaves[name], np.float32) for name in ("prompt", "gate"))
    count = stage.options["layers"] or len(prompt)
    tensors: Tensors = {}
    for layer in range(len(prompt) - count, len(prompt)):
        module = f"base_model.model.model.layers.{layer}.self_attn.adaption_"
        tensors |= {f"{module}prompt": prompt[layer][None], f"{module}gate": gate[layer][None]}
    return tensors, {
        "adapter_len": prompt.shape[1],
        "adapter_layers": count,
        "target_modules": "self_attn",
    }


# What the options that are read may be; others do not say what an adapter computes.
CHECKS: dict[str, Check] = {
    **dict.fromkeys(
        ("num_virtual_tokens", "num_transformer_submodules", "num_layers", "num_tasks", "num_ranks",
         "adapter_len", "adapter_layers"),
        COUNT,
    ),
    **dict.fromkeys(("cpt_token_ids", "cpt_tokens_type_mask"), INDICES),
    **dict.fromkeys(("opt_projection_epsilon", "opt_projection_format_epsilon"), SIZE),
    "modules_to_save": NAMES,
}  # fmt: skip

KINDS: dict[str, Kind] = {
    "PROMPT_TUNING": Kind(_prompt, _read_rows, ("prompt_tuning",), _write_rows),
    "P_TUNING": Kind(_prompt, _read_rows, ("p_tuning",), _write_rows),
    "PREFIX_TUNING": Kind(_prefix, _read_prefix, ("prefix_tuning",), _write_prefix),
    "MULTITASK_PROMPT_TUNING": Kind(
        _multitask, _read_multitask, ("multitask_prompt_tuning",), _write_multitask
    ),
    "CPT": Kind(_cpt, _read_cpt, ("cpt",), _write_cpt),
    "ADAPTION_PROMPT": Kind(_adaption, _read_adaption, ("llama_adapter",), _write_adaption),
}
