"""The weights in an ONNX file, under the names that PyTorch gave them.

An ONNX file is a protocol buffer: nested messages of numbered fields. This reads the few fields
that hold weights (https://onnx.ai/onnx/api/classes.html), and nothing of the file is ever run.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

# Field numbers of the messages ModelProto, GraphProto, NodeProto and TensorProto.
_GRAPH = 7
_NODE, _INITIALIZER = 1, 5
_INPUT, _NODE_NAME = 1, 3
_DIMS, _DATA_TYPE, _FLOATS, _INT32S, _TENSOR_NAME, _RAW = 1, 2, 4, 5, 8, 9
_DTYPES = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8"}


def read_weights(model: bytes) -> dict[str, np.ndarray]:
    """Every weight of a model, quantized ones as `(q - zero_point) * scale` in float32.

    A parameter that goes into no matrix product keeps its PyTorch name in ONNX. The matrix of a
    linear layer loses it, but the product is named after the layer's place: the second input of
    "/encoder/wi/MatMul" is the transposed "encoder.wi.weight".

    Args:
        model: the bytes of the file.

    Returns:
        Arrays by name, as in PyTorch's state dict.

    Raises:
        ValueError: the file is damaged, or has a kind of tensor that is not known here.
    """
    graph = next((part for number, part in _fields(memoryview(model)) if number == _GRAPH), b"")
    parts = list(_fields(memoryview(graph)))
    stored = dict(_tensor(part) for number, part in parts if number == _INITIALIZER)
    layers = dict(_product(part) for number, part in parts if number == _NODE)
    weights = {}
    for name, value in stored.items():
        base = name.removesuffix("_quantized")
        if base != name:
            zero_point = stored[f"{base}_zero_point"].astype(np.float32)
            value = (value.astype(np.float32) - zero_point) * stored[f"{base}_scale"]
        if name in layers:
            weights[f"{layers[name]}.weight"] = value.T
        elif base.endswith((".weight", ".bias")):
            weights[base] = value
    return weights


def _product(node: memoryview) -> tuple[str, str]:
    """The second input of a node, and the PyTorch module that it is in where it is a product."""
    inputs = [str(part, "utf-8") for number, part in _fields(node) if number == _INPUT]
    names = [str(part, "utf-8") for number, part in _fields(node) if number == _NODE_NAME]
    place, _, kind = "".join(names).rpartition("/")
    is_product = kind in ("MatMul", "MatMul_quant") and len(inputs) > 1
    return (inputs[1], place.strip("/").replace("/", ".")) if is_product else ("", "")


def _tensor(tensor: memoryview) -> tuple[str, np.ndarray]:
    values: dict[int, list[Any]] = {}
    for number, value in _fields(tensor):
        values.setdefault(number, []).append(value)
    name = str(values[_TENSOR_NAME][0], "utf-8")
    (kind,) = values[_DATA_TYPE]
    if kind not in _DTYPES:
        raise ValueError(f"the tensor {name!r} has ONNX's data type {kind}, which is not read.")
    if _RAW in values:
        array = np.frombuffer(values[_RAW][0], _DTYPES[kind])
    elif _FLOATS in values:
        array = np.frombuffer(b"".join(values[_FLOATS]), "<f4")
    else:
        array = np.array(list(_integers(values.get(_INT32S, []))), _DTYPES[kind])
    return name, array.reshape([*_integers(values.get(_DIMS, []))])


def _integers(values: list[Any]) -> Iterator[int]:
    """A repeated integer, whether it was packed or not."""
    for value in values:
        if isinstance(value, int):
            yield value
        else:
            start = 0
            while start < len(value):
                number, start = _varint(value, start)
                yield number


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """`(field number, value)`: an integer, or the bytes of a string, a message or a float."""
    start = 0
    while start < len(message):
        key, start = _varint(message, start)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, start = _varint(message, start)
            yield number, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"the ONNX file is damaged: wire type {kind} at byte {start}.")
        size, start = _varint(message, start) if kind == 2 else (8 if kind == 1 else 4, start)
        if start + size > len(message):
            raise ValueError(f"the ONNX file is damaged: {size} bytes at {start} are not there.")
        yield number, message[start : start + size]
        start += size


def _varint(message: memoryview, start: int) -> tuple[int, int]:
    """A number in base 128, lowest digits first, and where it ends."""
    number = shift = 0
    while True:
        if start >= len(message):
            raise ValueError("the ONNX file is damaged: it ends within a number.")
        number |= (message[start] & 127) << shift
        start, shift = start + 1, shift + 7
        if message[start - 1] < 128:
            return number, start
