"""Saved packed weights: transformers computes what we do, and nothing changes on the way back."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jaxpeft as jp
from jaxpeft.models import load, save
from tests.models.packed import TOKENS, logits_of, same, wide_model

SOME = "**/{q,up}_proj/kernel"
MIXED = jp.rules(
    ("**/q_proj/kernel", jp.quant.int8(32, symmetric=False)),
    ("**/up_proj/kernel", jp.quant.int4(32)),
    ("lm_head/kernel", jp.quant.fp8(scale="tensor")),
)
# Each with the kind of file that it becomes, and the dtype in which its reader computes.
CASES = {
    "nf4": (jp.quant.nf4(), "bitsandbytes", jnp.float32),
    "fp4": (jp.rules((SOME, jp.quant.fp4(32, double=False))), "bitsandbytes", jnp.float32),
    "llm_int8": (jp.rules((SOME, jp.quant.llm_int8())), "bitsandbytes", jnp.float32),
    "mixed": (MIXED, "mixed-precision", jnp.float32),
    "fp8 blocks": (
        jp.rules((SOME, jp.quant.fp8(scale="block", tile=(32, 32)))),
        "float-quantized",
        jnp.float32,
    ),
    "mxfp4": (jp.rules((SOME, jp.quant.mxfp4())), "mxfp4-pack-quantized", jnp.bfloat16),
    "nvfp4": (
        jp.rules((SOME, jp.quant.nvfp4(inverse=True))),
        "nvfp4-pack-quantized",
        jnp.bfloat16,
    ),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dense")
    wide_model(tie_word_embeddings=False).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same(dense, tmp_path, case):
    rules, kind, dtype = CASES[case]
    model, params = load(dense, quantize=rules, dtype=dtype)
    save(tmp_path, model, params)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert kind in (said["quant_method"], said.get("format"))
    assert same(load(tmp_path, quantize="keep", dtype=dtype)[1], params)
    expected = logits_of(tmp_path, getattr(torch, dtype.__name__))
    actual = model.apply(load(tmp_path, dtype=jnp.float32)[1], TOKENS)
    # The package rounds NVFP4's weights twice, to bfloat16.
    tolerance = {"nvfp4": 0.2}.get(case, 3e-5)
    np.testing.assert_allclose(actual, expected, atol=tolerance)


def stacked(path, leaf):
    return path.endswith("kernel") and len(leaf.shape) == 3


def test_encoders_too(tmp_path):
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.BertConfig(vocab_size=64, **sizes, initializer_range=0.2, num_labels=3)
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "dense")
    model, params = load(tmp_path / "dense", quantize=jp.rules((stacked, jp.quant.nf4())))
    save(tmp_path / "packed", model, params)
    assert same(load(tmp_path / "packed", quantize="keep")[1], params)
    # In training, as bitsandbytes multiplies in bfloat16 else.
    oracle = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "packed", dtype=torch.float32
    ).train()
    for module in oracle.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = oracle(torch.tensor(TOKENS)).logits.detach().numpy()
    actual = model.apply(load(tmp_path / "packed")[1], TOKENS)
    np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_what_transformers_keeps_dense_of_a_t5(tmp_path):
    sizes = dict(d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    config = transformers.T5Config(vocab_size=64, **sizes, decoder_start_token_id=0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "dense")
    model, params = load(tmp_path / "dense", quantize=jp.rules((stacked, jp.quant.nf4())))
    with pytest.raises(ValueError, match="encoder.*wo.*of a T5. Leave 'wo' dense"):
        save(tmp_path / "packed", model, params)


@pytest.mark.parametrize(
    ("method", "fmt"),
    [
        ("gptq", jp.quant.int4(32, scale="float16")),
        ("gptq", jp.quant.int8(32, symmetric=False, scale="bfloat16")),
        ("awq", jp.quant.int4(32, symmetric=False, scale="float16")),
    ],
    ids=str,
)
def test_integers_go_into_gptq_and_awq(dense, tmp_path, method, fmt):
    """The tools read these: tests/third_party/test_quantizers.py."""
    model, params = load(dense, quantize=jp.rules((SOME, fmt)))
    save(tmp_path, model, params, quant_method=method)
    assert same(load(tmp_path, quantize="keep")[1], params)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == method and said["group_size"] == 32
    assert "model.layers.1.mlp.down_proj" in said["modules_to_not_convert"]
    assert said["dynamic"][r"-:^model\.layers\.1\.mlp\.down_proj$"] == {}
    if method == "gptq":
        assert said["checkpoint_format"] == ("gptq" if fmt.symmetric else "gptq_v2")
        assert said["modules_in_block_to_quantize"] == [["self_attn.q_proj", "mlp.up_proj"]]


def test_shards_name_all_parts(dense, tmp_path):
    model, params = load(dense, quantize=jp.rules((SOME, jp.quant.int8())))
    save(tmp_path, model, params, shard_bytes=30_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert "model.layers.2.mlp.up_proj.weight_scale" in index["weight_map"]
    assert same(load(tmp_path, quantize="keep")[1], params)


@pytest.mark.parametrize(
    ("rules", "options", "message"),
    [
        (
            jp.rules(("**/q_proj/*", jp.quant.nf4()), ("**/k_proj/*", jp.quant.int8())),
            {},
            "int8, nf4, which one directory cannot hold.*bitsandbytes with nf4, fp4",
        ),
        (
            jp.rules(("**/q_proj/*", jp.quant.nf4()), ("**/k_proj/*", jp.quant.fp4())),
            {},
            "the same options for all weights, but params hold FP4",
        ),
        (jp.rules((SOME, jp.quant.nf4())), dict(quant_method="gptq"), "directory of 'gptq' cannot"),
        (jp.rules((SOME, jp.quant.nf4())), dict(quant_method="hqq"), "'hqq' is none of bitsand"),
        (
            jp.rules(("**/q_proj/*", jp.quant.int4()), ("**/k_proj/*", jp.quant.int4(32))),
            dict(quant_method="gptq"),
            "GPTQ directory has the same options",
        ),
        (jp.rules((SOME, jp.quant.nvfp4())), {}, r"nvfp4\(inverse=True\)"),
        (jp.rules((SOME, jp.quant.gguf("q8_0"))), {}, "into a .gguf file alone"),
        (jp.rules(("**/embedding", jp.quant.nf4())), {}, "embed_tokens.*Save it dense"),
        (None, dict(quant_method="awq"), "hold no quantized weights"),
    ],
)
def test_what_a_directory_cannot_hold(tmp_path, rules, options, message):
    directory = tmp_path / "dense"
    wide_model(hidden_size=128).save_pretrained(directory)
    model, params = load(directory, quantize=rules)
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "saved", model, params, **options)
    assert not (tmp_path / "saved").exists()


def test_weights_in_host_memory_are_not_saved_from_there(tmp_path):
    wide_model(hidden_size=128).save_pretrained(tmp_path / "dense")
    model, params = load(tmp_path / "dense")
    with pytest.raises(ValueError, match="host memory, where jaxpeft.offload has put them"):
        save(tmp_path / "saved", model, jp.offload(params))
