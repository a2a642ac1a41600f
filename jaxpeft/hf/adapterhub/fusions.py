"""AdapterFusion in AdapterHub's files, which hold it apart from the adapters that it fuses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jaxpeft.core.adapter import Adapter, is_shared, shared_site
from jaxpeft.core.method import Method, resolve
from jaxpeft.core.transform import Tuned
from jaxpeft.flax import transform
from jaxpeft.hf.adapterhub.config import Config
from jaxpeft.hf.adapterhub.options import Fusion
from jaxpeft.hf.adapterhub.piece import AdapterHubFormatError, Context, at
from jaxpeft.hf.adapterhub.slots import File, Stacked, leaves_of, nested
from jaxpeft.hf.collect import Stage
from jaxpeft.hf.paths import at_paths
from jaxpeft.methods.bottleneck import bottleneck
from jaxpeft.methods.fusion import fuse
from jaxpeft.methods.layers import OPTION

CONFIG = "adapter_fusion_config.json"
WEIGHTS = "model_adapter_fusion.safetensors"
PICKLED = "pytorch_model_adapter_fusion.bin"

Loaded = tuple[Tuned, Adapter]


def folders(directory: Path, names: Sequence[str], given: Any) -> list[Path]:
    """Where the fused adapters are: as given, or inside of the fusion's directory or beside it."""
    if given is not None:
        return [Path(folder) for folder in given]
    inside = [directory / name for name in names]
    return [path if path.is_dir() else directory.parent / path.name for path in inside]


def assemble(
    config: Config, file: File, context: Context, model: Any, loaded: Sequence[Loaded]
) -> Loaded:
    """The fusion of adapters."""
    part = config.parts[0]
    assert isinstance(part, Fusion)
    if part.temperature:
        raise AdapterHubFormatError("temperature, whose value in training the files do not tell.")
    chosen = [methods_of(tuned, adapter) for tuned, adapter in loaded]
    _check_alike(chosen)
    fused = {path: _fused([one[path] for one in chosen], part) for path in chosen[0]}
    tuned = transform(model, at_paths(fused))

    def start(key: jax.Array, params: Any) -> Adapter:
        return tuned.init(key, params, *model.example())

    shapes = jax.eval_shape(start, jax.random.key(0), nnx.state(model))
    found = {key: tuple(leaf.shape) for key, leaf in leaves_of(shapes).items()}
    own: dict[str, dict[str, Any]] = {path: {} for path in fused}
    for slot in slots(list(fused), config.name, part, context):
        for (path, name), value in slot.read(file, found).items():
            own[path][name] = jax.numpy.asarray(value)
    leaves = {
        path: {str(i): one[1][path] for i, one in enumerate(loaded)} | nested(own[path])
        for path in fused
    }
    for _, adapter in loaded:
        leaves |= {site.path: adapter[site.path] for site in adapter.sites if is_shared(site)}
    return tuned, Adapter(leaves, shapes.sites)


def methods_of(tuned: Tuned, adapter: Adapter) -> dict[str, Method]:
    """The methods of an adapter, by path."""
    sites = [site for site in adapter.sites if not is_shared(site)]
    return resolve(tuned.tuning, sites, tuned.head, whole=False)


def _check_alike(chosen: Sequence[Mapping[str, Method]]) -> None:
    """In the library the last adapter's residuals and LayerNorms hold for all of them."""
    for one in chosen:
        odd = sorted(one.keys() ^ chosen[-1].keys())
        if odd:
            raise AdapterHubFormatError(f"fused adapters not all of which are at {odd[0]!r}.")
        for path, method in one.items():
            if method.name != "bottleneck" or OPTION in method.options:
                raise AdapterHubFormatError(
                    f"the fusion of {method.name!r} at {path!r}: bottlenecks in all layers are."
                )
            if _form(method) != _form(chosen[-1][path]):
                raise AdapterHubFormatError(f"fused adapters of several forms at {path!r}.")


def _form(method: Method) -> Any:
    return method.options["reads"], method.options["residual"]


def _fused(methods: Sequence[Method], part: Fusion) -> Method:
    parallel = methods[-1].options["reads"] == "stream"
    return fuse(
        *methods,
        maps=[name for name in ("query", "key", "value") if getattr(part, name)],
        query="x" if part.query_before_ln and not parallel else "read",
        of="result" if part.residual_before else "update",
        dropout=part.dropout_prob or 0.0,
    )


def slots(paths: Sequence[str], name: str, part: Fusion, context: Context) -> Iterator[Stacked]:
    """Where the fusion's own leaves are stored."""
    for places in context.places.sublayers.values():
        for place in places:
            path = next((p for p in (f"{place.path}:delta", f"{place.norm}:out") if p in paths), "")
            modules = [f"{module}.adapter_fusion_layer.{name}" for module in place.modules()]
            for leaf in ("query", "key", "value"):
                if path and getattr(part, leaf):
                    yield Stacked(path, leaf, at(modules, f"{leaf}.weight"), "transposed")
                if path and getattr(part, leaf) and leaf != "value":
                    yield Stacked(path, f"{leaf}_bias", at(modules, f"{leaf}.bias"))


def is_fusion(chosen: Mapping[str, Stage]) -> bool:
    return any(method.name == "fuse" for method in chosen.values())


def part_of(chosen: Mapping[str, Stage]) -> Fusion:
    """The options of a fusion.

    Raises:
        AdapterHubFormatError: if there are none.
    """
    described = {json.dumps(_options(path, method)) for path, method in chosen.items()}
    if len(described) > 1:
        raise AdapterHubFormatError("fusions that differ by place.")
    return Fusion(**json.loads(described.pop()))


def _options(path: str, method: Stage) -> dict[str, Any]:
    options = method.options
    unlike = method.name != "fuse" or options["temperature"] != 1
    if unlike or options["query"] not in ("read", "x"):
        raise AdapterHubFormatError(f"{method.name!r} at {path!r} with {dict(options)}.")
    learned = {name: name in options["maps"] for name in ("query", "key", "value")}
    return learned | {
        "query_before_ln": options["query"] == "x",
        "residual_before": options["of"] == "result",
        "regularization": learned["value"],
        "value_initialized": learned["value"],
        "dropout_prob": options["dropout"] or None,
    }


def taken_apart(
    chosen: Mapping[str, Stage], adapter: Adapter, model: Any
) -> list[tuple[Tuned, Adapter]]:
    """The adapters that are fused."""
    count = len(next(iter(chosen.values())).options["methods"])
    found = []
    for i in range(count):
        methods = {
            path: bottleneck(**method.options["methods"][i]["options"])
            for path, method in chosen.items()
        }
        common = {shared_site(name).path for m in methods.values() for name in m.shared}
        leaves = {path: adapter[path][str(i)] for path in methods}
        leaves |= {path: adapter[path] for path in common}
        sites = [site for site in adapter.sites if site.path in leaves]
        found.append((transform(model, at_paths(methods)), Adapter(leaves, sites)))
    return found
