"""PEFT's files of shadow tuning: the layers' small networks, and a mirror of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpeft.core.method import Leaves
from jaxpeft.core.transform import Adapter, Tuned
from jaxpeft.flax import transform
from jaxpeft.hf.checks import COUNT, NAMES, NUMBER, SHARE, check_option, check_options
from jaxpeft.hf.collect import PeftFormatError, Stage
from jaxpeft.hf.config import CONFIG
from jaxpeft.hf.files import read_tensors, some
from jaxpeft.hf.prompt_kinds import Tensors, take
from jaxpeft.methods.shadow import shadow
from jaxpeft.models import Decoder, mirror

PEFT_TYPE = "SHADOW"
_LAYER = "base_model.model.model.layers.{layer}.shadow_"
_MIRROR = "base_model.shadow_backbone.default."
_START = "embed_tokens:out"

# Options that must be as PEFT sets them, and ones that do not matter once an adapter is trained.
_DEFAULTS: dict[str, Any] = {
    "shadow_model": "mirror", "shadow_hidden_size": None, "share_embeddings": True,
    "layers_to_transform": None, "layers_pattern": None, "exclude_modules": None,
    "modules_to_save": None,
}  # fmt: skip
_SIZES = ("shadow_num_hidden_layers", "shadow_intermediate_size", "shadow_num_attention_heads")
# Our name, PEFT's in each layer, and whether it is transposed there.
_INPUT = (("down", "down.default.weight", False), ("up", "up.default.weight", True))
_OUTPUT = tuple(
    ((ours, leaf), f"update_{theirs}.default.{tensor}", flip)
    for ours, theirs in (("candidate", "transform"), ("gate", "gate"))
    for leaf, tensor, flip in (
        ("down", "0.weight", False), ("down_bias", "0.bias", False),
        ("up", "2.weight", True), ("up_bias", "2.bias", False),
    )
)  # fmt: skip


def read_shadow(path: Path, config: Mapping[str, Any], model: Any) -> tuple[Tuned, Adapter]:
    """The tuned model and the adapter of a file; see `load_adapter`."""
    _check(path.parent / CONFIG, config, model)
    backbone = mirror(
        model,
        config.get("shadow_num_hidden_layers") or 1,
        intermediate=config.get("shadow_intermediate_size"),
        heads=config.get("shadow_num_attention_heads"),
    )
    method = shadow(
        config["r"],
        alpha=config["shadow_alpha"],
        dropout=config["shadow_dropout"],
        hidden=config.get("update_hidden_size"),
        backbone=backbone,
    )
    tuned = transform(model, method)
    shapes = jax.eval_shape(
        lambda key, params: tuned.init(key, params, *model.example()),
        jax.random.key(0),
        nnx.state(model),
    )
    tensors, _ = read_tensors(path)
    leaves = {
        _START: _read_mirror(tensors, shapes[_START], model),
        "layers:in": _read(tensors, shapes["layers:in"], _INPUT),
        "layers:out": _read(tensors, shapes["layers:out"], _OUTPUT),
    }
    if tensors:
        raise ValueError(f"{path} has tensors that the model has no place for: {some(tensors)}.")
    return tuned, Adapter(leaves, shapes.sites)


def _check(path: Path, config: Mapping[str, Any], model: Any) -> None:
    if not isinstance(model, Decoder):
        raise ValueError(f"{path}: a shadow of {type(model).__name__}, which is no decoder here.")
    for name, value in _DEFAULTS.items():
        if config.get(name, value) != value:
            raise ValueError(f"{path}: the option {name}={config[name]!r} is not supported.")
    needed = {"r": COUNT, "shadow_alpha": NUMBER, "shadow_dropout": SHARE}
    for name, check in needed.items():
        check_option(path, name, config.get(name), check)
    sizes = dict.fromkeys(("update_hidden_size", *_SIZES), COUNT)
    check_options(path, config, sizes | {"target_modules": NAMES})
    every = {f"model.layers.{i}" for i in range(model.config.num_hidden_layers)}
    given = config.get("target_modules")
    if given is not None and set(given) != every:
        raise ValueError(f"{path}: target_modules={given!r} are not all {len(every)} layers.")


def _at(leaves: Any, name: Any) -> Any:
    return leaves[name] if isinstance(name, str) else leaves[name[0]][name[1]]


def _read(tensors: Tensors, shapes: Leaves, rows: Sequence[Any]) -> Leaves:
    found: Leaves = {}
    for name, suffix, flip in rows:
        depth, *shape = _at(shapes, name).shape
        keys = [_LAYER.replace("{layer}", str(layer)) + suffix for layer in range(depth)]
        parts = [take(tensors, key, tuple(shape[::-1] if flip else shape)) for key in keys]
        value = jnp.asarray(np.stack([part.T if flip else part for part in parts]))
        if isinstance(name, str):
            found[name] = value
        else:
            found.setdefault(name[0], {})[name[1]] = value
    return found


def _names(model: Any) -> dict[str, str]:
    """The tensors of a mirror of the model, by the paths of the leaves."""
    rows = {row.path: row.tensor for row in model.names()}
    return {
        path: _MIRROR + tensor.removeprefix("model.")
        for path, tensor in rows.items()
        if path.startswith(("layers/", "norm/"))
    }


def _read_mirror(tensors: Tensors, shapes: Leaves, model: Any) -> Leaves:
    names = _names(model)

    def read(keys: Any, leaf: Any) -> jax.Array:
        name = names["/".join(key.key for key in keys)]
        layered = "{layer}" in name
        shape = leaf.shape[1:] if layered else leaf.shape
        parts = [
            take(tensors, name.replace("{layer}", str(layer)), shape[::-1])
            for layer in range(leaf.shape[0] if layered else 1)
        ]
        return jnp.asarray(np.stack([part.T for part in parts]).reshape(leaf.shape))

    found: Leaves = jax.tree_util.tree_map_with_path(read, shapes)
    return found


def write_shadow(
    stages: Mapping[str, Sequence[Stage]], model: Any
) -> tuple[Tensors, dict[str, Any]] | None:
    """Tensors and options in PEFT's form; None if no stage is a shadow."""
    flat = {path: stage for path, found in stages.items() for stage in found}
    if "shadow" not in {stage.name for stage in flat.values()}:
        return None
    options = flat["layers:in"].options if "layers:in" in flat else {}
    backbone = options.get("backbone")
    alone = set(flat) == {_START, "layers:in", "layers:out"} and "in_layers" not in options
    if not alone or not backbone or not isinstance(model, Decoder):
        raise PeftFormatError(
            "PEFT's shadow stands alone at all layers of a decoder, starts from "
            "jaxpeft.models.mirror(model), and needs model=."
        )
    tensors: Tensors = {}
    for path, rows in (("layers:in", _INPUT), ("layers:out", _OUTPUT)):
        for name, suffix, flip in rows:
            for layer, part in enumerate(np.asarray(_at(flat[path].leaves, name), np.float32)):
                key = _LAYER.replace("{layer}", str(layer)) + suffix
                tensors[key] = part.T if flip else part
    names = _names(model)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(flat[_START].leaves):
        name = names["/".join(key.key for key in keys)]
        value = np.asarray(leaf, np.float32)
        for layer, part in enumerate(value if "{layer}" in name else value[None]):
            tensors[name.replace("{layer}", str(layer))] = part.T
    depth = model.config.num_hidden_layers
    return tensors, _DEFAULTS | {
        "peft_type": PEFT_TYPE, "auto_mapping": None, "inference_mode": True, "revision": None,
        "r": options["rank"], "shadow_alpha": options["alpha"], "init_weights": True,
        "shadow_dropout": options["dropout"], "update_hidden_size": options["hidden"],
        "shadow_num_hidden_layers": backbone["mirror"],
        "shadow_intermediate_size": backbone["intermediate"],
        "shadow_num_attention_heads": backbone["heads"], "auxiliary_loss_weight": 0.05,
        "target_modules": [f"model.layers.{i}" for i in range(depth)],
    }  # fmt: skip
