"""Writes AdapterHub's adapters."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpeft.core.adapter import shared_site
from jaxpeft.core.method import Method
from jaxpeft.core.site import Site
from jaxpeft.core.transform import Adapter, Tuned
from jaxpeft.hf.adapterhub import bottleneck_parts, fusions, low_rank, prefixes, prompts, refts
from jaxpeft.hf.adapterhub.config import CONFIG, Config, changed, to_json
from jaxpeft.hf.adapterhub.found import Found, alone, shared_name
from jaxpeft.hf.adapterhub.options import Bottleneck, Part, Prefix
from jaxpeft.hf.adapterhub.piece import AdapterHubFormatError, Piece
from jaxpeft.hf.adapterhub.read import context_of, plan
from jaxpeft.hf.adapterhub.slots import WEIGHTS, Leaves, leaves_of
from jaxpeft.hf.collect import Stage
from jaxpeft.hf.files import some, write_directory, write_json, write_tensors
from jaxpeft.methods.prefix import flat_prefix
from jaxpeft.models import FAMILIES
from jaxpeft.models.tasks import EMBED

Tensors = dict[str, np.ndarray]

# In the order of the library's own unions.
_PARTS = (prefixes.parts, prompts.parts, bottleneck_parts.parts, low_rank.parts, refts.parts)


def save_adapterhub(
    directory: str | Path, tuned: Tuned, adapter: Adapter, model: Any, *, name: str = "adapter"
) -> None:
    """Writes an adapter as AdapterHub's library `adapters` does, for `model.load_adapter`.

    Tensors are written in float32, each file whole and then moved into place. Several methods make
    a union. A DiReFT is written as the NoReFT that computes the same, and a prefix whose layers
    have a reparameterization each as what that computes. Heads are not written: the library has
    files of their own for them. A fusion's adapters get directories of their names in it.

    Args:
        directory: made if absent; an adapter in it is replaced.
        tuned: of `jaxpeft.transform` or `load_adapterhub`.
        adapter: what to save.
        model: the model that `tuned` was made of, as for `load_adapterhub`.
        name: of the adapter, a part of the names of its tensors; of a fusion, the names of all its
            adapters with commas between them.

    Raises:
        AdapterHubFormatError: a `ValueError`, if the library's files cannot express the adapter.
        ValueError: if the name has a dot.

    Example:
        >>> jp.hf.save_adapterhub("my-adapter", tuned, adapter, model)  # doctest: +SKIP
        >>> torch_model.load_adapter("my-adapter", use_safetensors=True)  # doctest: +SKIP
    """
    if "." in name or not name:
        raise ValueError(f"name={name!r} is a part of tensors' names: use one without dots.")
    chosen, adapter = alone(tuned, adapter)
    if not fusions.is_fusion(chosen):
        config, tensors = _described(chosen, adapter, model, name)
        _write(Path(directory), config, tensors, model, (WEIGHTS, CONFIG))
        return
    config, tensors = _described_fusion(chosen, adapter, model, name)
    for one, found in zip(config.fused, fusions.taken_apart(chosen, adapter, model), strict=True):
        save_adapterhub(Path(directory) / one, *found, model, name=one)
    _write(Path(directory), config, tensors, model, (fusions.WEIGHTS, fusions.CONFIG))


def _write(
    directory: Path, config: Config, tensors: Tensors, model: Any, files: tuple[str, str]
) -> None:
    about = {"model_class": _model_class(model), "model_name": ""}

    def write(made: Path) -> None:
        write_tensors(made / files[0], tensors, {})
        write_json(made / files[1], to_json(config, **about))

    write_directory(directory, files, write)


def _described_fusion(
    chosen: Mapping[str, Stage], adapter: Adapter, model: Any, name: str
) -> tuple[Config, Tensors]:
    part, context = fusions.part_of(chosen), context_of(model, name)
    names = tuple(name.split(","))
    count = len(next(iter(chosen.values())).options["methods"])
    if len(names) != count:
        raise ValueError(
            f"name={name!r} for a fusion of {count} adapters: give the name of each, as in "
            f"{','.join('abcdefghijklmnopqrstuvwxyz'[:count])!r}."
        )
    leaves = {key: np.asarray(leaf, np.float32) for key, leaf in leaves_of(adapter).items()}
    tensors: Tensors = {}
    for slot in fusions.slots(list(chosen), name, part, context):
        tensors |= slot.write(leaves)
    config = Config(name, (part,), model.config.model_type, context.width, names)
    return config, {_prefix(model) + key: value for key, value in tensors.items()}


def _described(
    chosen: Mapping[str, Stage], adapter: Adapter, model: Any, name: str
) -> tuple[Config, Tensors]:
    context = context_of(model, name)
    found = [one for parts in _PARTS for one in parts(chosen, context)]
    written = {at.path for _, places in found for at in places}
    if chosen.keys() - written:
        path = sorted(chosen.keys() - written)[0]
        raise AdapterHubFormatError(
            f"AdapterHub's files have no place for {chosen[path].name!r} at {path!r}. Use "
            "jaxpeft.save(path, adapter, tuned), which stores any adapter."
        )
    _check_union([part for part, _ in found])
    places = [at for _, many in found for at in many]
    config = Config(name, tuple(part for part, _ in found), model.config.model_type, context.width)
    adapter = _expressed(adapter, places)
    config = _with_shared_gates(config, adapter)
    pieces = [*plan(config, context)]
    leaves = _renamed(adapter, places, pieces)
    _check(leaves, adapter, pieces)
    tensors: Tensors = {}
    for piece in pieces:
        for slot in piece.slots:
            tensors |= slot.write(leaves)
    return config, {_prefix(model) + key: value for key, value in tensors.items()}


def _check_union(parts: Sequence[Part]) -> None:
    """That the library takes these parts together."""
    bottlenecks = [part for part in parts if isinstance(part, Bottleneck) and not part.leave_out]
    for one, other in itertools.combinations(bottlenecks, 2):
        same = one.mh_adapter == other.mh_adapter or one.output_adapter == other.output_adapter
        if same:
            raise AdapterHubFormatError(
                "bottleneck adapters with other options at one kind of sublayer than at another, "
                "which the library takes for the attentions and the feed-forward sublayers alone."
            )


def _with_shared_gates(config: Config, adapter: Adapter) -> Config:
    """With one gate for keys and values where they are equal, as they are in shared ones."""
    pairs = [
        (leaves[name], adapter[path.replace(":key", ":value")][name])
        for path, leaves in adapter.items()
        for name in ("gate", "gate_bias")
        if path.endswith(":key") and name in leaves
    ]
    if not all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs):
        return config
    return changed(config, Prefix, {"shared_gating": True})


def _expressed(adapter: Adapter, found: Sequence[Found]) -> Adapter:
    """With the leaves of methods that the files do not have as those of methods that do the same.

    Those are prefixes whose layers have a reparameterization each, and DiReFT.
    """
    sites = {site.path: site for site in adapter.sites}
    leaves = dict(adapter)
    for one in found:
        if one.method.name == "prefix_tuning":
            leaves[one.path] = _flat_prefix(adapter[one.path], sites[one.path])
        if one.method.name == "direft":
            leaves[one.path] = refts.as_noreft(adapter[one.path])
    return Adapter(leaves, adapter.sites)


def _flat_prefix(leaves: Mapping[str, Any], site: Site) -> dict[str, Any]:
    gates = {name: leaf for name, leaf in leaves.items() if name.startswith("gate")}
    return flat_prefix(dict(leaves), site) | gates


def _renamed(adapter: Adapter, found: Sequence[Found], pieces: Sequence[Piece]) -> Leaves:
    """The leaves, with those that sites share under the names that they have in the pieces."""
    mine = {at.path: at.method for at in found}
    names: dict[str, str] = {}
    for piece in pieces:
        old = shared_name(mine[piece.path])
        if old is not None:
            (new,) = piece.method.shared
            names[shared_site(old).path] = shared_site(new).path
    return {
        (names.get(path, path), name): np.asarray(leaf, np.float32)
        for (path, name), leaf in leaves_of(adapter).items()
    }


def _check(leaves: Leaves, adapter: Adapter, pieces: Sequence[Piece]) -> None:
    """That the file's methods have the leaves that the adapter's have."""
    sites = {site.path: site for site in adapter.sites}
    wanted: dict[tuple[str, str], tuple[int, ...]] = {}
    for piece in pieces:
        one = {piece.path: _shapes(piece.method, sites[piece.path])}
        wanted |= {key: tuple(leaf.shape) for key, leaf in leaves_of(one).items()}
    given = {key: leaf.shape for key, leaf in leaves.items() if key[0] in sites}
    odd = [
        f"{key[0]}/{key[1]} is {given.get(key)}, in the files {wanted.get(key)}"
        for key in wanted.keys() | given.keys()
        if wanted.get(key) != given.get(key) and "shared:" not in key[0]
    ]
    if odd:
        raise AdapterHubFormatError(f"leaves of other shapes: {some(odd)}.")


def _shapes(method: Method, site: Site) -> Any:
    weight = jax.ShapeDtypeStruct(site.shape, site.dtype)
    return jax.eval_shape(lambda key: method.init(key, site, weight), jax.random.key(0))


def _prefix(model: Any) -> str:
    bare = model.task in (None, EMBED)
    return "" if bare else FAMILIES[model.config.model_type].prefix


def _model_class(model: Any) -> str:
    described = FAMILIES[model.config.model_type].write(model.config, "float32")
    return str(described["architectures"][0])
