"""The native adapter file: one safetensors file that holds any adapter.

Tensors are named `site path/leaf`. The header's metadata has one key, "jaxpeft", with JSON: the
format's version, the sites, each site's leaves, its method's name and options, and a SHA-256 over
the tensors.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft.methods
from jaxpeft.core.adapter import is_shared, shared_inits
from jaxpeft.core.method import Method, compose, resolve
from jaxpeft.core.site import Site
from jaxpeft.core.transform import Adapter, Tuned
from jaxpeft.core.tree import leaves_with_paths
from jaxpeft.flax import transform
from jaxpeft.hf import methods
from jaxpeft.hf.adapterhub import methods as adapterhub_methods
from jaxpeft.hf.files import (
    parse_json,
    read_site,
    read_tensors,
    some,
    write_directory,
    write_tensors,
)
from jaxpeft.hf.paths import at_paths
from jaxpeft.methods import layers
from jaxpeft.models import mirror

VERSION = 1
_KEY = "jaxpeft"
# Arguments of factories that matter to fresh adapters only, and so need not be in a file.
_START = {"init", "dtype"}


class Contents(NamedTuple):
    """What a file says of itself.

    Attributes:
        tensors: by name, `site path/leaf`.
        sites: those of the methods, and of leaves that several share.
        methods: `{path: {"name": ..., "options": {...}}}`.
        base_model_name: of the model, if it was given when the file was saved.
    """

    tensors: dict[str, np.ndarray]
    sites: list[Site]
    methods: dict[str, Any]
    base_model_name: str | None


def save(
    path: str | Path, adapter: Adapter, tuned: Tuned, *, base_model_name: str | None = None
) -> None:
    """Writes an adapter of any methods to one safetensors file, in the dtypes that it has.

    The file is written whole and then moved into place.

    Args:
        path: of the file, such as "adapter.safetensors".
        adapter: what to save.
        tuned: the tuned model that it belongs to, whose methods are written by name and options.
        base_model_name: name or path of the model, for people and for `jaxpeft inspect`.

    Raises:
        ValueError: if two leaves would have the same name.

    Example:
        >>> jp.save("adapter.safetensors", adapter, tuned)  # doctest: +SKIP
        >>> tuned, adapter = jp.load("adapter.safetensors", model)  # doctest: +SKIP
    """
    path = Path(path)
    own = [site for site in adapter.sites if not is_shared(site)]
    chosen = resolve(tuned.tuning, own, tuned.head, whole=False)
    tensors = _named(adapter)
    notes = {
        "version": VERSION,
        "sites": [site.to_json() for site in adapter.sites],
        "methods": {site.path: describe(chosen[site.path]) for site in own},
        "sha256": _digest(tensors),
        "base_model_name": base_model_name,
    }
    metadata = {_KEY: json.dumps(notes, sort_keys=True)}
    write_directory(
        path.parent, [path.name], lambda made: write_tensors(made / path.name, tensors, metadata)
    )


def load(path: str | Path, model: Any, *, tuning: Any = None) -> tuple[Tuned, Adapter]:
    """Reads what `save` wrote.

    Args:
        path: of the file.
        model: the model that the adapter is for, as for `jaxpeft.transform`.
        tuning: the tuning that the adapter was made with. Needed for methods that are not of this
            library or have functions among their options; others are made again from the file.

    Returns:
        `(tuned, adapter)`. A method that is made again starts fresh adapters in its default way.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or no adapter, lacks a tensor or has one too many, or `tuning`
            is not what it was saved with.
    """
    path = Path(path)
    tensors, everywhere, described, _ = read(path)
    sites = [site for site in everywhere if not is_shared(site)]
    if tuning is None:
        chosen = {site.path: _build(path, site, described[site.path], model) for site in sites}
        tuned = transform(model, at_paths(chosen))
    else:
        tuned = transform(model, tuning)
        chosen = resolve(tuning, sites, tuned.head, whole=False)
        _check_tuning(path, chosen, described)
    shapes = {site.path: _shapes(path, chosen[site.path], site) for site in sites}
    key = jax.random.key(0)
    shapes |= {at: jax.eval_shape(start, key) for at, start in shared_inits(chosen).items()}
    return tuned, _filled(path, Adapter(shapes, everywhere), tensors)


def read(path: Path) -> Contents:
    """What `save` wrote, without the model that it is for.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or no adapter of `save`.
    """
    tensors, metadata = read_tensors(path)
    notes = _read_notes(path, metadata)
    if notes["sha256"] != _digest(tensors):
        raise ValueError(f"{path} is damaged: its tensors have another SHA-256 than when saved.")
    sites, methods = _parse(path, notes)
    name = notes.get("base_model_name")
    return Contents(tensors, sites, methods, name if isinstance(name, str) else None)


def _named(adapter: Adapter) -> dict[str, Any]:
    pairs, _ = leaves_with_paths(adapter)
    named = {name: np.asarray(leaf) for name, leaf in pairs}
    if len(named) < len(pairs):
        raise ValueError(f"two leaves have one name among {some(named)}. Rename a parameter.")
    return named


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype.name} {tensor.shape};".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def describe(method: Method) -> dict[str, Any]:
    """A method's name and options as JSON values.

    >>> from jaxpeft.methods.full import full
    >>> describe(full())
    {'name': 'full', 'options': {}}
    """
    try:
        return {"name": method.name, "options": json.loads(json.dumps(dict(method.options)))}
    except TypeError as error:
        raise ValueError(
            f"the options of {method.name!r} are no JSON values: {error}. A method's `options` "
            "hold numbers, strings, lists and dicts."
        ) from error


def _read_notes(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if _KEY not in metadata:
        raise ValueError(
            f"{path} is a safetensors file, but none that jaxpeft.save wrote. Adapters of Hugging "
            "Face PEFT are read with jaxpeft.hf.load_adapter(directory, model)."
        )
    try:
        notes = parse_json(metadata[_KEY])
        version = notes["version"]
        whole = {"sites", "methods", "sha256"} <= notes.keys()
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: its metadata cannot be read ({error!r}).") from error
    if version != VERSION or not whole:
        raise ValueError(
            f"{path} has format version {version!r}; this version of jaxpeft reads {VERSION}."
        )
    return notes


def _parse(path: Path, notes: Mapping[str, Any]) -> tuple[list[Site], dict[str, Any]]:
    try:
        sites = [read_site(site) for site in notes["sites"]]
        described = {
            site.path: {
                "name": str(notes["methods"][site.path]["name"]),
                "options": dict(notes["methods"][site.path]["options"]),
            }
            for site in sites
            if not is_shared(site)
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: a site cannot be read ({error!r}).") from error
    return sites, described


def _build(path: Path, site: Site, described: Mapping[str, Any], model: Any) -> Method:
    name, options = described["name"], described["options"]
    try:
        found = _from_options(name, options, model)
    except RecursionError:
        found = None
    if found is None:
        raise ValueError(
            f"{path}: the method {name!r} with options {options} at {site.path!r} cannot be made "
            "from a file. Pass the tuning that it was saved with: jaxpeft.load(path, model, "
            "tuning=...)."
        )
    return found


def _from_options(name: str, options: Mapping[str, Any], model: Any) -> Method | None:
    if not isinstance(options, Mapping):
        return None
    if options and all(number.isdigit() for number in options):
        return _chain(name.split("+"), options, model)
    if layers.OPTION in options:
        return _in_layers(name, options, model)
    for factory in factories():
        method = _attempt(factory, name, options, model)
        if method and describe(method) == {"name": name, "options": options}:
            return method
    return _of_older(name, options, model)


def _of_older(name: str, options: Mapping[str, Any], model: Any) -> Method | None:
    """A method from a file that was written before some of its options were there."""
    for factory in factories():
        if factory.__name__ != name:
            continue
        method = _attempt(factory, name, options, model, short=True)
        now = method and describe(method)
        if now and now["name"] == name and now["options"] == now["options"] | options:
            return method
    return None


def _chain(names: list[str], options: Mapping[str, Any], model: Any) -> Method | None:
    if len(names) != len(options):
        return None
    stages = {
        int(number): _from_options(name, options[number], model)
        for name, number in zip(names, options, strict=True)
    }
    if None in stages.values() or max(stages) > 1000:
        return None
    return compose([stages.get(i) for i in range(max(stages) + 1)])


def _in_layers(name: str, options: Mapping[str, Any], model: Any) -> Method | None:
    rest = {option: value for option, value in options.items() if option != layers.OPTION}
    method = _from_options(name, rest, model)
    try:
        return method and layers.in_layers(method, layers.selection(options[layers.OPTION]))
    except (TypeError, ValueError):
        return None


def _attempt(
    factory: Callable[..., Any],
    name: str,
    options: Mapping[str, Any],
    model: Any,
    *,
    short: bool = False,
) -> Method | None:
    """What a factory makes of options; if they may be `short`, others have their defaults."""
    parameters = inspect.signature(factory).parameters
    wanted = parameters.keys() - _START
    if short:
        wanted = {
            n for n in wanted if n in options or parameters[n].default is inspect.Parameter.empty
        }
    if not wanted <= options.keys():
        return None
    several = [at for at in wanted if parameters[at].kind is inspect.Parameter.VAR_POSITIONAL]
    if several and factory.__name__ != name:  # each part is made once, however deep they are
        return None
    try:
        given = {at: _value(options[at], model) for at in wanted}
        made_of = [_part(one, model) for at in several for one in given.pop(at)]
        method = factory(*made_of, **given)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return method if isinstance(method, Method) else None


def _part(described: Mapping[str, Any] | None, model: Any) -> Method | None:
    """One of the methods that a method is made of."""
    return _from_options(described["name"], described["options"], model) if described else None


def _value(option: Any, model: Any) -> Any:
    """The value of an option; a mirror of the model is made again."""
    if not isinstance(option, Mapping) or "mirror" not in option:
        return option
    return mirror(
        model, option["mirror"], intermediate=option["intermediate"], heads=option["heads"]
    )


def factories() -> list[Callable[..., Any]]:
    """The functions of `jaxpeft.methods`, and of the files' own methods, that return a method."""
    modules = [
        importlib.import_module(f"{jaxpeft.methods.__name__}.{info.name}")
        for info in pkgutil.iter_modules(jaxpeft.methods.__path__)
    ]
    return [
        value
        for module in [*modules, methods, adapterhub_methods]
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
        and inspect.signature(value).return_annotation in ("Method", Method)
    ]


def _check_tuning(path: Path, chosen: Mapping[str, Method], described: Mapping[str, Any]) -> None:
    for site, saved in described.items():
        now = describe(chosen[site]) if site in chosen else None
        if now != saved:
            raise ValueError(
                f"{path} was saved with {saved} at {site!r}, but tuning= has {now} there. "
                "Pass the tuning that it was saved with."
            )


def _shapes(path: Path, method: Method, site: Site) -> Any:
    """The leaves of a method at a site, as shapes."""
    weight = jax.ShapeDtypeStruct(site.shape, site.dtype)
    try:
        if not method.fits(site):
            raise ValueError(f"it does not fit the roles {site.roles}")
        return jax.eval_shape(lambda k, w: method.init(k, site, w), jax.random.key(0), weight)
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        raise ValueError(f"{path}: {method.name!r} cannot be at {site.path!r}: {error}.") from error


def _filled(path: Path, expected: Adapter, tensors: Mapping[str, np.ndarray]) -> Adapter:
    pairs, tree = leaves_with_paths(expected)
    shapes = {name: tuple(leaf.shape) for name, leaf in pairs}
    problems = [
        *(f"{name} is missing" for name in sorted(shapes.keys() - tensors.keys())),
        *(f"{name} is not expected" for name in sorted(tensors.keys() - shapes.keys())),
        *(
            f"{name} has shape {tensors[name].shape}, expected {shape}"
            for name, shape in shapes.items()
            if name in tensors and tensors[name].shape != shape
        ),
    ]
    if problems:
        raise ValueError(f"{path} does not fit its own list of methods: {some(problems, 12)}.")
    return tree.unflatten([jnp.asarray(tensors[name]) for name, _ in pairs])
