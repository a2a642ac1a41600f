"""PEFT's files of methods that prompt: their root tensors, and modules that are trained whole.

`prompt_embeddings` is (tokens, width) for prompts and (tokens, layers * 2 * width) for prefixes,
of each layer the keys and then the values. A prompt that was computed (P-tuning, or a prefix with
a reparameterization) is saved as what it computes, as PEFT does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpeft.core.boundary import reading
from jaxpeft.core.method import Method, resolve
from jaxpeft.core.site import Site
from jaxpeft.core.transform import Adapter, Tuned
from jaxpeft.flax import transform
from jaxpeft.hf.checks import check_options
from jaxpeft.hf.collect import PeftFormatError, Stage
from jaxpeft.hf.config import CONFIG
from jaxpeft.hf.files import read_tensors, some
from jaxpeft.hf.paths import at_paths
from jaxpeft.hf.prompt_kinds import CHECKS, KINDS, Tensors, take
from jaxpeft.hf.table import Row, Table
from jaxpeft.hf.tensors import torch_axes
from jaxpeft.methods.full import full
from jaxpeft.models import Model

SAVED = "base_model."


def read_prompt(
    path: Path, config: Mapping[str, Any], model: Any, table: Table | None, sites: Any
) -> tuple[Tuned, Adapter]:
    """The tuned model and the adapter of a file; see `load_adapter`."""
    kind = KINDS[config["peft_type"]]
    check_options(path.parent / CONFIG, config, CHECKS)
    config = {name: value for name, value in config.items() if value is not None}
    tensors, _ = read_tensors(path)
    beside = getattr(model, "keys_take_prefix", False)
    try:
        method = kind.method(config, beside)
    except KeyError as error:
        raise ValueError(f"{path.parent / CONFIG} lacks the option {error}.") from error
    everywhere = _sites(model, method) if sites is None else sites
    found = resolve(method, everywhere)
    chosen = {site.path: method for site in everywhere if site.path in found}
    leaves = kind.read(tensors, [site for site in everywhere if site.path in found], config)
    for row, value in _saved(tensors, table, config.get("modules_to_save")):
        chosen[row.path], leaves[row.path] = full(), {"value": jnp.asarray(value)}
    if tensors:
        raise ValueError(f"{path} has tensors that the model has no place for: {some(tensors)}.")
    tuned = transform(model, at_paths(chosen))
    known = {site.path: reading(site, chosen, everywhere) for site in everywhere}
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
            value = take(tensors, key, shape).reshape([row.site.shape[axis] for axis in axes])
            found.append((row, value.transpose(np.argsort(axes))))
    return found


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
    about = {
        "peft_type": types[0],
        "auto_mapping": None,
        "inference_mode": True,
        "revision": None,
    }
    if types[0] == "ADAPTION_PROMPT":
        return tensors, about | options
    config = getattr(model, "config", None)
    sizes = {
        "num_attention_heads": getattr(config, "num_attention_heads", None),
        "num_layers": getattr(config, "num_hidden_layers", None),
        "num_transformer_submodules": 1,
        "modules_to_save": modules or None,
    }
    return tensors, about | sizes | options


def _write_saved(site: Site, stage: Stage, table: Table | None) -> tuple[str, np.ndarray]:
    row = table.rows.get(site.path) if table else None
    if row is None or row.stacked:
        raise PeftFormatError(
            f"{site.path!r} is trained whole, and its torch name is not known or is one of several "
            "layers. Pass model=, or leave it out of the rules."
        )
    axes, shape = torch_axes(row)
    return row.tensor, np.asarray(stage.leaves["value"], np.float32).transpose(axes).reshape(shape)
