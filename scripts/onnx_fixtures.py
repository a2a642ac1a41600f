"""Write tests/fixtures/onnx: a tiny module, exported and quantized, and its weights.

Runs in an environment of its own:

    pip install torch==2.13.0 onnx==1.23.2 onnxruntime==1.32.0
    python scripts/onnx_fixtures.py

The weights are those that onnx reads from the same files, dequantized by ONNX's formula.
"""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from safetensors.numpy import save_file

FOLDER = Path(__file__).parents[1] / "tests" / "fixtures" / "onnx"


class Layer(torch.nn.Module):
    """A product with a kernel that is given transposed, and a norm."""

    def __init__(self):
        super().__init__()
        self.wi = torch.nn.Linear(4, 6, bias=False)
        self.norm = torch.nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(self.wi(x))


class Model(torch.nn.Module):
    """A table, layers in a list, and a head."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(7, 4)
        self.layer = torch.nn.ModuleList([Layer()])
        self.head = torch.nn.Linear(6, 3, bias=False)

    def forward(self, tokens):
        return self.head(self.layer[0](self.table(tokens)))


def dequantized(path: Path, model: Model) -> dict[str, np.ndarray]:
    """The weights in the order and orientation of the module, each found by its nearness."""
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    values = [value for name, value in stored.items() if not name.endswith(("_scale", "_point"))]
    names = [name for name in stored if not name.endswith(("_scale", "_point"))]
    for i, name in enumerate(names):
        base = name.removesuffix("_quantized")
        if base != name:
            zero, scale = stored[f"{base}_zero_point"], stored[f"{base}_scale"]
            values[i] = (values[i].astype(np.float32) - zero.astype(np.float32)) * scale
    found = {}
    for name, tensor in model.state_dict().items():
        alike = [v if v.shape == tensor.shape else v.T for v in values if v.ndim == tensor.ndim]
        alike = [v for v in alike if v.shape == tensor.shape]
        found[name] = min(alike, key=lambda v: np.abs(v - tensor.numpy()).max())
        assert np.abs(found[name] - tensor.numpy()).max() < 0.02
    return {name: np.ascontiguousarray(value, np.float32) for name, value in found.items()}


def main() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain, small = FOLDER / "float.onnx", FOLDER / "int8.onnx"
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(model, (torch.tensor([[1, 2, 3]]),), plain, dynamo=False, opset_version=17)
    quantize_dynamic(plain, small, weight_type=QuantType.QInt8)
    for path in (plain, small):
        save_file(dequantized(path, model), path.with_suffix(".safetensors"))


if __name__ == "__main__":
    main()
