"""The names of an encoder's weights in Hugging Face's files."""

from jaxpeft.models.bert_config import BertConfig
from jaxpeft.models.heads import head_modules
from jaxpeft.models.names import LINEAR, Name
from jaxpeft.models.tasks import EMBED

PREFIXES = {
    "bert": "bert.",
    "roberta": "roberta.",
    "xlm-roberta": "roberta.",
    "distilbert": "distilbert.",
}
# TensorFlow's names of a LayerNorm's weights, in the files of the first BERT.
RESPELLED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# Buffers, and the heads of other tasks.
SPARE = (
    r"embeddings\.(position_ids|token_type_ids)$",
    r"(cls|lm_head|pooler|classifier|pre_classifier|qa_outputs)\.",
    r"vocab_(transform|layer_norm|projector)\.",
)
_LINEARS = (
    "attention/self/query",
    "attention/self/key",
    "attention/self/value",
    "attention/output/dense",
    "intermediate/dense",
    "output/dense",
)
_NORMS = ("attention/output/LayerNorm", "output/LayerNorm")
# The modules of a layer that DistilBERT calls otherwise.
_DISTILBERT = {
    "attention/self/query": "attention/q_lin",
    "attention/self/key": "attention/k_lin",
    "attention/self/value": "attention/v_lin",
    "attention/output/dense": "attention/out_lin",
    "attention/output/LayerNorm": "sa_layer_norm",
    "intermediate/dense": "ffn/lin1",
    "output/dense": "ffn/lin2",
    "output/LayerNorm": "output_layer_norm",
}
_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
_LINEAR, _NORM, _TABLE = ("kernel", "bias"), ("scale", "bias"), ("embedding",)


def names(config: BertConfig) -> tuple[Name, ...]:
    """The weights of a model with this configuration, here and in Hugging Face's files.

    The tree is that of BERT for every `model_type`; the names in the files are each model's own.

    Args:
        config: the encoder's configuration.

    Returns:
        One row for each weight, in the order of the files.

    Example:
        >>> from jaxpeft.models.bert_config import from_hf
        >>> config = from_hf({"model_type": "distilbert", "vocab_size": 8, "dim": 4,
        ...     "hidden_dim": 8, "n_layers": 1, "n_heads": 2}, "question-answering")
        >>> [name.tensor for name in names(config) if name.path.endswith("query/kernel")]
        ['distilbert.transformer.layer.{layer}.attention.q_lin.weight']
    """
    tables = _TABLES if config.type_vocab_size else _TABLES[:2]
    base = [row for table in tables for row in _rows(f"embeddings/{table}", _TABLE)]
    base += _rows("embeddings/LayerNorm", _NORM)
    for module in _LINEARS:
        base += _layer(module, _LINEAR, config)
    for module in _NORMS:
        base += _layer(module, _NORM, config)
    if config.has_pooler:
        base += [row._replace(head=True) for row in _rows("pooler/dense", _LINEAR)]
    bare = config.task in (None, EMBED)
    prefix = "" if bare else PREFIXES[config.model_type]
    heads = [row for module in head_modules(config) for row in _rows(module, _LINEAR)]
    return (
        *(row._replace(tensor=prefix + row.tensor) for row in base),
        *(row._replace(head=True) for row in heads),
    )


def _rows(module: str, leaves: tuple[str, ...], hf: str | None = None) -> list[Name]:
    """The weights of a module; `hf` is its name in the files where it is another."""
    found = []
    for leaf in leaves:
        kind = "bias" if leaf == "bias" else "weight"
        tensor = f"{hf or module}/{kind}".replace("/", ".")
        found.append(Name(f"{module}/{leaf}", tensor, axes=LINEAR if leaf == "kernel" else ()))
    return found


def _layer(module: str, leaves: tuple[str, ...], config: BertConfig) -> list[Name]:
    if config.model_type == "distilbert":
        hf = f"transformer/layer/{{layer}}/{_DISTILBERT[module]}"
    else:
        hf = f"encoder/layer/{{layer}}/{module}"
    return _rows(f"encoder/layer/{module}", leaves, hf)
