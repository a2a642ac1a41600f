"""Writes AdapterHub's adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft.core.adapter import is_shared, shared_site
from jaxpeft.core.method import resolve
from jaxpeft.core.site import Site
from jaxpeft.core.transform import Adapter, Tuned
from jaxpeft.hf.adapterhub import bottleneck_parts, low_rank, prefixes, prompts, refts
from jaxpeft.hf.adapterhub.config import CONFIG, Config, changed, to_json
from jaxpeft.hf.adapterhub.found import Found
from jaxpeft.hf.adapterhub.options import Prefix
from jaxpeft.hf.adapterhub.piece import AdapterHubFormatError, Piece
from jaxpeft.hf.adapterhub.read import context_of, fresh, plan
from jaxpeft.hf.adapterhub.slots import WEIGHTS, Leaves, leaves_of
from jaxpeft.hf.files import some, write_directory, write_json, write_tensors
from jaxpeft.methods.prefix import flat_prefix
from jaxpeft.models import FAMILIES
from jaxpeft.models.tasks import EMBED

# In the order of the library's own unions.
_PARTS = (prefixes.parts, prompts.parts, bottleneck_parts.parts, low_rank.parts, refts.parts)


def save_adapterhub(
    directory: str | Path, tuned: Tuned, adapter: Adapter, model: Any, *, name: str = "adapter"
) -> None:
    """Writes an adapter as AdapterHub's library `adapters` does, for `model.load_adapter`.

    Tensors are written in float32, each file whole and then moved into place. Several methods make
    a union. What a task's head has learned is not written: the library has files of its own for
    heads.

    Args:
        directory: made if absent; an adapter in it is replaced.
        tuned: of `jaxpeft.transform` or `load_adapterhub`.
        adapter: what to save.
        model: the model that `tuned` was made of, as for `load_adapterhub`.
        name: of the adapter, a part of the names of its tensors.

    Raises:
        AdapterHubFormatError: a `ValueError`, if the library's files cannot express the adapter.
        ValueError: if the name has a dot.

    Example:
        >>> jp.hf.save_adapterhub("my-adapter", tuned, adapter, model)  # doctest: +SKIP
        >>> torch_model.load_adapter("my-adapter", use_safetensors=True)  # doctest: +SKIP
    """
    if "." in name or not name:
        raise ValueError(f"name={name!r} is a part of tensors' names: use one without dots.")
    config, tensors = _described(tuned, adapter, model, name)
    about = {"model_class": _model_class(model), "model_name": ""}

    def write(made: Path) -> None:
        write_tensors(made / WEIGHTS, tensors, {})
        write_json(made / CONFIG, to_json(config, **about))

    write_directory(Path(directory), [WEIGHTS, CONFIG], write)


def _described(
    tuned: Tuned, adapter: Adapter, model: Any, name: str
) -> tuple[Config, dict[str, np.ndarray]]:
    sites = [site for site in adapter.sites if not is_shared(site)]
    chosen = resolve(tuned.tuning, sites, tuned.head, whole=False)
    context = context_of(model, name)
    found = [one for parts in _PARTS for one in parts(chosen, context)]
    written = {at.path for _, places in found for at in places}
    if chosen.keys() - written:
        path = sorted(chosen.keys() - written)[0]
        raise AdapterHubFormatError(
            f"AdapterHub's files have no place for {chosen[path].name!r} at {path!r}. Use "
            "jaxpeft.save(path, adapter, tuned), which stores any adapter."
        )
    places = [at for _, many in found for at in many]
    config = Config(name, tuple(part for part, _ in found), model.config.model_type, context.width)
    flat = _flattened(adapter, places)
    config = _with_shared_gates(config, flat)
    pieces = [*plan(config, context)]
    leaves = _renamed(flat, places, pieces)
    _check(leaves, model, pieces)
    tensors: dict[str, np.ndarray] = {}
    for piece in pieces:
        for slot in piece.slots:
            tensors |= slot.write(leaves)
    return config, {_prefix(model) + key: value for key, value in tensors.items()}


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


def _flattened(adapter: Adapter, found: Sequence[Found]) -> Adapter:
    """With prefixes whose reparameterization is that of each layer as what they compute."""
    sites = {site.path: site for site in adapter.sites}
    paths = {at.path for at in found if at.method.name == "prefix_tuning"}
    leaves = {
        path: _flat_prefix(one, sites[path]) if path in paths else one
        for path, one in adapter.items()
    }
    return Adapter(leaves, adapter.sites)


def _flat_prefix(leaves: Mapping[str, Any], site: Site) -> dict[str, Any]:
    gates = {name: leaf for name, leaf in leaves.items() if name.startswith("gate")}
    return flat_prefix(dict(leaves), site) | gates


def _renamed(adapter: Adapter, found: Sequence[Found], pieces: Sequence[Piece]) -> Leaves:
    """The leaves, with those that sites share under the names that they have in the pieces."""
    mine = {at.path: at.method for at in found}
    names: dict[str, str] = {}
    for piece in pieces:
        old, new = mine.get(piece.path), piece.method
        for before, after in zip(old.shared if old else (), new.shared, strict=True):
            names[shared_site(before).path] = shared_site(after).path
    return {
        (names.get(path, path), name): np.asarray(leaf, np.float32)
        for (path, name), leaf in leaves_of(adapter).items()
    }


def _check(leaves: Leaves, model: Any, pieces: Sequence[Piece]) -> None:
    """That the file's methods have the leaves that the adapter's have."""
    _, shapes = fresh(model, pieces)
    wanted = {key: tuple(leaf.shape) for key, leaf in leaves_of(shapes).items()}
    given = {key: leaf.shape for key, leaf in leaves.items()}
    odd = [
        f"{key[0]}/{key[1]} is {given.get(key)}, in the files {wanted.get(key)}"
        for key in wanted.keys() | given.keys()
        if key[1] != "on" and wanted.get(key) != given.get(key)
    ]
    if odd:
        raise AdapterHubFormatError(f"leaves of other shapes: {some(odd)}.")


def _prefix(model: Any) -> str:
    bare = model.task in (None, EMBED)
    return "" if bare else FAMILIES[model.config.model_type].prefix


def _model_class(model: Any) -> str:
    described = FAMILIES[model.config.model_type].write(model.config, "float32")
    return str(described["architectures"][0])
