"""GPTQModel reads what `jaxpeft.models.save` writes, and transformers computes the same with it.

    pip install torch==2.13.0 transformers==5.23.* optimum==2.3.0 accelerate datasets
    pip install --no-deps gptqmodel==7.7.0 torchao==0.18.0
    pip install pypcre device-smi tokenicer logbar defuser threadpoolctl ninja
    GPTQMODEL_CPU_WORKERS=4 python -m pytest -m third_party -W default \
        tests/third_party/test_quantizers.py
"""

import importlib.util
import json

import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.models.files import open_directory, unpacked

pytestmark = pytest.mark.third_party
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if not all(map(importlib.util.find_spec, ("gptqmodel", "optimum"))):
    pytest.skip("gptqmodel and optimum are not installed", allow_module_level=True)

LINEAR = "**/{q,k,v,o,gate,up,down}_proj/kernel"
TOKENS = np.random.default_rng(0).integers(0, 126, (2, 12))
CASES = {
    "gptq": ("gptq", LINEAR, jp.quant.int4(32, scale="float16")),
    "gptq zeros": ("gptq", LINEAR, jp.quant.int4(32, symmetric=False, scale="float16")),
    "gptq 8": ("gptq", LINEAR, jp.quant.int8(None, symmetric=False, scale="float16")),
    "gptq some": ("gptq", "**/{q,up}_proj/kernel", jp.quant.int8(64, scale="float16")),
    "awq": ("awq", LINEAR, jp.quant.int4(32, symmetric=False, scale="float16")),
    "awq some": ("awq", "**/{q,up}_proj/kernel", jp.quant.int4(64, scale="float16")),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dense")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).half().save_pretrained(directory)
    return directory


@pytest.fixture(params=CASES)
def saved(dense, tmp_path, request):
    method, where, fmt = CASES[request.param]
    model, params = jp.models.load(dense, dtype=jnp.float16, quantize=jp.rules((where, fmt)))
    jp.models.save(tmp_path, model, params, quant_method=method)
    vocabulary = {str(i): i for i in range(128)}
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    return tmp_path


def weights_of_the_tool(directory):
    """By module, in float32 from the arrays that GPTQModel has loaded."""
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules import qlinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    said = json.loads((directory / "config.json").read_text())["quantization_config"]
    awq = said["quant_method"] == "awq"
    backend = BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH
    loaded = GPTQModel.load(str(directory), device="cpu", dtype=torch.float16, backend=backend)
    found = {}
    for name, module in loaded.model.named_modules():
        if isinstance(module, qlinear.BaseQuantLinear):
            module.scales = module.scales.float()
            arrays = (module.qweight, module.qzeros, module.scales, 4, module.group_size)
            dense = qlinear.PackableQuantLinear.dequantize_weight
            found[name] = (dequantize_gemm(*arrays) if awq else dense(module)).T.numpy()
    return found


def test_the_tool_reads_the_same_weights(saved):
    theirs, packed = weights_of_the_tool(saved), open_directory(saved).packed
    assert {f"{name}.weight" for name in theirs} == packed.keys()
    for name, weight in theirs.items():
        np.testing.assert_array_equal(unpacked(packed[f"{name}.weight"]), weight)


def test_transformers_computes_the_same(saved):
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        saved, dtype=torch.float16, device_map="cpu"
    ).eval()
    with torch.no_grad():
        expected = oracle(torch.tensor(TOKENS)).logits.float().numpy()
    model, params = jp.models.load(saved)
    # The oracle computes in float16.
    np.testing.assert_allclose(model.apply(params, TOKENS), expected, atol=0.01)
