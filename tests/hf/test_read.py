"""Reading adapters that peft wrote."""

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from jaxpeft.hf import load_adapter
from tests.hf.conftest import PEFT_WARNINGS, check, merged_logits, torch_logits, tune

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Options of peft, and the base model where it is not a plain llama.
CONFIGS = {
    "default": {},
    "qwen2": dict(base="qwen2", r=4, lora_alpha=16),
    "scale": dict(r=4, lora_alpha=10),
    "rslora": dict(r=4, lora_alpha=6, use_rslora=True),
    "all-linear": dict(target_modules="all-linear"),
    "every-projection": dict(target_modules=ALL, r=2),
    "regex": dict(target_modules=r"model\.layers\.[02]\..*_proj"),
    "full-names": dict(target_modules=["model.layers.1.mlp.up_proj", "self_attn.o_proj"]),
    "exclude-list": dict(
        target_modules=ALL, exclude_modules=["layers.1.self_attn.q_proj", "mlp.up_proj"]
    ),
    "exclude-regex": dict(target_modules=ALL, exclude_modules=r".*\.2\..*"),
    "layers": dict(layers_to_transform=[0, 2]),
    "layer": dict(layers_to_transform=1, layers_pattern="layers"),
    "ranks": dict(r=3, rank_pattern={"v_proj": 5, "layers.1.self_attn.q_proj": 2}),
    "alphas": dict(r=3, alpha_pattern={"q_proj": 9, r"layers\.[01]\.self_attn\.v_proj": 1}),
    "ranks-alphas-rslora": dict(
        r=3,
        use_rslora=True,
        rank_pattern={r".*\.2\..*": 6, "q_proj": 4},
        alpha_pattern={r".*\.1\..*": 5},
    ),
    "head": dict(target_modules=["lm_head", "q_proj"]),
    "embedding": dict(target_modules=["embed_tokens", "q_proj"], r=4, lora_alpha=6),
    "embedding-head": dict(target_modules=["embed_tokens", "lm_head"], r=4),
    "tied": dict(
        base="llama-tied", target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True
    ),
    "save-norms": dict(modules_to_save=["norm"]),
    "save-last-norm": dict(modules_to_save=["model.norm"]),
    "save-head": dict(modules_to_save=["lm_head", "embed_tokens"]),
    "save-some-layers": dict(modules_to_save=["layers.1.input_layernorm"]),
    "save-module": dict(modules_to_save=["mlp"], target_modules=ALL),
    "save-with-bias": dict(base="llama-biases", modules_to_save=["k_proj", "1.mlp.up_proj"]),
    "save-tied": dict(
        base="llama-tied", modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "bias-all": dict(base="qwen2", bias="all", target_modules=["q_proj", "o_proj"]),
    "bias-lora": dict(base="qwen2", bias="lora_only", target_modules=["q_proj", "o_proj"]),
    "bias-lora-layers": dict(base="qwen2", bias="lora_only", layers_to_transform=[1]),
    "bias-all-save": dict(base="llama-biases", bias="all", modules_to_save=["k_proj"]),
    "lora-bias": dict(base="qwen2", lora_bias=True, r=4, lora_alpha=12),
    "lora-bias-both": dict(
        base="qwen2",
        lora_bias=True,
        bias="all",
        alpha_pattern={"v_proj": 3},
        layers_to_transform=[2],
    ),
    "tokens": dict(trainable_token_indices=[5, 9, 30]),
    "tokens-by-name": dict(trainable_token_indices={"lm_head": [7], "embed_tokens": [3, 4]}),
    "tokens-tied": dict(base="llama-tied", trainable_token_indices=[5, 9, 30]),
    "gaussian": dict(init_lora_weights="gaussian"),
    "orthogonal": dict(init_lora_weights="orthogonal", r=4),
    "random": dict(init_lora_weights=False),
    "fan-in-fan-out": dict(fan_in_fan_out=True),
    "dropout": dict(lora_dropout=0.3),
}

pytestmark = PEFT_WARNINGS


def written(get, directory, /, **options):
    """A peft model whose adapter was saved, and our model and params."""
    name = options.pop("base", "llama")
    torch_model, model, params = get(name)
    tuned = tune(torch_model, **options)
    tuned.save_pretrained(directory)
    return tuned, model, params


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_merged_weights_and_sites(base, tokens, tmp_path, name):
    torch_model, model, params = written(base, tmp_path, **CONFIGS[name])
    tuned, adapter = load_adapter(tmp_path, model)
    expected = torch_logits(torch_model, tokens)
    check(tuned.apply(adapter, params, tokens), expected)
    check(merged_logits(model, tuned, adapter, params, tokens), expected)
    assert (
        np.abs(expected - torch_logits(base(CONFIGS[name].get("base", "llama"))[0], tokens)).max()
        > 0.05
    )
    found = {site.path: site for site in tuned.sites(params, tokens)}
    assert [site.path for site in adapter.sites] == list(adapter)
    assert all(site == found[site.path] for site in adapter.sites)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_files_are_widened(base, tokens, tmp_path, dtype):
    _, model, params = written(base, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    tuned, adapter = load_adapter(tmp_path, model)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {np.dtype("float32")}
    torch_model = peft.PeftModel.from_pretrained(base("llama")[0], tmp_path)
    check(tuned.apply(adapter, params, tokens), torch_logits(torch_model, tokens))
