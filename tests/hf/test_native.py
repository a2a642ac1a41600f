"""The native adapter file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import jaxpeft as jp
from jaxpeft.hf import load, load_adapter, save
from jaxpeft.hf.files import write_tensors
from jaxpeft.hf.native import factories
from tests.hf.conftest import PEFT_WARNINGS, check
from tests.hf.test_read import written
from tests.hf.test_write import made, random_adapter, same

pytestmark = PEFT_WARNINGS

Q = "**/q_proj/kernel"
TUNINGS = {
    "bare": jp.lora(2, alpha=3),
    "rules": jp.rules((Q, jp.rslora(3, alpha=5, dropout=0.1)), ("**/scale", jp.full())),
    "chain": jp.chain(jp.lora(2), jp.rules((Q, jp.lora(3, alpha=1)), ("**/scale", jp.full()))),
    "bfloat16": jp.rules((Q, jp.lora(2, dtype=jnp.bfloat16))),
    "embedding": jp.rules(("embed_tokens/*", jp.lora(2))),
}
# Files of peft with what only `load_adapter` makes: ranks by layer, parts of stacks, rows, biases.
PEFT = {
    "layers": dict(layers_to_transform=[0, 2], rank_pattern={"q_proj": 3}),
    "saved": dict(modules_to_save=["layers.1.input_layernorm"]),
    "embedding": dict(target_modules=["embed_tokens", "q_proj"]),
    "tokens": dict(trainable_token_indices=[3, 5]),
    "biases": dict(base="qwen2", bias="all", lora_bias=True, layers_to_transform=[1]),
}


def equal_trees(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_dropout_is_loaded(path):
    x, params, key = jnp.ones((2, 4)), {"w": jnp.ones((4, 3))}, jax.random.key(0)
    tuned = jp.transform(function, jp.lora(2, dropout=0.5))
    adapter = random_adapter(tuned.init(key, params, x))
    save(path, adapter, tuned)
    again, back = load(path, function)
    expected = tuned.apply(adapter, params, x, dropout_key=key)
    np.testing.assert_array_equal(again.apply(back, params, x, dropout_key=key), expected)
    assert not np.array_equal(expected, tuned.apply(adapter, params, x))


@pytest.mark.parametrize("tuning", [jp.lora(2), jp.chain(jp.lora(2), jp.lora(3))])
def test_a_file_from_before_an_option_has_its_default(path, tuning):
    x, params = jnp.ones((2, 4)), {"w": jnp.ones((4, 3))}
    tuned = jp.transform(function, tuning)
    adapter = random_adapter(tuned.init(jax.random.key(0), params, x))
    save(path, adapter, tuned)

    def forget(notes):
        options = notes["methods"]["w"]["options"]
        for one in [options, *(o for o in options.values() if isinstance(o, dict))]:
            one.pop("dropout", None)

    rewrite(path, edit_notes=forget)
    again, back = load(path, function)
    expected = tuned.apply(adapter, params, x)
    np.testing.assert_array_equal(again.apply(back, params, x), expected)
    rewrite(path, edit_notes=lambda notes: notes["methods"]["w"]["options"].update(unknown=1))
    with pytest.raises(ValueError, match="cannot be made from a file"):
        load(path, function)


def _dtypes(adapter):
    return [leaf.dtype for leaf in jax.tree.leaves(adapter)]


@pytest.mark.parametrize("name", TUNINGS)
def test_saved_is_loaded(base, tokens, tmp_path, name):
    _, model, params = base("llama")
    tuned, adapter = made(model, params, tokens, TUNINGS[name])
    path = tmp_path / "adapter.safetensors"
    save(path, adapter, tuned)
    again, back = load(path, model)
    same(back, adapter)
    assert _dtypes(back) == _dtypes(adapter)
    equal_trees(again.merge(back, params), tuned.merge(adapter, params))
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.safetensors"]
    with safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == {
            f"{site}/{'/'.join(key.key for key in keys)}"
            for site in adapter
            for keys, _ in jax.tree_util.tree_leaves_with_path(adapter[site])
        }


@pytest.mark.parametrize("name", PEFT)
def test_what_peft_wrote_survives(base, tokens, tmp_path, name):
    _, model, params = written(base, tmp_path, **PEFT[name])
    tuned, adapter = load_adapter(tmp_path, model)
    save(tmp_path / "native", adapter, tuned)
    again, back = load(tmp_path / "native", model)
    same(back, adapter)
    equal_trees(again.merge(back, params), tuned.merge(adapter, params))
    assert again.trainable(back) == tuned.trainable(adapter)


def test_every_factory_without_functions_is_found():
    assert {"lora", "rslora", "full", "lora_by_layer"} <= {f.__name__ for f in factories()}


def double(_):
    return jp.Method(
        "double",
        lambda key, site, weight: {"gain": jnp.ones(())},
        lambda site, leaves, weight, key: weight * leaves["gain"],
        lambda site: site.linear,
        lambda site: site.linear,
    )


def test_a_method_of_ones_own_needs_its_tuning(base, tokens, tmp_path):
    _, model, params = base("llama")
    tuning = jp.rules((Q, double(0)))
    tuned, adapter = made(model, params, tokens, tuning)
    path = tmp_path / "adapter.safetensors"
    save(path, adapter, tuned)
    with pytest.raises(ValueError, match="the method 'double' .* tuning="):
        load(path, model)
    same(load(path, model, tuning=tuning)[1], adapter)


@pytest.mark.parametrize("other", [jp.lora(2, alpha=4), jp.lora(3, alpha=3), jp.full()])
def test_another_tuning_is_an_error(base, tokens, tmp_path, other):
    _, model, params = base("llama")
    tuned, adapter = made(model, params, tokens, jp.rules((Q, jp.lora(2, alpha=3))))
    save(tmp_path / "a", adapter, tuned)
    with pytest.raises(ValueError, match="but tuning= has"):
        load(tmp_path / "a", model, tuning=jp.rules((Q, other)))


def function(params, x):
    return x @ params["w"]


@pytest.fixture
def path(tmp_path):
    params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    tuned = jp.transform(function, jp.lora(2))
    adapter = random_adapter(tuned.init(jax.random.key(0), params, x))
    save(tmp_path / "adapter.safetensors", adapter, tuned)
    check(load(tmp_path / "adapter.safetensors", function)[1]["w"]["a"], adapter["w"]["a"])
    return tmp_path / "adapter.safetensors"


def rewrite(path, edit_tensors=None, edit_notes=None, sign=True):
    """Changes a file; its SHA-256 is made right again unless `sign` is False."""
    from jaxpeft.hf.native import _digest

    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        notes = json.loads(file.metadata()["jaxpeft"])
    if edit_tensors:
        edit_tensors(tensors)
    if sign:
        notes["sha256"] = _digest(tensors)
    if edit_notes:
        edit_notes(notes)
    save_file(tensors, path, metadata={"jaxpeft": json.dumps(notes)})


@pytest.mark.parametrize("cut", [0, 7, 60, -1])
def test_a_truncated_file_is_named(path, cut):
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="adapter.safetensors is damaged"):
        load(path, function)


def test_a_flipped_bit_is_noticed(path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="adapter.safetensors is damaged: .* another SHA-256"):
        load(path, function)


def test_tensors_must_be_those_of_the_methods(path):
    def edit(tensors):
        tensors["w/c"] = tensors.pop("w/a")
        tensors["w/b"] = tensors["w/b"][:, :2].copy()

    rewrite(path, edit)
    message = r"w/a is missing, w/b has shape \(2, 2\), expected \(2, 3\), w/c is not expected"
    with pytest.raises(ValueError, match=message):
        load(path, function)


def put(*keys, value):
    def edit(notes):
        for key in keys[:-1]:
            notes = notes[key]
        notes[keys[-1]] = value

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        put("version", value=2),
        put("sites", value=3),
        put("sites", 0, value={"path": "w"}),
        put("sites", 0, "shape", value=["x", 3]),
        put("sites", 0, "dtype", value="float99"),
        put("sites", 0, "surprise", value=1),
        put("methods", value={}),
        put("methods", "w", "name", value="no_such_method"),
        put("methods", "w", "name", value="../../etc"),
        put("methods", "w", "options", "rank", value=-1),
        put("methods", "w", "options", "rank", value="many"),
        put("methods", "w", "options", value={"0": {"rank": 2}, "99999999": {}}),
        put("methods", "w", "options", value=[1]),
        put("sha256", value=None),
    ],
)
def test_a_hostile_header_is_an_error(path, edit):
    rewrite(path, edit_notes=edit)
    with pytest.raises(ValueError, match="adapter.safetensors"):
        load(path, function)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"version": 1}'])
def test_metadata_that_is_no_note_is_an_error(path, text):
    save_file({"w/a": np.ones(2, np.float32)}, path, metadata={"jaxpeft": text})
    with pytest.raises(ValueError, match="adapter.safetensors"):
        load(path, function)


def test_other_files_are_told_apart(path, tmp_path):
    save_file({"w": np.ones(2, np.float32)}, path)
    with pytest.raises(ValueError, match="none that jaxpeft.save wrote.*load_adapter"):
        load(path, function)
    with pytest.raises(FileNotFoundError, match="missing.safetensors is not in"):
        load(tmp_path / "missing.safetensors", function)


def test_layers_that_are_left_alone_stay_so_in_training(base, tokens, tmp_path):
    _, model, params = written(
        base, tmp_path, layers_to_transform=[0, 2], rank_pattern={"0.self_attn.q_proj": 3}, r=5
    )
    tuned, adapter = load_adapter(tmp_path, model)
    loss = lambda adapter: (tuned.apply(adapter, params, tokens) ** 2).mean()  # noqa: E731
    grads = jax.grad(loss)(adapter)["layers/self_attn/q_proj/kernel"]
    for name in ("a", "b"):
        assert not grads[name][1].any() and not grads[name][0, 3:].any()
        assert grads[name][0, :3].any() and grads[name][2].any()


def test_files_are_readable_by_whoever_may_read_other_files(tmp_path):
    path = tmp_path / "tensors.safetensors"
    write_tensors(path, {"a": np.ones(2, np.float32)}, {})
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
