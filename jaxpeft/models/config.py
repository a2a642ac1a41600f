"""The architecture of a decoder, read from and written to a Hugging Face `config.json`."""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
ROPE_TYPES = ("default", "linear", "llama3")

# What transformers assumes where config.json is silent. Sizes have no default: silence is an error.
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_CONTEXT = {"llama": 2048, "mistral": 131072, "qwen2": 32768}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched: `linear` uses `factor` only, `llama3` uses all."""

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shapes and constants of a Llama-like decoder, under their Hugging Face names.

    `sliding_window` is None for full attention. `qkv_bias`, `o_bias` and `mlp_bias` say which
    projections have a bias. `eos_token_id` is a tuple, as some models have several.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is no multiple of "
                f"num_key_value_heads={self.num_key_value_heads}. Every key head serves the same "
                "number of query heads; check config.json."
            )


def from_hf(values: Mapping[str, Any]) -> DecoderConfig:
    """Turn the dictionary of a `config.json` into a `DecoderConfig`.

    Args:
        values: the parsed file, as transformers 4 or 5 writes it.

    Returns:
        The decoder's configuration.

    Raises:
        ValueError: an option is missing, or has a value that the decoder does not support.

    Example:
        >>> from_hf({"model_type": "llama", "vocab_size": 8, "hidden_size": 4,
        ...          "intermediate_size": 8, "num_hidden_layers": 1,
        ...          "num_attention_heads": 2}).head_dim
        2
    """
    _check_supported(values)
    model_type = values["model_type"]
    missing = [name for name in _REQUIRED if name not in values]
    if missing:
        raise ValueError(f"config.json of a {model_type!r} model lacks {', '.join(missing)}.")
    sizes = {name: values[name] for name in _REQUIRED}
    for name, size in sizes.items():
        if not isinstance(size, numbers.Integral) or size < 1:
            raise ValueError(f"{name}={size!r} of a {model_type!r} model is no positive integer.")
    heads = values["num_attention_heads"]
    key_value_heads = 8 if model_type == "mistral" else heads
    llama_bias = model_type == "llama" and bool(values.get("attention_bias"))
    theta, scaling = _rope(values)
    config = DecoderConfig(
        model_type=model_type,
        **sizes,
        num_key_value_heads=values.get("num_key_value_heads", key_value_heads) or heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        rms_norm_eps=values.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=_sliding_window(values),
        qkv_bias=model_type == "qwen2" or llama_bias,
        o_bias=llama_bias,
        mlp_bias=model_type == "llama" and bool(values.get("mlp_bias")),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        max_position_embeddings=values.get("max_position_embeddings", _CONTEXT[model_type]),
        initializer_range=values.get("initializer_range", 0.02),
        **_token_ids(values),
    )
    _check_numbers(config)
    return config


def _check_numbers(config: DecoderConfig) -> None:
    """Refuses options that would be found to be no numbers only when the model runs."""
    counts = ("num_key_value_heads", "head_dim", "max_position_embeddings")
    reals = ("rms_norm_eps", "rope_theta", "initializer_range")
    window = () if config.sliding_window is None else ("sliding_window",)
    for name in (*counts, *window, *reals):
        value, whole = getattr(config, name), name not in reals
        number = isinstance(value, numbers.Integral if whole else numbers.Real)
        if not number or isinstance(value, bool) or not whole <= value < float("inf"):
            kind = "positive integer" if whole else "finite number that is not negative"
            raise ValueError(
                f"{name}={value!r:.80} of a {config.model_type!r} model is no {kind}. Compare "
                "config.json with the original."
            )


def to_hf(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` that transformers reads as the same model; the inverse of `from_hf`.

    Args:
        config: the decoder's configuration.
        dtype: the name of the dtype of the saved weights, `"float32"` for one.

    Returns:
        A dictionary ready for `json.dump`.
    """
    values = dataclasses.asdict(config)
    qkv, o = values.pop("qkv_bias"), values.pop("o_bias")
    mlp = values.pop("mlp_bias")
    eos = values.pop("eos_token_id")
    window = values.pop("sliding_window")
    scaling = values.pop("rope_scaling")
    if config.rope_scaling and config.rope_scaling.rope_type == "linear":
        scaling = {"rope_type": "linear", "factor": config.rope_scaling.factor}
    if config.model_type == "llama":
        if qkv != o:
            raise ValueError(
                f"qkv_bias={qkv} with o_bias={o} cannot be written as a 'llama' config.json, "
                "where one option stands for both. Use model_type='qwen2' for biases on q, k, v."
            )
        values |= {"attention_bias": qkv, "mlp_bias": mlp}
    if config.model_type == "mistral":
        values["sliding_window"] = window
    if config.model_type == "qwen2":
        values |= {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": 0 if window is not None else config.num_hidden_layers,
        }
    return values | {
        "architectures": [ARCHITECTURES[config.model_type]],
        "hidden_act": "silu",
        "rope_scaling": scaling,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "torch_dtype": dtype,
    }


def _check_supported(values: Mapping[str, Any]) -> None:
    model_type = values.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"model_type={model_type!r} is not supported. Supported: {', '.join(ARCHITECTURES)}."
        )
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={values['hidden_act']!r} is not supported. Supported: silu.")


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    # transformers 4 writes rope_theta and rope_scaling, transformers 5 one rope_parameters.
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", values.get("rope_theta", 10000.0))
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if partial not in (1.0, None):
        raise ValueError(f"partial_rotary_factor={partial} is not supported. Supported: 1.0.")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ValueError(
            f"rope_type={rope_type!r} is not supported. Supported: {', '.join(ROPE_TYPES)}."
        )
    if rope_type == "default":
        return theta, None
    names = [field.name for field in dataclasses.fields(RopeScaling)][1:]
    used = ["factor"] if rope_type == "linear" else names
    missing = [name for name in used if name not in rope]
    if missing:
        raise ValueError(f"rope_type={rope_type!r} needs {', '.join(missing)} beside it.")
    return theta, RopeScaling(rope_type, **{name: rope[name] for name in used})


def _sliding_window(values: Mapping[str, Any]) -> int | None:
    if values["model_type"] == "mistral":
        return values.get("sliding_window", 4096)
    if values["model_type"] == "llama" or not values.get("use_sliding_window"):
        return None
    layers, first = values["num_hidden_layers"], values.get("max_window_layers", 28)
    kinds = values.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(layers)
    ]
    if len(set(kinds)) > 1:
        raise ValueError(
            f"use_sliding_window=True with max_window_layers={first} of {layers} layers mixes full "
            "and sliding attention, which is not supported. Supported: one kind in all layers."
        )
    return values.get("sliding_window", 4096) if kinds[0] == "sliding_attention" else None


def _token_ids(values: Mapping[str, Any]) -> dict[str, Any]:
    eos = values.get("eos_token_id")
    return {
        "bos_token_id": values.get("bos_token_id"),
        "eos_token_id": () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        "pad_token_id": values.get("pad_token_id"),
    }
