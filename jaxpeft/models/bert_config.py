"""The architecture of BERT, RoBERTa and DistilBERT, read from and written to `config.json`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.models.layers import ACTIVATIONS
from jaxpeft.models.tasks import (
    ANSWER,
    CLASSIFY,
    EMBED,
    REGRESS,
    SUFFIXES,
    TAG,
    check_option,
    labels_of,
    labels_to_hf,
    task_of,
)

# What transformers' classes are called.
CLASSES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "distilbert": "DistilBert",
}
POOLINGS = ("mean", "cls")

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_OPTIONAL = (
    "hidden_act",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "initializer_range",
    "pad_token_id",
    "pooling",
)
# What DistilBERT calls them.
_DISTILBERT = {
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "hidden_act": "activation",
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Shapes and constants of an encoder, under BERT's Hugging Face names.

    `task` is a key of `jaxpeft.models.tasks.SUFFIXES` or None (the last hidden states), `labels`
    the names of the classes, and `pooling` what an embedding is of a text's hidden states: their
    mean, or that of the first token ("cls").
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0
    task: str | None = None
    labels: tuple[str, ...] = ()
    pooling: str = "mean"

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is no multiple of num_attention_heads="
                f"{self.num_attention_heads}; check config.json."
            )
        if self.pooling not in POOLINGS:
            raise ValueError(
                f"pooling={self.pooling!r} is not supported. Supported: {', '.join(POOLINGS)}."
            )

    @property
    def first_position(self) -> int:
        """The position of a text's first token; RoBERTa's lie behind that of padding."""
        return self.pad_token_id + 1 if self.counts_tokens else 0

    @property
    def counts_tokens(self) -> bool:
        """Whether positions count the tokens that are no padding, as RoBERTa's do."""
        return self.model_type in ("roberta", "xlm-roberta")

    @property
    def has_pooler(self) -> bool:
        """Whether transformers' class for the task has BERT's pooler."""
        bare = self.task in (None, EMBED)
        if self.model_type == "bert":
            return bare or self.task in (CLASSIFY, REGRESS)
        return bare and self.model_type != "distilbert"

    @property
    def outputs(self) -> int:
        """How many numbers the head gives for a text or a token; 0 without a head."""
        return {ANSWER: 2, REGRESS: 1}.get(self.task or "", len(self.labels))


def from_hf(
    values: Mapping[str, Any], task: str | None = None, labels: Sequence[str] | int | None = None
) -> BertConfig:
    """Turn the dictionary of a `config.json` into a `BertConfig`.

    Args:
        values: the parsed file, as transformers 4 or 5 writes it.
        task: what the model is for; None for what `architectures` says.
        labels: the names of the classes, or their number; None for those in the file.

    Returns:
        The encoder's configuration.

    Raises:
        ValueError: an option is missing, or has a value that the encoder does not support.

    Example:
        >>> sizes = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 8,
        ...          "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> from_hf({"model_type": "bert", **sizes}, "token-classification", ["O", "B"]).labels
        ('O', 'B')
    """
    model_type = values["model_type"]
    _check_supported(values)
    given = dict(values)
    if model_type == "distilbert":
        given |= {ours: values[own] for ours, own in _DISTILBERT.items() if own in values}
        given |= {"type_vocab_size": 0, "layer_norm_eps": 1e-12}
    missing = [name for name in _REQUIRED if name not in given]
    if missing:
        raise ValueError(f"config.json of a {model_type!r} model lacks {', '.join(missing)}.")
    padding = 0 if model_type in ("bert", "distilbert") else 1
    options = {"pad_token_id": padding} | {
        name: given[name] for name in _OPTIONAL if given.get(name) is not None
    }
    check_option(options, "hidden_act", tuple(ACTIVATIONS))
    task = task_of(values, task)
    return BertConfig(
        model_type=model_type,
        **{name: given[name] for name in _REQUIRED},
        **options,
        task=task,
        labels=_labels(values, task, labels),
    )


def to_hf(config: BertConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` that transformers reads as the same model; the inverse of `from_hf`.

    Args:
        config: the encoder's configuration.
        dtype: the name of the dtype of the saved weights, `"float32"` for one.

    Returns:
        A dictionary ready for `json.dump`.
    """
    values = dataclasses.asdict(config)
    for name in ("task", "labels"):
        del values[name]
    if config.pooling == "mean":
        del values["pooling"]
    if config.model_type == "distilbert":
        values = {_DISTILBERT.get(name, name): value for name, value in values.items()}
        del values["type_vocab_size"], values["layer_norm_eps"]
    if config.task == REGRESS:
        values["problem_type"] = REGRESS
    suffix = SUFFIXES[config.task or EMBED]
    return {
        **values,
        **labels_to_hf(config.labels),
        "architectures": [CLASSES[config.model_type] + suffix],
        "torch_dtype": dtype,
    }


def _check_supported(values: Mapping[str, Any]) -> None:
    check_option(values, "position_embedding_type", ("absolute", None))
    check_option(values, "is_decoder", (False, None))
    check_option(values, "add_cross_attention", (False, None))


def _labels(values: Mapping[str, Any], task: str | None, labels: Any) -> tuple[str, ...]:
    if task in (CLASSIFY, TAG):
        return labels_of(values, labels)
    if task == REGRESS and labels in (None, 1):
        return ("LABEL_0",)
    if labels is not None:
        raise ValueError(
            f"labels={labels!r} with task={task!r}: there are no classes to name. Leave labels "
            f"out, or pass task={CLASSIFY!r} or {TAG!r}."
        )
    return ()
