"""Configurations with anything in them: each is read, or is an error of this library."""

import copy
import functools
import json
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxpeft as jp
from jaxpeft.hf.files import read_tensors, write_tensors
from jaxpeft.methods.shadow import shadow
from tests.hf.adapterhub.conftest import FIXTURES
from tests.hf.adapterhub.conftest import base as hub_base
from tests.methods.decoding import IDS, decoder, filled

PACKAGE = str(Path(jp.__file__).parent)
PEFT = {
    "lora": lambda model: jp.lora(2),
    "prompt": lambda model: jp.prompt_tuning(2),
    "p_tuning": lambda model: jp.p_tuning(2),
    "prefix": lambda model: jp.prefix_tuning(2),
    "multitask": lambda model: jp.multitask_prompt_tuning(2, 2),
    "cpt": lambda model: jp.cpt([1, 2], [1, 2]),
    "adaption": lambda model: jp.llama_adapter(2),
    "shadow": lambda model: shadow(2, backbone=jp.models.mirror(model)),
}
HUB = ("lora", "unipelt", "compacter", "loreft", "prompt_tuning", "reduction_map", "fusion_static")
CONFIGS = ("adapter_config.json", "adapter_fusion_config.json")


class Case(NamedTuple):
    """The configuration of an adapter, what puts a file with another one, and what reads that."""

    config: dict
    put: Callable[[Path, str], None]
    load: Callable[[Path], object]


@functools.cache
def made(kind):
    if kind.startswith("hub "):
        read = lambda folder: jp.hf.load_adapterhub(folder, hub_base("bert")[0])  # noqa: E731
        return in_directory(FIXTURES / "bert" / kind[4:], read)
    model, params = decoder()
    tuned = jp.transform(model, PEFT[kind.removeprefix("own ")](model))
    adapter = filled(jax.eval_shape(tuned.init, jax.random.key(0), params, IDS))
    folder = Path(tempfile.mkdtemp())
    if not kind.startswith("own "):
        jp.hf.save_adapter(folder, tuned, adapter, model=model)
        return in_directory(folder, lambda folder: jp.hf.load_adapter(folder, model))
    jp.save(folder / "file", adapter, tuned)
    tensors, metadata = read_tensors(folder / "file")
    put = lambda to, text: write_tensors(to / "file", tensors, {"jaxpeft": text})  # noqa: E731
    return Case(json.loads(metadata["jaxpeft"]), put, lambda to: jp.load(to / "file", model))


def in_directory(source, load):
    (name,) = (name for name in CONFIGS if (source / name).is_file())

    def put(folder, text):
        shutil.copytree(source, folder, dirs_exist_ok=True)
        (folder / name).write_text(text)

    return Case(json.loads((source / name).read_text()), put, load)


def places(value, path=()):
    """The paths of all values in a JSON value, its own included."""
    if not isinstance(value, dict | list):
        return [path]
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [path, *(at for key, v in inner for at in places(v, (*path, key)))]


def changed(value, path, new):
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = changed(value[path[0]], path[1:], new)
    return value


numbers = st.sampled_from(
    [0, -1, 1, 3, 10**400, 2**70, 0.5, -0.5, 1e308, float("nan"), float("inf"), -float("inf")]
)
words = st.sampled_from(["", "a", "8", "(", "q_proj", "all", "relu", "layers.0", "prefix_tuning"])
single = st.none() | st.booleans() | numbers | words
anything = st.recursive(
    single,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            words | st.sampled_from(["default", "0", "architecture"]), inner, max_size=2
        )
    ),
    max_leaves=4,
)


@pytest.mark.parametrize(
    "kind", [*PEFT, *(f"hub {name}" for name in HUB), "own lora", "own shadow", "own prefix"]
)
@settings(max_examples=8)
@given(data=st.data())
def test_a_configuration_is_read_or_is_an_error_that_says_why(kind, data):
    config, put, load = made(kind)
    path = data.draw(st.sampled_from(list(places(config))), "path")
    text = json.dumps(changed(config, path, data.draw(anything, "value")))
    with tempfile.TemporaryDirectory() as folder:
        put(Path(folder), text)
        try:
            load(Path(folder))
        except (ValueError, OSError) as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            assert last.filename.startswith(PACKAGE) and last.line.startswith("raise"), last


@pytest.mark.parametrize(
    ("kind", "path", "value", "message"),
    [
        ("lora", "lora_alpha", float("nan"), "the number NaN is out of range"),
        ("lora", "lora_alpha", 10**400, "the number 1000.* is out of range"),
        ("lora", "r", 10**9, "asks for .* numbers of shape"),
        (
            "prompt",
            "num_virtual_tokens",
            True,
            "num_virtual_tokens=True must be a",
        ),
        ("cpt", "opt_projection_epsilon", "a", "opt_projection_epsilon='a' must be a number of 0"),
        ("cpt", "num_virtual_tokens", 3, "num_virtual_tokens=3, but cpt_token_ids are 2"),
        ("adaption", "adapter_layers", None, "lacks the option 'adapter_layers'"),
        ("shadow", "shadow_alpha", float("inf"), "the number Infinity is out of range"),
        ("shadow", "shadow_alpha", True, "shadow_alpha=True must be a number"),
        ("shadow", "target_modules", [[1]], r"target_modules=\[\[1\]\] must be a list of names"),
        ("hub lora", "version", 3, "version=3 must be a string"),
        ("hub fusion_static", "adapter_names", [""], "adapter_names=.* must be a list of names"),
    ],
)
def test_what_is_said_of_a_value(tmp_path, kind, path, value, message):
    config, put, load = made(kind)
    put(tmp_path, json.dumps(config | {path: value}))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
