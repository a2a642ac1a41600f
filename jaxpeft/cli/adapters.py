"""Adapters on disk, in whichever format they are."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxpeft.cli import models as common

CONFIG = "adapter_config.json"
FUSION = "adapter_fusion_config.json"
NATIVE = "adapter.safetensors"
WEIGHTS = "adapter_model.safetensors"
OWN, PEFT, ADAPTERHUB = "jaxpeft's own", "Hugging Face PEFT's", "AdapterHub's"

_SHOWN = (
    "r", "lora_alpha", "use_rslora", "lora_dropout", "bias", "num_virtual_tokens", "adapter_len",
    "adapter_layers", "shadow_alpha", "modules_to_save", "task_type",
)  # fmt: skip
_UNNAMED = "not named"

Described = tuple[dict[str, Any], dict[str, Any], Path]


def save_adapter(directory: Path, tuned: Any, adapter: Any, model: Any, base: str) -> Path:
    """Writes an adapter in Hugging Face PEFT's format or, if that cannot say it, in our own.

    Args:
        directory: where to.
        tuned: the tuned model.
        adapter: its adapter.
        model: the model that it is for.
        base: the model's name, for the file.

    Returns:
        The file that holds the tensors.
    """
    import jaxpeft as jp
    from jaxpeft.hf import PeftFormatError

    try:
        jp.hf.save_adapter(directory, tuned, adapter, model=model, base_model_name=base)
    except PeftFormatError:
        jp.save(directory / NATIVE, adapter, tuned, base_model_name=base)
        # An earlier adapter of PEFT's would be read in place of this one.
        (directory / CONFIG).unlink(missing_ok=True)
        return directory / NATIVE
    return directory / WEIGHTS


def load_adapter(path: Path, model: Any, params: Any) -> tuple[Any, Any]:
    """Reads an adapter of PEFT, of AdapterHub, or of ours.

    Args:
        path: a directory, or a file of ours.
        model: the model that it is for.
        params: the model's weights.

    Returns:
        `(tuned, adapter)`.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: it is damaged, or for another model.
    """
    import jaxpeft as jp

    place, form = find_adapter(path)
    if form == OWN:
        return jp.load(place, model)
    if form == PEFT:
        return jp.hf.load_adapter(place, model, params=params)
    return jp.hf.load_adapterhub(place, model)


def find_adapter(path: Path) -> tuple[Path, str]:
    """What an adapter's path stands for.

    Args:
        path: a directory, or a file of ours.

    Returns:
        `(place, form)`: the file, of our own format, or the directory; and one of the formats.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: its configuration is damaged.
    """
    if path.is_file():
        return path, OWN
    if (path / CONFIG).is_file():
        from jaxpeft.hf.files import read_json

        return path, PEFT if "peft_type" in read_json(path / CONFIG) else ADAPTERHUB
    if (path / FUSION).is_file():
        return path, ADAPTERHUB
    if (path / NATIVE).is_file():
        return path / NATIVE, OWN
    raise FileNotFoundError(
        f"{path} holds no adapter: neither {CONFIG} nor {NATIVE}. Give the --output of "
        "`jaxpeft finetune`, or an adapter's directory of PEFT or AdapterHub."
    )


def is_adapter(path: Path) -> bool:
    """Whether there is an adapter: a safetensors file, or the directory of one without a model."""
    if path.is_file():
        return path.suffix == ".safetensors"
    return any((path / name).is_file() for name in (CONFIG, FUSION, NATIVE))


def describe_adapter(path: Path) -> tuple[str, dict[str, Any]]:
    """What an adapter is, for people; no model is needed.

    Args:
        path: as for `find_adapter`.

    Returns:
        The name of its format, and pairs of what there is to know.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: it is damaged.
    """
    place, form = find_adapter(path)
    about, tensors, file = {OWN: _own, PEFT: _peft, ADAPTERHUB: _adapterhub}[form](place)
    count = sum(tensor.size for tensor in tensors.values())
    dtypes = " and ".join(sorted({str(tensor.dtype) for tensor in tensors.values()}))
    return form, about | {
        "tensors": f"{len(tensors)}, {dtypes}",
        "parameters": f"{count:,}",
        "file": f"{file.name}, {common.megabytes(file.stat().st_size)}",
    }


def _own(place: Path) -> Described:
    from jaxpeft.hf.native import read

    tensors, _, methods, base = read(place)
    paths: dict[str, list[str]] = {}
    for path, method in methods.items():
        paths.setdefault(_written(method["name"], method["options"]), []).append(path)
    about = {
        "method": "\n".join(paths),
        "sites": "\n".join(f"{len(at)}: {some(at)}" for at in paths.values()),
        "base model": base or _UNNAMED,
    }
    return about, tensors, place


def _peft(place: Path) -> Described:
    from jaxpeft.hf.files import read_json
    from jaxpeft.hf.tensors import PREFIX, Reader

    config, reader = read_json(place / CONFIG), Reader(place / WEIGHTS)
    modules = sorted({_module(name.removeprefix(PREFIX)) for name in reader.tensors})
    targets = config.get("target_modules")
    listed = sorted(map(str, targets)) if isinstance(targets, list) else [targets]
    about = {"method": config["peft_type"]}
    about |= {name: config[name] for name in _SHOWN if config.get(name) is not None}
    about |= {"target_modules": some(listed)} if targets else {}
    about |= {
        "sites": f"{len(modules)}: {some(modules)}",
        "base model": config.get("base_model_name_or_path") or _UNNAMED,
    }
    return about, reader.tensors, reader.path


def _adapterhub(place: Path) -> Described:
    from jaxpeft.hf.adapterhub import fusions
    from jaxpeft.hf.adapterhub.config import read_config
    from jaxpeft.hf.adapterhub.slots import File
    from jaxpeft.hf.files import read_json

    fused = not (place / CONFIG).is_file()
    path = place / (FUSION if fused else CONFIG)
    config, values = read_config(path), read_json(path)
    file = File(place, "", *((fusions.WEIGHTS, fusions.PICKLED) if fused else ()))
    parts = (_written(type(part).__name__.lower(), _unusual(part)) for part in config.parts)
    modules = {name.rpartition(".")[0] for name in file.tensors}
    about = {
        "name": config.name,
        "method": "; ".join(parts),
        "sites": f"{len(modules)} modules",
        "base model": f"{values.get('model_name') or _UNNAMED}, a {config.model_type}",
    }
    return about, file.tensors, file.path


def _module(tensor: str) -> str:
    """The module that a tensor of PEFT's is of."""
    module, low_rank, _ = tensor.partition(".lora_")
    return module if low_rank else tensor.rpartition(".")[0] or tensor


def _unusual(part: Any) -> dict[str, Any]:
    """The options of a part of AdapterHub's that are not the library's defaults."""
    fields = dataclasses.fields(part)
    values = {field.name: getattr(part, field.name) for field in fields}
    return {f.name: values[f.name] for f in fields if values[f.name] != f.default}


def _written(name: str, options: dict[str, Any]) -> str:
    """A method with those of its options that are set, or several in a chain.

    >>> _written("lora", {"rank": 8, "fused": [], "dropout": 0.0, "alpha": 16})
    'lora(rank=8, alpha=16)'
    """
    if options and all(key.isdigit() for key in options):
        stages = zip(name.split("+"), options.values(), strict=False)
        return " + ".join(_written(part, inner) for part, inner in stages)
    kept = {
        key: value for key, value in options.items() if value not in (None, False, 0, "", [], ())
    }
    listed = ", ".join(f"{key}={value}" for key, value in kept.items())
    return f"{name}({listed})" if listed else name


def some(names: Sequence[Any], limit: int = 8) -> str:
    """The first few of many names.

    >>> some(["b", "a"], 1)
    'b and 1 more'
    """
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + more
