"""Write a GGUF file: another one's metadata and tokenizer, and these weights."""

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    quantize,
)

from jaxpeft.models.gguf import fields, find_gguf, open_reader, paired_heads, read_gguf_config
from jaxpeft.models.model import Model
from jaxpeft.models.names import Name
from jaxpeft.models.packed_save import check_axes, layer_of
from jaxpeft.quant import QuantizedWeight
from jaxpeft.quant.formats import GGUF, MixedGGUF, to_gguf, unmix

_FILE_TYPE, _VERSION = "general.file_type", "general.quantization_version"
_PLAIN = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Tensor(NamedTuple):
    """A tensor as a GGUF file has it."""

    name: str
    data: np.ndarray
    kind: GGMLQuantizationType


def save_gguf(
    path: Path, model: Model, leaves: Mapping[str, Any], dtype: str, source: Path | None
) -> None:
    """Write a model as a GGUF file, packed weights as the blocks that they are.

    One tensor at a time is made. Matrices that are dense have the dtype of the weights, and vectors
    float32, as llama.cpp wants them.

    Args:
        path: of the new file.
        model: a decoder.
        leaves: its weights by path.
        dtype: of the dense ones.
        source: the GGUF file (or its directory) from which metadata and tokenizer are taken.

    Raises:
        ValueError: there is no such source, it is of another model, or a weight is packed in
            another format than GGUF's.
    """
    reader = _reader(path, model, source)
    for name in model.names():
        _check(name, leaves[name.path])
    made = [lambda t=t: t for t in _kept(reader)] + list(_tensors(model, leaves, dtype, reader))
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        written = Path(folder) / path.name
        writer = GGUFWriter(written, fields(reader)["general.architecture"])
        kinds: dict[str, GGMLQuantizationType] = {}
        sizes: Counter[GGMLQuantizationType] = Counter()
        for make in made:
            name, data, kind = make()
            writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, kind)
            kinds[name] = kind
            sizes[kind] += data.nbytes * GGML_QUANT_SIZES[kind][0] // GGML_QUANT_SIZES[kind][1]
        _copy_metadata(reader, writer, _about(reader, kinds, sizes))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for make in made:
            writer.write_tensor_data(np.ascontiguousarray(make().data))
        writer.close()
        os.replace(written, path)


def _reader(path: Path, model: Model, source: Path | None) -> GGUFReader:
    found = None if source is None else find_gguf(source)
    if found is None:
        raise ValueError(
            f"{path} needs the metadata and the tokenizer of another GGUF file, and "
            f"tokenizer_from={str(source)!r} is none. Give the file that the model came from, or "
            "save to a directory."
        )
    reader = open_reader(found)
    config = read_gguf_config(reader)
    if config != model.config:
        raise ValueError(
            f"tokenizer_from={str(source)!r} is of another model: {config}, but this one is "
            f"{model.config}."
        )
    return reader


def _check(name: Name, leaf: Any) -> None:
    if not isinstance(leaf, QuantizedWeight):
        return
    check_axes(name, leaf)
    if not isinstance(leaf.format, GGUF | MixedGGUF):
        raise ValueError(
            f"{name.path!r} is packed in {leaf.format}, which GGUF files do not have. Save to a "
            "directory, or quantize to a format such as jp.quant.gguf('q8_0')."
        )


def _tensors(
    model: Model, leaves: Mapping[str, Any], dtype: str, reader: GGUFReader
) -> Iterator[Any]:
    """Functions that make the tensors, in the order of the names."""
    paired = fields(reader)["general.architecture"] == "llama"
    for name in model.names():
        leaf = leaves[name.path]
        for layer, tensor in enumerate(name.tensors(leaf.shape)):
            heads = paired_heads(tensor, model.config) if paired else None
            file_name = name.gguf.format(layer=layer)

            def make(name=name, leaf=leaf, layer=layer, heads=heads, file_name=file_name) -> Tensor:
                data, kind = _data(name, leaf, layer, dtype)
                return Tensor(file_name, data if heads is None else permute(data, heads), kind)

            yield make


def _data(name: Name, leaf: Any, layer: int, dtype: str) -> tuple[np.ndarray, GGMLQuantizationType]:
    """Rows of a tensor, in Hugging Face's order."""
    if isinstance(leaf, QuantizedWeight):
        weight = layer_of(leaf, name, layer)
        weight = unmix(weight) if isinstance(weight.format, MixedGGUF) else weight
        packed: Any = weight.format
        return to_gguf(weight), GGMLQuantizationType[packed.kind.upper()]
    values = name.to_hf(np.asarray(leaf[layer] if name.stacked else leaf)).astype(np.float32)
    kind = GGMLQuantizationType[_PLAIN[dtype] if values.ndim > 1 else "F32"]
    return quantize(values, kind), kind


def permute(values: np.ndarray, heads: int) -> np.ndarray:
    """From halves of the head (Hugging Face) to rotary pairs side by side (llama.cpp).

    The inverse of `jaxpeft.models.gguf.unpermute`.
    """
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _kept(reader: GGUFReader) -> list[Tensor]:
    """What the source has beside the weights: divisors of rotary frequencies."""
    tensors = [tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    return [Tensor(t.name, np.asarray(t.data), t.tensor_type) for t in tensors]


def _about(
    reader: GGUFReader,
    kinds: Mapping[str, GGMLQuantizationType],
    sizes: Counter[GGMLQuantizationType],
) -> dict[str, int]:
    """What the metadata say of the blocks: the source's, where these are as they were there."""
    if kinds == {tensor.name: tensor.tensor_type for tensor in reader.tensors}:
        names = (_FILE_TYPE, _VERSION)
        return {name: fields(reader)[name] for name in names if name in reader.fields}
    about = {_FILE_TYPE: file_type(max(sizes, key=lambda kind: sizes[kind])).value}
    packed = any(kind.name not in _PLAIN.values() for kind in kinds.values())
    return about | ({_VERSION: GGML_QUANT_VERSION} if packed else {})


def file_type(kind: GGMLQuantizationType) -> LlamaFileType:
    """What llama.cpp calls a file most of whose numbers are in such blocks.

    >>> file_type(GGMLQuantizationType.Q4_K).name, file_type(GGMLQuantizationType.F32).name
    ('MOSTLY_Q4_K_M', 'ALL_F32')
    """
    names = [form.format(kind.name) for form in ("MOSTLY_{}", "MOSTLY_{}_M", "ALL_{}")]
    known = [LlamaFileType[name] for name in names if name in LlamaFileType.__members__]
    return known[0] if known else LlamaFileType.GUESSED


def _copy_metadata(reader: GGUFReader, writer: GGUFWriter, about: Mapping[str, int]) -> None:
    for name, value in about.items():
        writer.add_uint32(name, value)
    for field in reader.fields.values():
        # The writer makes these itself.
        made = (_FILE_TYPE, _VERSION, "general.architecture", "general.alignment")
        if field.name in made or field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
