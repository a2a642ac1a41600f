"""Reads PEFT's adapters; those of LoRA here, prompts and prefixes in `prompts`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft.core.method import Leaves, Method, compose
from jaxpeft.core.site import Site
from jaxpeft.core.transform import Adapter, Tuned
from jaxpeft.core.tree import leaves_with_paths
from jaxpeft.flax import transform
from jaxpeft.hf import methods
from jaxpeft.hf.checks import check_size
from jaxpeft.hf.config import CONFIG, WEIGHTS, Options, read_options
from jaxpeft.hf.files import read_json, read_site, some
from jaxpeft.hf.paths import at_paths
from jaxpeft.hf.prompt_kinds import KINDS
from jaxpeft.hf.prompts import read_prompt
from jaxpeft.hf.shadows import PEFT_TYPE, read_shadow
from jaxpeft.hf.table import HEAD, Row, Table, of_model, of_names
from jaxpeft.hf.tensors import PREFIX, Reader, low_rank_keys, torch_axes
from jaxpeft.methods.layers import in_layers

NOTES = "jaxpeft.json"

Stages = list[tuple[Method, Leaves]]


def load_adapter(
    directory: str | Path,
    model: Any,
    *,
    names: Mapping[str, str] | None = None,
    sites: Sequence[Site] | None = None,
    params: Any = None,
) -> tuple[Tuned, Adapter]:
    """Reads an adapter that PEFT or `save_adapter` wrote: LoRA, a prompt, a prefix, a shadow.

    Every option of the file is followed or refused, and every tensor of it is used. Layers that
    share a stacked weight may differ in rank and alpha (see `jaxpeft.hf.methods.lora_by_layer`).

    Args:
        directory: holds `adapter_config.json` and `adapter_model.safetensors`.
        model: what the adapter is for: a model of `jaxpeft.models.load`, or any model that
            `jaxpeft.transform` takes, with `names` and `sites`.
        names: for parameter paths, or globs over them, the name of the torch module:
            `{"layers_*/q/kernel": "model.layers.*.self_attn.q_proj"}`, where each `*` of the name
            takes what the `*` of the path stands for. In the name of a parameter that is stacked
            over layers `{layer}` stands for the layer. A decoder here, and an adapter that
            `save_adapter` wrote, bring their own.
        sites: how the model uses its parameters, from
            `jaxpeft.transform(model, jaxpeft.full()).sites(params, *inputs)`.
        params: the base weights. PEFT stores the base weight of a tuned embedding too; if it equals
            the one in `params` it is left out, else it stays with the adapter as a fixed leaf.

    Returns:
        `(tuned, adapter)`, the adapter in float32.

    Raises:
        FileNotFoundError: if a file is absent.
        ValueError: if a file is damaged, an option cannot be followed, or a tensor is missing, left
            over or misshapen.

    Example:
        >>> model, params = jp.models.load("SmolLM2-135M")  # doctest: +SKIP
        >>> tuned, adapter = jp.hf.load_adapter("my-adapter", model)  # doctest: +SKIP
        >>> logits = tuned.apply(adapter, params, tokens)  # doctest: +SKIP
    """
    directory = Path(directory)
    config = read_json(directory / CONFIG)
    if str(config.get("peft_type")) in KINDS:
        own = of_names(names, sites, complete=True) if names and sites else of_model(model)
        return read_prompt(directory / WEIGHTS, config, model, own, sites)
    if config.get("peft_type") == PEFT_TYPE:
        return read_shadow(directory / WEIGHTS, config, model)
    options = read_options(directory / CONFIG)
    table = _find_table(directory, model, names, sites)
    reader = Reader(directory / WEIGHTS)
    base = {} if params is None else dict(leaves_with_paths(params)[0])
    if table.tied:
        _check_tied(table.tied, options, directory / CONFIG)
    _check_targets(options, table, directory / CONFIG)
    stages = {row.path: _stages(row, options, table, reader, base) for row in table.rows.values()}
    if table.tied:
        _read_head(table.tied, reader)
    reader.check()
    return assemble(model, table, {path: found for path, found in stages.items() if found})


def assemble(model: Any, table: Table, stages: Mapping[str, Stages]) -> tuple[Tuned, Adapter]:
    """The tuned model and the adapter from the methods and leaves at each path."""
    chosen, leaves = {}, {}
    for path, found in stages.items():
        if len(found) == 1:
            chosen[path], leaves[path] = found[0]
        else:
            chosen[path] = compose([method for method, _ in found])
            leaves[path] = {str(i): stage for i, (_, stage) in enumerate(found)}
    sites = [table.rows[path].site for path in chosen]
    return transform(model, at_paths(chosen)), Adapter(leaves, sites)


def _find_table(directory: Path, model: Any, names: Any, sites: Any) -> Table:
    own = of_model(model)
    if own and names is None:
        return own
    if names is not None and sites is not None:
        return of_names(names, sites, complete=True)
    if names is None and (directory / NOTES).is_file():
        return table_of_json(read_json(directory / NOTES), directory / NOTES)
    raise ValueError(
        f"{type(model).__name__} is no model of jaxpeft.models, so its parameters' torch names are "
        "not known. Pass names={path: module name} and "
        "sites=jaxpeft.transform(model, jaxpeft.full()).sites(params, *inputs)."
    )


def table_of_json(notes: Mapping[str, Any], path: Path) -> Table:
    """The table that `save_adapter` wrote next to the adapter."""
    try:
        sites = [read_site(site) for site in notes["sites"]]
        exact = {site.path: str(notes["names"][site.path]) for site in sites}
        return of_names(exact, sites, complete=False)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r}. Delete it and pass names=.") from error


def _check_targets(options: Options, table: Table, path: Path) -> None:
    modules = table.modules
    chosen = [m for m, held in modules.items() if _targeted(options, m, held.get("weight"))]
    if not chosen:
        raise ValueError(
            f"{path}: target_modules={options.target_modules!r} chooses none of the model's "
            f"{len(modules)} modules, such as {some(modules, 4)}."
        )
    for module in chosen:
        row = modules[module].get("weight")
        if row is None or not row.site.linear:
            raise ValueError(
                f"{path}: target_modules chooses {module!r}, which is neither a linear map nor an "
                "embedding."
            )
        if row.site.axes("batch") or any("conv" in use for use in row.site.uses):
            raise ValueError(f"{path}: LoRA on {module!r} ({row.site.roles}) cannot be read.")
    if options.lora_bias:
        for module in chosen:
            if "bias" not in modules[module]:
                raise ValueError(
                    f"{path}: the option lora_bias needs a bias to be added to, and {module!r} "
                    "has none in this model."
                )


def _targeted(options: Options, module: str, row: Row | None) -> bool:
    return options.targets(module, row is not None and row.linear, HEAD)


def _stages(
    row: Row, options: Options, table: Table, reader: Reader, base: Mapping[str, Any]
) -> Stages:
    """What the file does to one parameter, in order."""
    if row.attribute == "bias":
        return _bias(row, options, table, reader)
    found = _whole(row, options, reader)
    rows = _token_rows(row, options)
    if rows is not None:
        found += _read_rows(row, rows, reader)
    low_rank = [_targeted(options, module, row) for module in row.modules]
    if any(low_rank):
        found += [
            *_stored_base(row, low_rank, reader, base),
            _low_rank(row, low_rank, options, reader),
        ]
    if len(found) > 1 and rows is not None:
        raise ValueError(
            f"{reader.path.parent / CONFIG}: trainable_token_indices cannot be combined with "
            f"another option at {row.path!r}."
        )
    return found


def _low_rank(
    row: Row, low_rank: Sequence[bool], options: Options, reader: Reader
) -> tuple[Method, Leaves]:
    pairs = list(zip(row.modules, low_rank, strict=True))
    sizes = [(options.rank(m), options.alpha(m)) if on else (0, 1.0) for m, on in pairs]
    kept = [layer for layer, on in enumerate(low_rank) if on]
    alike = len({sizes[layer] for layer in kept}) == 1
    there = kept if alike else range(len(sizes))  # of several ranks, one may be 0
    modules = [row.modules[layer] for layer in there]
    ranks, alphas = zip(*(sizes[layer] for layer in there), strict=True)
    method = methods.lora_by_layer(
        ranks, alphas, dropout=options.lora_dropout, rslora=options.use_rslora
    )
    if len(there) < len(sizes):
        method = in_layers(method, tuple(there))
    a_sizes, b_sizes = row.site.sizes("in"), row.site.sizes("out", "")
    check_size(reader.path, (len(ranks), max(ranks), *a_sizes), reader.tensors)
    a = np.zeros((len(ranks), max(ranks), int(np.prod(a_sizes))), np.float32)
    b = np.zeros((len(ranks), max(ranks), int(np.prod(b_sizes))), np.float32)
    for at, (module, rank) in enumerate(zip(modules, ranks, strict=True)):
        if rank:
            a_key, b_key = low_rank_keys(row, module)
            a[at, :rank] = reader.take(a_key, (rank, a.shape[2]))
            b[at, :rank] = reader.take(b_key, (b.shape[2], rank)).T
    stack = a.shape[:1] if row.stacked else ()
    leaves = {
        "a": jnp.asarray(a.reshape(*stack, max(ranks), *a_sizes)),
        "b": jnp.asarray(b.reshape(*stack, max(ranks), *b_sizes)),
    }
    return method, leaves


def _stored_base(
    row: Row, low_rank: Sequence[bool], reader: Reader, base: Mapping[str, Any]
) -> Stages:
    keys = [f"{module}.base_layer.weight" for module in row.modules]
    layers = [i for i, on in enumerate(low_rank) if on and keys[i] in reader]
    if not layers:
        return []
    value = _read_value(row, layers, keys, reader)
    if row.path in base and _equal_in(row, layers, np.asarray(base[row.path], np.float32), value):
        return []
    method = methods.stored_base(layers, len(keys))
    return [(method, {"value": value})]


def _equal_in(row: Row, layers: list[int], one: np.ndarray, other: Any) -> bool:
    """Whether two values of a parameter are equal in some layers."""
    if not row.stacked:
        return np.array_equal(one, np.asarray(other))
    axis = row.site.axes("stack")[0]
    return np.array_equal(one.take(layers, axis), np.asarray(other).take(layers, axis))


def _whole(row: Row, options: Options, reader: Reader) -> Stages:
    """`modules_to_save`."""
    layers = [i for i, module in enumerate(row.modules) if options.saves(module)]
    if not layers:
        return []
    keys = [f"{module}.{row.attribute}" for module in row.modules]
    return [_full(row, layers, keys, reader)]


def _full(row: Row, layers: list[int], keys: list[str], reader: Reader) -> tuple[Method, Leaves]:
    value = _read_value(row, layers, keys, reader)
    return methods.full_by_layer(layers, len(keys)), {"value": value}


def _read_value(row: Row, layers: list[int], keys: list[str], reader: Reader) -> Any:
    """A whole parameter from the tensors of some layers, zero in the others."""
    axes, shape = torch_axes(row)
    value = np.zeros((len(keys), *shape), np.float32)
    for layer in layers:
        value[layer] = reader.take(keys[layer], shape)
    ordered = value.reshape([row.site.shape[axis] for axis in axes])
    return jnp.asarray(ordered.transpose(np.argsort(axes)))


def _bias(row: Row, options: Options, table: Table, reader: Reader) -> Stages:
    modules = table.modules
    low_rank = [_targeted(options, m, modules[m].get("weight")) for m in row.modules]
    whole = [options.saves(module) for module in row.modules]
    tuned = [options.bias == "all" or (options.bias == "lora_only" and on) for on in low_rank]
    keys = [
        f"{module}.base_layer.bias" if on else f"{module}.bias"
        for module, on in zip(row.modules, low_rank, strict=True)
    ]
    layers = [i for i in range(len(keys)) if tuned[i] or whole[i]]
    found = [_full(row, layers, keys, reader)] if layers else []
    for i, module in enumerate(row.modules):
        if whole[i] and options.bias == "all":
            _skip_copies(f"{module}.", keys[i], row, reader)
    if options.lora_bias and any(low_rank):
        found.append(_read_lora_bias(row, low_rank, options, reader))
    return found


def _skip_copies(module: str, key: str, row: Row, reader: Reader) -> None:
    """PEFT's bias="all" also lists the biases inside its wrapper of a saved module.

    The first is the trained bias again; the second the original one, which is not used.
    """
    shape = torch_axes(row)[1]
    again, original = f"{module}modules_to_save.bias", f"{module}original_module.bias"
    if again in reader and not np.array_equal(reader.take(again, shape), reader.take(key, shape)):
        reader.problems.append(f"{PREFIX}{again} differs from {PREFIX}{key}")
    if original in reader:
        reader.take(original, shape)


def _read_lora_bias(
    row: Row, low_rank: Sequence[bool], options: Options, reader: Reader
) -> tuple[Method, Leaves]:
    layers = [i for i, on in enumerate(low_rank) if on]
    keys = [f"{module}.lora_B.bias" for module in row.modules]
    scales = [
        methods.scale_of(options.rank(m), options.alpha(m), options.use_rslora) if on else 0.0
        for m, on in zip(row.modules, low_rank, strict=True)
    ]
    return methods.lora_bias(scales), {"b": _read_value(row, layers, keys, reader)}


def _token_rows(row: Row, options: Options) -> list[int] | None:
    """The tokens of `trainable_token_indices` at a parameter."""
    given = options.trainable_token_indices
    if given is None or row.attribute != "weight":
        return None
    if isinstance(given, list):
        return given if row.site.table else None
    found = [rows for name, rows in given.items() if row.modules[0].endswith(name)]
    tied = [rows for name, rows in given.items() if row.tied and HEAD.endswith(name)]
    if row.tied and any(rows != found[0] for rows in tied) if found else tied:
        raise ValueError(
            f"trainable_token_indices={given!r}: embedding and head are one weight in this model, "
            "so that they need the same indices."
        )
    return found[0] if found else None


def _read_rows(row: Row, rows: list[int], reader: Reader) -> Stages:
    method = methods.token_rows(rows)
    if not method.fits(row.site):
        raise ValueError(f"trainable_token_indices: {row.path!r} is no embedding and no head.")
    vocabulary, width = torch_axes(row)[1]
    if rows and max(rows) >= vocabulary:
        raise ValueError(f"trainable_token_indices: {max(rows)} is not in 0..{vocabulary - 1}.")
    value = reader.take(
        f"{row.modules[0]}.token_adapter.trainable_tokens_delta", (len(rows), width)
    )
    return [(method, {"value": jnp.asarray(value)})]


def _check_tied(row: Row, options: Options, path: Path) -> None:
    """A tied weight is tuned as one, or not at all."""
    module = row.modules[0]
    tuned = [_targeted(options, name, None) or options.saves(name) for name in (module, HEAD)]
    if any(tuned) and not options.ensure_weight_tying:
        raise ValueError(
            f"{path}: the adapter changes {module!r} or {HEAD!r} alone, but they are one weight in "
            "this model. In PEFT, train it with ensure_weight_tying=True, or untie the model "
            "(tie_word_embeddings=False) first."
        )
    sizes = [(options.rank(name), options.alpha(name)) for name in (module, HEAD)]
    if any(tuned) and sizes[0] != sizes[1]:
        raise ValueError(
            f"{path}: {module!r} and {HEAD!r} are one weight in this model, but their (rank, "
            f"alpha) differ: {sizes[0]} and {sizes[1]}."
        )


def _read_head(row: Row, reader: Reader) -> None:
    """Checks the tensors of a tied head, which must be those of the embedding."""
    module = row.modules[0]
    pairs = [
        (f"{HEAD}.weight", f"{module}.weight", False),
        (f"{HEAD}.lora_A.weight", f"{module}.lora_embedding_B", True),
        (f"{HEAD}.lora_B.weight", f"{module}.lora_embedding_A", True),
        (f"{HEAD}.base_layer.weight", f"{module}.base_layer.weight", False),
    ]
    for head, own, transposed in pairs:
        if head in reader and own in reader:
            expected = reader.tensors[PREFIX + own]
            expected = expected.T if transposed else expected
            if not np.array_equal(reader.take(head, expected.shape), expected.astype(np.float32)):
                reader.problems.append(f"{PREFIX}{head} is not tied to {PREFIX}{own}")
