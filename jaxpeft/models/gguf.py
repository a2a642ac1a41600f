"""Read a GGUF file (llama.cpp's format) as Hugging Face tensors."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize

from jaxpeft.models.config import DecoderConfig, RopeScaling, from_hf
from jaxpeft.models.files import Checkpoint, check_layers
from jaxpeft.models.gguf_header import check_header
from jaxpeft.models.names import names
from jaxpeft.models.packed_files import DAMAGE, Packed, blamed, sensible
from jaxpeft.models.rope import inverse_frequencies, llama3_divisors
from jaxpeft.quant.formats import Quantized, from_gguf

ARCHITECTURES = ("llama", "qwen2")
_ROPE_FACTORS = "rope_freqs.weight"
_FLOATS = tuple(getattr(GGMLQuantizationType, name) for name in ("F64", "F32", "F16", "BF16"))


def find_gguf(path: str | Path) -> Path | None:
    """The GGUF file at `path`, if it is one or a directory with one and no `config.json`.

    Args:
        path: a file or a directory.

    Returns:
        The file, or None.

    Raises:
        ValueError: the directory holds several GGUF files, or `path` is some other file.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is a file but no .gguf file. Give the model's directory.")
        return path
    if (path / "config.json").is_file():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        listed = ", ".join(file.name for file in found)
        raise ValueError(
            f"{path} holds {len(found)} GGUF files: {listed}. Give one of their paths."
        )
    return found[0] if found else None


def open_reader(path: Path) -> GGUFReader:
    """Map the file into memory, with a clear error when it is damaged."""
    try:
        check_header(path)
        return GGUFReader(path)
    except DAMAGE as error:
        raise ValueError(
            f"{path} is damaged or no GGUF file: {error}. Download it again."
        ) from error


def open_gguf(path: str | Path) -> Checkpoint:
    """A GGUF file as a checkpoint; quantized tensors are read packed, or dequantized to float32.

    Args:
        path: the file.

    Returns:
        The checkpoint, under Hugging Face names and in the Hugging Face order of rotary pairs.

    Raises:
        ValueError: the file is damaged, or its architecture is not supported.
    """
    path = Path(path)
    reader = open_reader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = sensible(path, lambda: read_gguf_config(reader))
    check_layers(config.num_hidden_layers, tensors, path)
    files = hugging_face_names(config)
    if config.rope_scaling is not None:
        tensors.pop(_ROPE_FACTORS, None)
    by_name = {files.get(name, name): tensor for name, tensor in tensors.items()}
    shapes = {name: tuple(int(n) for n in t.shape[::-1]) for name, t in by_name.items()}
    permuted = fields(reader)["general.architecture"] == "llama"

    quantized = {name for name, tensor in by_name.items() if tensor.tensor_type not in _FLOATS}

    def read(name: str) -> np.ndarray:
        unpack = lambda: read_tensor(by_name[name], name, config, permuted)  # noqa: E731
        return blamed(name, str(path), unpack) if name in quantized else unpack()

    def packed(name: str) -> Packed:
        pack = lambda: read_packed(by_name[name], name, config, permuted)  # noqa: E731
        kind = by_name[name].tensor_type.name.lower()
        return Packed(shapes[name], lambda: blamed(name, str(path), pack), kind)

    return Checkpoint(config, shapes, read, str(path), {name: packed(name) for name in quantized})


def fields(reader: GGUFReader) -> dict[str, Any]:
    """The file's metadata, but for the long tables of the tokenizer."""
    tables = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.scores")
    return {
        key: field.contents()
        for key, field in reader.fields.items()
        if key not in (*tables, "tokenizer.ggml.token_type")
    }


def hugging_face_names(config: DecoderConfig) -> dict[str, str]:
    """From llama.cpp's tensor names to Hugging Face's."""
    return {
        name.gguf.format(layer=layer): name.tensor.format(layer=layer)
        for name in names(config)
        for layer in range(config.num_hidden_layers if name.stacked else 1)
    }


def read_tensor(
    tensor: ReaderTensor, name: str, config: DecoderConfig, permuted: bool
) -> np.ndarray:
    """Dequantize a tensor, and undo llama.cpp's reordering of queries and keys."""
    values = dequantize(tensor.data, tensor.tensor_type)
    if tensor.tensor_type not in _FLOATS and not np.isfinite(values).all():
        raise ValueError(
            "it has values that are not finite. The file is damaged: download it again."
        )
    heads = paired_heads(name, config) if permuted else None
    return values if heads is None else unpermute(values, heads)


def read_packed(
    tensor: ReaderTensor, name: str, config: DecoderConfig, permuted: bool
) -> Quantized:
    """A tensor's blocks. They run along the inputs, so queries and keys are reordered by rows."""
    heads = paired_heads(name, config) if permuted else None
    data = tensor.data if heads is None else unpermute(tensor.data, heads)
    return from_gguf(data, tensor.tensor_type.name)


def paired_heads(name: str, config: DecoderConfig) -> int | None:
    """How many heads a tensor has whose rows llama.cpp orders otherwise; None for most tensors."""
    kind = name.removesuffix(".weight").removesuffix(".bias")
    if kind.endswith("q_proj"):
        return config.num_attention_heads
    return config.num_key_value_heads if kind.endswith("k_proj") else None


def unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """From rotary pairs side by side (llama.cpp) to halves of the head (Hugging Face).

    llama.cpp stores row `2i + j` of a head where Hugging Face has row `i + j H/2`.

    Args:
        values: `[heads * H, ...]`.
        heads: number of heads.

    Returns:
        The same rows in the Hugging Face order.
    """
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def read_gguf_config(reader: GGUFReader) -> DecoderConfig:
    """The configuration that the file's metadata and list of tensors describe."""
    values = fields(reader)
    architecture = values.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"general.architecture={architecture!r} in a GGUF file is not supported. "
            f"Supported: {', '.join(ARCHITECTURES)}."
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = from_hf(_hf_values(values, architecture, tensors))
    if _ROPE_FACTORS not in tensors:
        return config
    divisors = dequantize(tensors[_ROPE_FACTORS].data, tensors[_ROPE_FACTORS].tensor_type)
    return _with_llama3_scaling(config, divisors)


def _hf_values(values: dict[str, Any], architecture: str, tensors: dict) -> dict[str, Any]:
    def get(key: str, default: Any = None) -> Any:
        return values.get(f"{architecture}.{key}", default)

    def token(key: str) -> Any:
        return values.get(f"tokenizer.ggml.{key}_token_id")

    embedding = tensors.get("token_embd.weight")
    result = {
        "model_type": architecture,
        "vocab_size": int(embedding.shape[1]) if embedding is not None else get("vocab_size"),
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "head_dim": get("attention.key_length", get("rope.dimension_count")),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base"),
        "max_position_embeddings": get("context_length"),
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": token("bos"),
        "eos_token_id": token("eos"),
        "pad_token_id": token("padding"),
    }
    if get("rope.scaling.type", "none") != "none":
        kind, factor = get("rope.scaling.type"), get("rope.scaling.factor")
        result["rope_scaling"] = {"rope_type": kind, "factor": factor}
    if get("attention.sliding_window"):
        result |= {"model_type": "mistral", "sliding_window": get("attention.sliding_window")}
    return {key: value for key, value in result.items() if value is not None}


def _with_llama3_scaling(config: DecoderConfig, divisors: np.ndarray) -> DecoderConfig:
    # llama.cpp keeps the divisors themselves and forgets the constants that they came from.
    # Every published Llama 3 has the same constants but for the factor, which is the largest one.
    scaling = RopeScaling("llama3", float(divisors.max()))
    expected = llama3_divisors(inverse_frequencies(config), scaling)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(
            f"{_ROPE_FACTORS} holds frequency divisors (largest {divisors.max():g}) that are not "
            f"those of {scaling}. Load the Hugging Face directory of this model instead."
        )
    return dataclasses.replace(config, rope_scaling=scaling)
