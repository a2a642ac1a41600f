"""The architecture of a vision transformer, read from and written to `config.json`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.models.layers import ACTIVATIONS
from jaxpeft.models.tasks import EMBED, check_option, labels_of, labels_to_hf, task_of

CLASSIFY = "image-classification"

# The classes of transformers: a bare model, a head on the class token, and DeiT's two heads.
_BARE = {"vit": "ViTModel", "deit": "DeiTModel"}
_CLASSIFIER = {"vit": "ViTForImageClassification", "deit": "DeiTForImageClassification"}
_TEACHER = "DeiTForImageClassificationWithTeacher"
# What transformers assumes where config.json is silent. Sizes have no default: silence is an error.
_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)
_OPTIONAL = (
    "num_channels",
    "hidden_act",
    "layer_norm_eps",
    "qkv_bias",
    "initializer_range",
    "pooler_output_size",
    "pooler_act",
)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Shapes and constants of a ViT or DeiT, under their Hugging Face names.

    Sizes of images and patches are (height, width) in pixels. `task` is "image-classification",
    "embedding" (the pooled class token) or None (all tokens' states). `teacher` says that a DeiT
    has a second head, on the distillation token; `pooler` that the embedding goes through a dense
    layer with a tanh, as in checkpoints of bare models. `labels` are the names of the classes.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_channels: int = 3
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    initializer_range: float = 0.02
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"
    task: str | None = None
    labels: tuple[str, ...] = ()
    teacher: bool = False
    pooler: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is no multiple of num_attention_heads="
                f"{self.num_attention_heads}; check config.json."
            )
        if min(self.grid) < 1:
            raise ValueError(
                f"image_size={self.image_size} is smaller than patch_size={self.patch_size}; "
                "check config.json."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches from top to bottom and from left to right."""
        (height, width), (tall, wide) = self.image_size, self.patch_size
        return height // tall, width // wide

    @property
    def extra_tokens(self) -> int:
        """Tokens before those of the patches: the class token, and DeiT's distillation token."""
        return 2 if self.model_type == "deit" else 1


def from_hf(
    values: Mapping[str, Any], task: str | None = None, labels: Sequence[str] | int | None = None
) -> ViTConfig:
    """Turn the dictionary of a `config.json` into a `ViTConfig`.

    Args:
        values: the parsed file, as transformers 4 or 5 writes it.
        task: "image-classification" or "embedding"; None for what `architectures` says.
        labels: the names of the classes, or their number; None for those in the file.

    Returns:
        The model's configuration.

    Raises:
        ValueError: an option is missing, or has a value that the model does not support.

    Example:
        >>> config = from_hf({"model_type": "vit", "hidden_size": 4, "intermediate_size": 8,
        ...     "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
        ...     "patch_size": 4, "architectures": ["ViTForImageClassification"]})
        >>> config.grid, config.task
        ((2, 2), 'image-classification')
    """
    _check_supported(values)
    model_type = values["model_type"]
    architecture = (values.get("architectures") or [_BARE[model_type]])[0]
    heads = (_CLASSIFIER[model_type], _TEACHER)
    task = task_of(values, task, (CLASSIFY, EMBED))
    task = CLASSIFY if task is None and architecture in heads else task
    return ViTConfig(
        model_type=model_type,
        **{name: values[name] for name in _REQUIRED[:4]},
        image_size=_pair(values["image_size"]),
        patch_size=_pair(values["patch_size"]),
        **{name: values[name] for name in _OPTIONAL if name in values},
        task=task,
        labels=labels_of(values, labels),
        teacher=task == CLASSIFY and architecture == _TEACHER,
        pooler=task == EMBED and architecture not in heads,
    )


def to_hf(config: ViTConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` that transformers reads as the same model; the inverse of `from_hf`.

    Args:
        config: the model's configuration.
        dtype: the name of the dtype of the saved weights, `"float32"` for one.

    Returns:
        A dictionary ready for `json.dump`.
    """
    values = dataclasses.asdict(config)
    for name in ("task", "teacher", "pooler", "labels"):
        del values[name]
    for name in ("image_size", "patch_size"):
        height, width = values[name]
        values[name] = height if height == width else [height, width]
    known = {"architectures": [architecture_of(config)], "torch_dtype": dtype}
    return values | labels_to_hf(config.labels) | known


def architecture_of(config: ViTConfig) -> str:
    """The class of transformers that holds the same weights."""
    if config.teacher:
        return _TEACHER
    kind = _CLASSIFIER if config.task == CLASSIFY else _BARE
    return kind[config.model_type]


def _check_supported(values: Mapping[str, Any]) -> None:
    if values.get("model_type") not in _BARE:
        raise ValueError(
            f"model_type={values.get('model_type')!r} is not supported. "
            f"Supported: {', '.join(_BARE)}."
        )
    missing = [name for name in _REQUIRED if name not in values]
    if missing:
        raise ValueError(
            f"config.json of a {values['model_type']!r} model lacks {', '.join(missing)}."
        )
    check_option(values, "hidden_act", tuple(ACTIVATIONS))
    check_option(values, "pooler_act", tuple(ACTIVATIONS))


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
