"""PyTorch models of transformers through torchax: functions of a dict of `(out, in)` weights."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from tests.third_party.checks import (
    FORMATS,
    RANK,
    Example,
    check,
    check_packed,
    distance,
    filled,
)

pytestmark = pytest.mark.third_party
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if importlib.util.find_spec("torchax") is None:
    pytest.skip("torchax is not installed", allow_module_level=True)


def name_dropped_overloads():
    """torch 2.13 dropped the overloads for named tensors, which tables in torchax 0.0.13 list.

    Nothing calls them: a stand-in in each of their places lets torchax be imported.
    """
    for path in Path(importlib.util.find_spec("torchax").origin).parent.rglob("*.py"):
        for packet, overload in re.findall(r"aten\.(\w+)\.(\w+)", path.read_text()):
            operation = getattr(torch.ops.aten, packet)
            if re.search("dimname|names", overload.lower()) and not hasattr(operation, overload):
                setattr(operation, overload, object())


name_dropped_overloads()
import torchax  # noqa: E402

DEPTH = 2
ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
LLAMA = {**ENCODER, "vocab_size": 80, "num_key_value_heads": 1, "use_cache": False}
GPT2 = {"vocab_size": 80, "n_embd": 32, "n_layer": DEPTH, "n_head": 2, "use_cache": False}
VIT = {**ENCODER, "image_size": 16, "patch_size": 8, "num_labels": 5}
IDS = np.arange(12, dtype=np.int32).reshape(2, 6)
PIXELS = np.sin(np.arange(1536.0, dtype=np.float32)).reshape(2, 3, 16, 16)

LLAMA_MAPS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
GPT2_MAPS = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
VIT_MAPS = [
    *(f"attention.attention.{name}" for name in ("query", "key", "value")),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
]
# Prefix of a layer, maps in a layer, other maps. The tied head of GPT-2 is its embedding table.
MODELS = {
    "Llama": ("LlamaForCausalLM", LLAMA, IDS, "model.layers", LLAMA_MAPS, ["lm_head"]),
    "GPT2": ("GPT2LMHeadModel", GPT2, IDS, "transformer.h", GPT2_MAPS, []),
    "ViT": (
        "ViTForImageClassification", VIT, PIXELS, "vit.encoder.layer", VIT_MAPS,
        ["vit.embeddings.patch_embeddings.projection", "classifier"],
    ),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def case(request):
    name, options, inputs, prefix, maps, others = MODELS[request.param]
    config = getattr(transformers, f"{request.param}Config")(**options)
    model = getattr(transformers, name)(config).eval()
    layers = [f"{prefix}.{layer}.{name}" for layer in range(DEPTH) for name in maps]
    return model, inputs, [f"{name}.weight" for name in (*layers, *others)]


def extract(model, inputs):
    weights, function = torchax.extract_jax(model)

    def run(weights, x):
        return function(weights, (x,), {"return_dict": False})[0]

    return Example(run, run, weights, (jnp.asarray(inputs),))


def test_every_linear_map_is_found_and_tuned(case):
    model, inputs, paths = case
    check(extract(model, inputs), jp.lora(RANK), paths)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_every_model_runs_on_packed_weights(case, fmt):
    model, inputs, paths = case
    assert check_packed(extract(model, inputs), fmt) == sorted(paths)


def test_rules_choose_sites_by_the_names_of_the_checkpoint(case):
    model, inputs, paths = case
    first = paths[0].removesuffix(".weight").rsplit(".", 1)[-1]
    chosen = [path for path in paths if path.endswith(f".{first}.weight")]
    assert len(chosen) == DEPTH
    check(extract(model, inputs), jp.rules((f"*.{first}.weight", jp.lora(RANK))), chosen)


def test_the_merged_weights_are_the_torch_model_s_own(case):
    """Merged weights go back into the torch module, which then computes what `apply` does."""
    model, inputs, paths = case
    example = extract(model, inputs)
    tuned = jp.transform(example.model, jp.lora(RANK), strict=True)
    adapter = filled(tuned.init(jax.random.key(0), example.params, *example.inputs))
    got = tuned.apply(adapter, example.params, *example.inputs)
    merged = tuned.merge(adapter, example.params)
    state = {path: torch.from_numpy(np.array(merged[path])) for path in paths}
    with torch.no_grad():
        before = model(torch.from_numpy(inputs), return_dict=False)[0]
        assert not model.load_state_dict(state, strict=False).unexpected_keys
        expected = model(torch.from_numpy(inputs), return_dict=False)[0]
    assert distance(before, expected) > 1e-3
    assert distance(got, expected) < 1e-5
