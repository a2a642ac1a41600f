"""The names of a vision transformer's weights in Hugging Face's files."""

from jaxpeft.models.names import CONVOLUTION, LINEAR, Name
from jaxpeft.models.vit_config import CLASSIFY, ViTConfig

# What files hold for other tasks: heads, the pooler, and masked image modelling.
SPARE = (
    r"(cls_|distillation_)?classifier\.",
    r"pooler\.",
    r"embeddings\.mask_token$",
    r"decoder\.",
)
_DENSE = (
    "attention/attention/query",
    "attention/attention/key",
    "attention/attention/value",
    "attention/output/dense",
    "intermediate/dense",
    "output/dense",
)
# In this order: the second of two parts of a name may be the end of the first.
_RENAMED = (
    ("encoder.layer.", "layers."),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)
_QKV_BIASES = {f"encoder/layer/{path}/bias" for path in _DENSE[:3]}
_NORMS = ("layernorm_before", "layernorm_after")
_KINDS = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def _plain(path: str, leaf: str) -> Name:
    axes = LINEAR if leaf == "kernel" else ()
    return Name(f"{path}/{leaf}", f"{path.replace('/', '.')}.{_KINDS[leaf]}", axes=axes)


def _layer(path: str, leaf: str) -> Name:
    row = _plain(f"encoder/layer/{path}", leaf)
    return row._replace(tensor=row.tensor.replace("layer.", "layer.{layer}.", 1))


_PATCHES = "embeddings/patch_embeddings/projection"
_DISTILLATION = Name("embeddings/distillation_token", "embeddings.distillation_token")
_EMBEDDINGS = (
    Name("embeddings/cls_token", "embeddings.cls_token"),
    _DISTILLATION,
    Name("embeddings/position_embeddings", "embeddings.position_embeddings"),
    _plain(_PATCHES, "kernel")._replace(axes=CONVOLUTION),
    _plain(_PATCHES, "bias"),
)


def names(config: ViTConfig) -> tuple[Name, ...]:
    """The weights of a model with this configuration, here and in Hugging Face's files.

    Args:
        config: the model's configuration.

    Returns:
        One row for each weight.

    Example:
        >>> from jaxpeft.models.vit_config import from_hf
        >>> config = from_hf({"model_type": "vit", "hidden_size": 4, "intermediate_size": 8,
        ...     "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4})
        >>> names(config)[4].tensor
        'encoder.layer.{layer}.attention.attention.query.weight'
    """
    rows = [*_EMBEDDINGS, *(_layer(path, leaf) for path in _DENSE for leaf in ("kernel", "bias"))]
    if not config.qkv_bias:
        rows = [row for row in rows if row.path not in _QKV_BIASES]
    if config.model_type != "deit":
        rows.remove(_DISTILLATION)
    rows += [_layer(path, leaf) for path in _NORMS for leaf in ("scale", "bias")]
    prefix = f"{config.model_type}." if config.task == CLASSIFY else ""
    rows += [_plain("layernorm", leaf) for leaf in ("scale", "bias")]
    if config.pooler:
        rows += [_plain("pooler/dense", leaf) for leaf in ("kernel", "bias")]
    rows = [row._replace(tensor=prefix + row.tensor) for row in rows]
    heads = [_plain(head, leaf) for head in head_names(config) for leaf in ("kernel", "bias")]
    return (*rows, *(row._replace(head=True) for row in heads))


def adapter_names(config: ViTConfig) -> dict[str, str]:
    """What PEFT's files call the weights, since transformers renamed its modules in version 5.

    Files of weights keep the names of `names`, and so do adapters made with older versions.

    Args:
        config: the model's configuration.

    Returns:
        Torch names by parameter path, for `names=` of `jaxpeft.hf.load_adapter` and
        `save_adapter`.

    Example:
        >>> from jaxpeft.models.vit_config import from_hf
        >>> config = from_hf({"model_type": "vit", "hidden_size": 4, "intermediate_size": 8,
        ...     "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4})
        >>> adapter_names(config)["encoder/layer/attention/attention/query/kernel"]
        'layers.{layer}.attention.q_proj.weight'
    """
    found = {}
    for row in names(config):
        tensor = row.tensor
        for old, new in _RENAMED if row.stacked else ():
            tensor = tensor.replace(old, new)
        found[row.path] = tensor
    return found


def head_names(config: ViTConfig) -> tuple[str, ...]:
    """The modules that give logits: of the class token, then of the distillation token."""
    if config.task != CLASSIFY:
        return ()
    return ("cls_classifier", "distillation_classifier") if config.teacher else ("classifier",)
