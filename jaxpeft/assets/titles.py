"""A flan-t5-small that writes titles, as a Hugging Face directory made of its two ONNX files."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpeft.assets.onnx import read_weights

SOURCES = ("encoder.onnx", "decoder.onnx", "tokenizer.json")
# The ONNX files do not say these; they are those of google/flan-t5-small.
CONFIG = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "d_ff": 1024,
    "d_kv": 64,
    "d_model": 512,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "dtype": "float32",
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "num_decoder_layers": 8,
    "num_heads": 6,
    "num_layers": 8,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "vocab_size": 32128,
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "model_max_length": 512,
}


def convert(sources: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a Hugging Face directory.

    The weights are dequantized to float32. The tokenizer loses its settings for short titles, which
    cut every text after 48 tokens.

    Args:
        sources: the contents of `SOURCES` by file name.

    Returns:
        The contents of the files by file name.
    """
    encoder = read_weights(sources["encoder.onnx"])
    decoder = read_weights(sources["decoder.onnx"])
    named = {name.removeprefix("m."): value for name, value in decoder.items()}
    for name, value in encoder.items():
        if name != "enc.embed_tokens.weight":  # The decoder's file has it as "shared.weight".
            named[f"encoder.{name.removeprefix('enc.')}"] = value
    tokenizer = json.loads(sources["tokenizer.json"]) | {"truncation": None, "padding": None}
    return {
        "config.json": _json(CONFIG, indent=2),
        "model.safetensors": safetensors(named),
        "tokenizer.json": _json(tokenizer, ensure_ascii=False),
        "tokenizer_config.json": _json(TOKENIZER_CONFIG, indent=2),
    }


def safetensors(tensors: Mapping[str, np.ndarray]) -> bytes:
    """A safetensors file of float32 arrays, the same bytes whatever version of the package is here.

    Args:
        tensors: arrays by name.

    Returns:
        The length of a JSON header in eight bytes, the header, and the arrays in order of name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, value in sorted(tensors.items()):
        start, end = end, end + 4 * value.size
        header[name] = {"dtype": "F32", "shape": value.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    arrays = (np.ascontiguousarray(value, "<f4").tobytes() for _, value in sorted(tensors.items()))
    return b"".join([len(text).to_bytes(8, "little"), text, *arrays])


def _json(value: Any, **options: Any) -> bytes:
    return (json.dumps(value, **options) + "\n").encode()
