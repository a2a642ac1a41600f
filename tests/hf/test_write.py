"""Adapters that we write, read by peft and by ourselves."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from safetensors import safe_open

import jaxpeft as jp
from jaxpeft.hf import PeftFormatError, load_adapter, save_adapter
from tests.hf.conftest import PEFT_WARNINGS, check, merged_logits, torch_logits, tune
from tests.hf.test_read import CONFIGS, written

pytestmark = PEFT_WARNINGS

PROJECTIONS = "layers/{self_attn,mlp}/*/kernel"
QV = ("**/{q,v}_proj/kernel", jp.lora(4, alpha=6))
# Tunings, the base model where it is not a plain llama, and what the configuration must then say.
TUNINGS = {
    "bare": (jp.lora(2, alpha=3), "llama", dict(r=2, lora_alpha=3, use_rslora=False)),
    "rslora": (jp.rslora(3, alpha=5), "qwen2", dict(use_rslora=True, lora_alpha=5)),
    "some": (
        jp.rules(QV),
        "qwen2",
        dict(target_modules=["q_proj", "v_proj"], rank_pattern={}, modules_to_save=None),
    ),
    "ranks": (
        jp.rules(("**/mlp/**", jp.lora(2)), ("**/q_proj/kernel", jp.lora(5, alpha=1))),
        "llama",
        dict(r=2, lora_alpha=2, rank_pattern={"q_proj": 5}, alpha_pattern={"q_proj": 1}),
    ),
    "mixed-scales": (
        jp.rules(("**/q_proj/kernel", jp.rslora(4, alpha=6)), ("**/v_proj/kernel", jp.lora(4))),
        "llama",
        dict(use_rslora=False, alpha_pattern={"v_proj": 4}, lora_alpha=12),
    ),
    "dropout": (
        jp.rules(("**/q_proj/kernel", jp.lora(2, dropout=0.25))),
        "llama",
        dict(lora_dropout=0.25),
    ),
    "upper layers": (jp.layers(jp.rules(QV), slice(1, None)), "llama", dict(r=4)),
    "head": (jp.rules(("lm_head/kernel", jp.lora(2))), "llama", dict(target_modules=["lm_head"])),
    "embedding": (
        jp.rules(("embed_tokens/embedding", jp.lora(2)), QV),
        "llama",
        dict(target_modules=["embed_tokens", "q_proj", "v_proj"], ensure_weight_tying=False),
    ),
    "tied": (
        jp.rules(("embed_tokens/embedding", jp.lora(2)), QV),
        "llama-tied",
        dict(target_modules=["embed_tokens", "q_proj", "v_proj"], ensure_weight_tying=True),
    ),
    "norms": (
        jp.rules(QV, ("**/*norm/scale", jp.full())),
        "llama",
        dict(modules_to_save=["norm"]),
    ),
    "last-norm": (
        jp.rules(QV, ("norm/scale", jp.full())),
        "llama",
        dict(modules_to_save=["model.norm"]),
    ),
    "save-head": (
        jp.rules(QV, ("lm_head/kernel", jp.full()), ("embed_tokens/embedding", jp.full())),
        "llama",
        dict(modules_to_save=["embed_tokens", "lm_head"]),
    ),
    "save-tied": (
        jp.rules(QV, ("embed_tokens/embedding", jp.full())),
        "llama-tied",
        dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "save-with-bias": (
        jp.rules(QV, ("**/k_proj/*", jp.full())),
        "llama-biases",
        dict(modules_to_save=["k_proj"], bias="none"),
    ),
    "bias-all": (
        jp.rules(("**/q_proj/kernel", jp.lora(4)), ("**/bias", jp.full())),
        "qwen2",
        dict(bias="all"),
    ),
    "bias-lora": (
        jp.rules(QV, ("**/{q,v}_proj/bias", jp.full())),
        "qwen2",
        dict(bias="lora_only"),
    ),
    "bias-and-save": (
        jp.rules(QV, ("**/mlp/up_proj/*", jp.full()), ("**/bias", jp.full())),
        "llama-biases",
        dict(bias="all", modules_to_save=["up_proj"]),
    ),
}


def random_adapter(adapter, seed=0):
    leaves, tree = jax.tree.flatten(adapter)
    rng = np.random.default_rng(seed)
    return tree.unflatten(
        [leaf + jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    )


def made(model, params, tokens, tuning):
    tuned = jp.transform(model, tuning)
    return tuned, random_adapter(tuned.init(jax.random.key(0), params, tokens))


def same(one, other):
    assert list(one) == list(other)
    assert one.sites == other.sites
    jax.tree.map(np.testing.assert_array_equal, dict(one), dict(other))


@pytest.mark.parametrize("name", TUNINGS)
def test_peft_reads_what_we_write(base, tokens, tmp_path, name):
    tuning, base_name, expected = TUNINGS[name]
    torch_model, model, params = base(base_name)
    tuned, adapter = made(model, params, tokens, tuning)
    save_adapter(tmp_path, tuned, adapter, model=model)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {key: config[key] for key in expected} == expected
    logits = tuned.apply(adapter, params, tokens)
    check(torch_logits(peft.PeftModel.from_pretrained(torch_model, tmp_path), tokens), logits)
    again, back = load_adapter(tmp_path, model)
    same(back, adapter)
    check(merged_logits(model, again, back, params, tokens), logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_rewriting_what_peft_wrote_loses_nothing(base, tokens, tmp_path, name):
    torch_model, model, _ = written(base, tmp_path / "peft", **CONFIGS[name])
    tuned, adapter = load_adapter(tmp_path / "peft", model)
    save_adapter(tmp_path / "ours", tuned, adapter, model=model)
    fresh = base(CONFIGS[name].get("base", "llama"))[0]
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours")
    check(torch_logits(again, tokens), torch_logits(torch_model, tokens))
    first, second = (tensors(tmp_path / place) for place in ("peft", "ours"))
    assert second.keys() <= first.keys()
    for key, value in second.items():
        np.testing.assert_array_equal(value, first[key], err_msg=key)


def tensors(directory):
    with safe_open(directory / "adapter_model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        return {key: file.get_tensor(key) for key in file.keys()}


def test_the_keys_are_those_of_peft(base, tokens, tmp_path):
    torch_model, model, params = base("llama")
    tune(torch_model).save_pretrained(tmp_path / "peft")
    tuned, adapter = made(model, params, tokens, jp.rules(("**/{q,v}_proj/kernel", jp.lora(8))))
    save_adapter(tmp_path / "ours", tuned, adapter)
    first, second = (
        json.loads((tmp_path / place / "adapter_config.json").read_text())
        for place in ("peft", "ours")
    )
    first["target_modules"].sort()
    assert second | {"base_model_name_or_path": None} == first | {"base_model_name_or_path": None}
    text = (tmp_path / "ours" / "adapter_config.json").read_text()
    assert text == json.dumps(second, indent=2, sort_keys=True) + "\n"
    assert tensors(tmp_path / "peft").keys() == tensors(tmp_path / "ours").keys()
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "jaxpeft.json",
    ]  # fmt: skip


INEXPRESSIBLE = {
    "chain": (jp.chain(jp.lora(2), jp.lora(3)), "more than one LoRA"),
    "no-lora": (jp.rules(("**/scale", jp.full())), "no LoRA"),
    "some-biases": (
        jp.rules(("**/v_proj/kernel", jp.lora(2)), ("**/q_proj/bias", jp.full())),
        "biases of 3 modules",
    ),
    "kernel-without-bias": (
        jp.rules(("**/v_proj/kernel", jp.lora(2)), ("**/q_proj/kernel", jp.full())),
        "not on its bias",
    ),
    "dropouts": (
        jp.rules(("**/v_proj/kernel", jp.lora(2)), ("**/q_proj/kernel", jp.lora(2, dropout=0.5))),
        "lora_dropout is one value",
    ),
    "other-method": (
        jp.rules(("**/v_proj/kernel", jp.lora(2)._replace(name="dora"))),
        "tuned with 'dora'",
    ),
}


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_what_peft_cannot_express_is_an_error(base, tokens, tmp_path, name):
    tuning, message = INEXPRESSIBLE[name]
    _, model, params = base("qwen2")
    tuned, adapter = made(model, params, tokens, tuning)
    with pytest.raises(PeftFormatError, match=message) as error:
        save_adapter(tmp_path / "out", tuned, adapter, model=model)
    assert "jaxpeft.save" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_trained_biases_need_the_model(base, tokens, tmp_path):
    _, model, params = base("qwen2")
    tuned, adapter = made(model, params, tokens, TUNINGS["bias-all"][0])
    with pytest.raises(ValueError, match="Pass model="):
        save_adapter(tmp_path, tuned, adapter)


def test_a_base_weight_equal_to_that_of_params_is_left_out(base, tmp_path):
    _, model, params = written(base, tmp_path, target_modules=["embed_tokens", "lm_head"], r=2)
    path = "embed_tokens/embedding"
    kept = load_adapter(tmp_path, model)
    assert kept[1][path]["0"]["value"].shape == (64, 32)
    assert kept[0].trainable(kept[1])[path] == {"0": {"value": False}, "1": {"a": True, "b": True}}
    dropped = load_adapter(tmp_path, model, params=params)[1]
    assert dropped[path].keys() == dropped["lm_head/kernel"].keys() == {"a", "b"}
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    assert "0" in load_adapter(tmp_path, model, params=other)[1][path]


def test_a_failed_write_keeps_the_old_files(base, tokens, tmp_path, monkeypatch):
    _, model, params = base("llama")
    tuned, adapter = made(model, params, tokens, jp.rules(QV))
    save_adapter(tmp_path, tuned, adapter)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("jaxpeft.hf.files.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(tmp_path, tuned, random_adapter(adapter))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_adapter_whose_start_changed_the_base_is_read_on_the_old_one(base, tokens, tmp_path):
    """PiSSA on a residual base, as PEFT's plain LoRA of twice the rank on the original one."""
    torch_model, model, params = base("llama")
    tuned = jp.transform(model, jp.rules(QV))
    rest, start = jp.pissa(tuned, tuned.init(jax.random.key(0), params, tokens), params)
    noise = np.random.default_rng(0)
    trained = jax.tree.map(lambda x: x + 0.1 * noise.standard_normal(x.shape).astype("f"), start)
    save_adapter(tmp_path, *jp.hf.difference(tuned, trained, start))
    theirs = torch_logits(peft.PeftModel.from_pretrained(torch_model, tmp_path), tokens)
    ours = merged_logits(model, tuned, trained, rest, tokens)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
