"""Write tests/fixtures/packed: layers that GPTQModel, AutoAWQ, auto-round and ModelOpt packed.

Runs in an environment of its own, on a CPU:

    pip install torch==2.13.0 transformers==5.23.* numpy safetensors optimum==2.3.0 datasets
    pip install --no-deps gptqmodel==7.7.0 autoawq==0.2.9 auto-round==0.16.1 torchao==0.18.0
    pip install --no-deps nvidia-modelopt==0.47.0
    pip install omegaconf pulp scipy torchprofile
    pip install pypcre device-smi tokenicer logbar defuser threadpoolctl py-cpuinfo ninja accelerate
    GPTQMODEL_CPU_WORKERS=4 python scripts/packed_fixtures.py

`words.safetensors` has each layer's tensors as the tool writes them, and under "dense" the weight
(out, in) that the tool itself makes of them; for AWQ's "gemv", which has no reader for CPUs, the
weight that it was given, which lies on the grid. Floats of 8 bits are there as bytes.
`words.json` has the `quantization_config`s.
"""

import json
from pathlib import Path

import torch
from auto_round_extension.torch.qlinear_torch import QuantLinear as AutoRound
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear as AutoRoundV1
from awq.models._config import AwqConfig
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.modules.linear.gemv import WQLinear_GEMV
from awq.utils.packing_utils import dequantize_gemm
from gptqmodel import QuantizeConfig
from gptqmodel.nn_modules.qlinear import PackableQuantLinear
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization import FORMAT, METHOD
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
from safetensors.torch import save_file

FOLDER = Path(__file__).parents[1] / "tests" / "fixtures" / "packed"
OUT = 8
# Bits, size of the groups, symmetric, order of activations, version, inputs.
GPTQ = [
    (4, 32, True, False, 1, 128),
    (4, 128, True, False, 2, 128),
    (4, -1, True, True, 1, 128),
    (4, 32, True, True, 1, 128),
    (4, 32, False, False, 1, 128),
    (4, 32, False, True, 2, 128),
    (4, -1, False, False, 2, 128),
    (4, 128, True, False, 1, 192),
    (4, 128, False, True, 2, 192),
    (8, 32, True, False, 1, 128),
    (8, 32, False, False, 1, 128),
    (8, -1, False, True, 2, 128),
    (8, 128, True, True, 2, 128),
]
AWQ = [(32, False), (128, False), (-1, False), (64, True)]


def drawn(bits, group, symmetric, rows, activations=False, out=OUT):
    """A layer whose weight lies on a grid, and the grid: scales and zero points (out, groups)."""
    size = rows if group == -1 else group
    groups, top = -(-rows // size), 2**bits - 1
    scales = (torch.rand(out, groups) / 20 + 0.001).half().float()
    zeros = torch.randint(0, top + 1, (out, groups)).float()
    zeros = torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros
    index = torch.arange(rows, dtype=torch.int32) // size
    index = index[torch.randperm(rows)] if activations else index
    codes = torch.randint(0, top + 1, (out, rows))
    layer = torch.nn.Linear(rows, out, bias=False)
    layer.weight.data = (codes - zeros[:, index.long()]) * scales[:, index.long()]
    return layer, scales, zeros, index


def tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The module's, by the names that its file has for them."""
    names = ("qweight", "qzeros", "scales", "g_idx")
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


def config(**options) -> dict:
    """A configuration of GPTQModel as it stands in config.json, without what is of one run."""
    said = QuantizeConfig(**options).to_dict()
    said.pop("meta")
    return {"quant_method": "gptq", **said}


def gptq(bits, group, symmetric, activations, version, rows):
    layer, scales, zeros, index = drawn(bits, group, symmetric, rows, activations)
    module = TorchLinear(bits, group, symmetric, activations, rows, OUT)
    module.pack_original(layer, scales, zeros, index)
    written = {name: tensor.clone() for name, tensor in tensors(module).items()}
    module._init_wf_unsqueeze_buffers()
    module.scales = module.scales.float()
    dense = PackableQuantLinear.dequantize_weight(module).T
    kind = FORMAT.GPTQ if version == 1 else FORMAT.GPTQ_V2
    said = config(bits=bits, group_size=group, sym=symmetric, desc_act=activations,
                  act_group_aware=False, format=kind)  # fmt: skip
    if version == 1:
        convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits))
        written["qzeros"] = module.qzeros
    return written | {"dense": dense}, said


def awq(group, symmetric):
    """By GPTQModel, whose configurations have other keys than AutoAWQ's."""
    layer, scales, zeros, _ = drawn(4, group, symmetric, 128)
    module = AwqTorchLinear(4, group, symmetric, False, 128, OUT)
    module.pack(layer, scales.half(), zeros)
    options = dict(quant_method=METHOD.AWQ, format=FORMAT.GEMM, bits=4, group_size=group)
    said = config(**options, sym=symmetric) | {"quant_method": "awq"}
    return tensors(module) | {"dense": awq_dense(module)}, said


def awq_dense(module):
    return dequantize_gemm(
        module.qweight, module.qzeros, module.scales.float(), 4, module.group_size
    ).T


def auto_awq(version):
    layer, scales, zeros, _ = drawn(4, 32, False, 64, out=32)
    kind = WQLinear_GEMM if version == "gemm" else WQLinear_GEMV
    grid = (scales.T, zeros.T) if version == "gemm" else (scales, zeros)
    module = kind.from_linear(layer, 4, 32, scales=grid[0], zeros=grid[1])
    dense = awq_dense(module) if version == "gemm" else layer.weight.data
    said = AwqConfig(q_group_size=32, version=version).to_transformers_dict()
    return tensors(module) | {"dense": dense}, said


def auto_round(kind, packing):
    """Its packers fill words of outputs by 32, and its version 1 has no zero points of 0."""
    layer, scales, zeros, _ = drawn(4, 32, False, 64, out=32)
    module = kind(4, 32, 64, 32, False)
    module.device = "cpu"
    module.pack(layer, scales, zeros.clamp(1), None)
    written = {name: tensor.clone() for name, tensor in tensors(module).items()}
    module.scales = module.scales.float()
    dense = module(torch.eye(64)).T
    said = {"quant_method": "auto-round", "packing_format": packing, "data_type": "int"}
    return written | {"dense": dense}, said | {"bits": 4, "group_size": 32, "sym": False}


def modelopt(algorithm):
    weight = torch.randn(OUT, 64)
    if algorithm == "NVFP4":
        packed, scale, scale_2 = NVFP4QTensor.quantize(weight, 16)
        written = {"weight": packed._quantized_data, "weight_scale_2": scale_2}
        written["weight_scale"] = scale.view(torch.uint8)
        sizes = {"double_scale": scale_2, "block_sizes": {-1: 16}}
        dense = packed.dequantize(torch.float32, scale=scale, **sizes)
    else:
        packed, scale = FP8QTensor.quantize(weight)
        written = {"weight": packed._quantized_data.view(torch.uint8), "weight_scale": scale}
        dense = packed._quantized_data.float() * scale
    said = {"quant_algo": algorithm, "exclude_modules": ["lm_head"]}
    config = convert_hf_quant_config_format({"quantization": said})
    return written | {"dense": dense, "input_scale": torch.tensor(0.1)}, config


def main() -> None:
    torch.manual_seed(0)
    cases = {}
    for options in GPTQ:
        cases["gptq " + " ".join(map(str, options))] = gptq(*options)
    for options in AWQ:
        cases["awq " + " ".join(map(str, options))] = awq(*options)
    cases["autoawq gemm"], cases["autoawq gemv"] = auto_awq("gemm"), auto_awq("gemv")
    cases["auto-round gptq"] = auto_round(AutoRoundV1, "auto_round:auto_gptq")
    cases["auto-round gptq v2"] = auto_round(AutoRound, "auto_round:gptqmodel")
    cases["modelopt nvfp4"], cases["modelopt fp8"] = modelopt("NVFP4"), modelopt("FP8")
    FOLDER.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{case}/{name}": tensor.detach().clone().contiguous()
        for case, (written, _) in cases.items()
        for name, tensor in written.items()
    }
    save_file(arrays, FOLDER / "words.safetensors")
    said = {case: options for case, (_, options) in cases.items()}
    (FOLDER / "words.json").write_text(json.dumps(said, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
