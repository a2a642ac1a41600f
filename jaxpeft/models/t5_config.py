"""The architecture of a T5 model, read from and written to a Hugging Face `config.json`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

ARCHITECTURES = {"t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration"}
# What stands after "gated-" or alone in `feed_forward_proj`.
ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu")

_REQUIRED = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
# What transformers assumes where config.json is silent.
_OPTIONAL: dict[str, Any] = dict(
    relative_attention_num_buckets=32,
    relative_attention_max_distance=128,
    layer_norm_epsilon=1e-6,
    initializer_factor=1.0,
    pad_token_id=0,
    decoder_start_token_id=0,
)


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shapes and constants of a T5, under their Hugging Face names.

    `feed_forward_proj` is an activation, such as "relu", or "gated-" and an activation, where
    "gated-gelu" means the tanh approximation. `tie_word_embeddings` says whether the output head is
    the embedding; `scale_decoder_outputs` whether what it gets is multiplied by `d_model**-0.5`.
    """

    model_type: str
    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    feed_forward_proj: str = "relu"
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = True
    initializer_factor: float = 1.0
    pad_token_id: int = 0
    eos_token_id: tuple[int, ...] = (1,)
    decoder_start_token_id: int = 0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"feed_forward_proj={self.feed_forward_proj!r} is not supported. Supported: "
                f"{', '.join(ACTIVATIONS)}, alone or after 'gated-'."
            )

    @property
    def task(self) -> str:
        """What the model is for."""
        return "seq2seq-lm"

    @property
    def gated(self) -> bool:
        """Whether the feed-forward sublayer multiplies two projections."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        """The activation's name among `ACTIVATIONS`."""
        name = self.feed_forward_proj.removeprefix("gated-")
        return "gelu_new" if self.feed_forward_proj == "gated-gelu" else name


def from_hf(values: Mapping[str, Any], task: str | None = None, labels: Any = None) -> T5Config:
    """Turn the dictionary of a `config.json` into a `T5Config`.

    Args:
        values: the parsed file, as transformers 4 or 5 writes it.
        task: "seq2seq-lm" or None, which is the same.
        labels: must be None.

    Returns:
        The model's configuration.

    Raises:
        ValueError: an option is missing, or has a value that is not supported.

    Example:
        >>> from_hf({"model_type": "t5", "vocab_size": 8, "d_model": 4, "d_kv": 2, "d_ff": 8,
        ...          "num_layers": 1, "num_heads": 2}).num_decoder_layers
        1
    """
    model_type = values["model_type"]
    if task not in (None, "seq2seq-lm") or labels is not None:
        raise ValueError(
            f"task={task!r} with labels={labels!r} is not supported for model_type={model_type!r}. "
            "Supported: task='seq2seq-lm', which has no labels."
        )
    missing = [name for name in _REQUIRED if name not in values]
    if missing:
        raise ValueError(f"config.json of a {model_type!r} model lacks {', '.join(missing)}.")
    given = {name: value for name, value in values.items() if value is not None}
    tied = values.get("tie_word_embeddings") is not False
    # Only T5 scales: transformers ties mT5's head, where it does, without.
    scaled = model_type == "t5" and values.get("scale_decoder_outputs", tied)
    eos = values.get("eos_token_id", 1)
    return T5Config(
        model_type=model_type,
        **{name: values[name] for name in _REQUIRED},
        num_decoder_layers=given.get("num_decoder_layers", values["num_layers"]),
        feed_forward_proj=_feed_forward(given),
        **{name: given.get(name, default) for name, default in _OPTIONAL.items()},
        tie_word_embeddings=tied,
        scale_decoder_outputs=bool(scaled),
        eos_token_id=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    )


def _feed_forward(values: Mapping[str, Any]) -> str:
    return values.get(
        "feed_forward_proj", "gated-gelu" if values["model_type"] == "mt5" else "relu"
    )


def fit(
    config: T5Config, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray]
) -> T5Config:
    """The configuration with the head that a checkpoint has.

    Its tensors decide, not config.json: transformers 5 writes `tie_word_embeddings` true for models
    whose head is their own, and older versions false for some that have none.

    Args:
        config: from config.json.
        shapes: of the checkpoint's tensors by name.
        read: gives a tensor.

    Returns:
        `config`, untied where there is a `lm_head.weight` that is not the embedding.
    """
    tied = "lm_head.weight" not in shapes
    if not tied and config.tie_word_embeddings:
        tied = np.array_equal(read("lm_head.weight"), read("shared.weight"))
    return dataclasses.replace(config, tie_word_embeddings=tied)


def to_hf(config: T5Config, dtype: str) -> dict[str, Any]:
    """The dictionary of a `config.json`, which `from_hf` reads back.

    Args:
        config: the model's configuration.
        dtype: of the weights, such as "float32".

    Returns:
        A dictionary that is ready for JSON and that transformers 4 and 5 load.
    """
    values = dataclasses.asdict(config)
    eos = values.pop("eos_token_id")
    if config.model_type != "t5":
        del values["scale_decoder_outputs"]
    return {
        "architectures": [ARCHITECTURES[config.model_type]],
        **values,
        "dense_act_fn": config.activation,
        "is_gated_act": config.gated,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "is_encoder_decoder": True,
        "use_cache": True,
        "dtype": dtype,
    }
