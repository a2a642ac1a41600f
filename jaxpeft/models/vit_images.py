"""Images as a vision transformer takes them, as `preprocessor_config.json` says.

x = (scale * crop(resize(image)) - mean) / std
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

# The numbers that Pillow, and so preprocessor_config.json, has for its filters.
FILTERS = {0: "nearest", 1: "lanczos3", 2: "linear", 3: "cubic"}
_HALF = (0.5, 0.5, 0.5)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the model sees it. None leaves a step out.

    Attributes:
        size: (height, width) to resize to; one number for the shorter edge alone.
        crop: (height, width) to cut out of the middle.
        method: of `jax.image.resize`.
        scale: of the pixels, such as 1/255.
        mean: of each channel, subtracted after scaling.
        std: of each channel, divided by.
    """

    size: tuple[int, int] | int | None = (224, 224)
    crop: tuple[int, int] | None = None
    method: str = "linear"
    scale: float = 1 / 255
    mean: tuple[float, ...] = _HALF
    std: tuple[float, ...] = _HALF


_DEFAULTS = {
    "ViT": Preprocessing(),
    "DeiT": Preprocessing((256, 256), (224, 224), "cubic", 1 / 255, _IMAGENET_MEAN, _IMAGENET_STD),
}


def read_preprocessing(directory: str | Path) -> Preprocessing:
    """Read `preprocessor_config.json` in a Hugging Face model directory.

    Args:
        directory: where the file lies.

    Returns:
        The steps. Where the file is silent they are those of `ViTImageProcessor`, or of
        `DeiTImageProcessor` if the file names it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or asks for a step that is not supported.
    """
    path = Path(directory) / "preprocessor_config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Describe the steps yourself: "
            "Preprocessing(size=(224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    return preprocessing_from_hf(values)


def preprocessing_from_hf(values: Mapping[str, Any]) -> Preprocessing:
    """Turn the dictionary of a `preprocessor_config.json` into a `Preprocessing`.

    Args:
        values: the parsed file.

    Returns:
        The steps.

    Raises:
        ValueError: a step is not supported.

    Example:
        >>> preprocessing_from_hf({"size": 32, "resample": 3, "image_mean": [0.0] * 3}).method
        'cubic'
    """
    kind = values.get("image_processor_type", values.get("feature_extractor_type", "ViT"))
    start = _DEFAULTS["DeiT" if kind.startswith("DeiT") else "ViT"]
    resample = values.get("resample", {v: k for k, v in FILTERS.items()}[start.method])
    if resample not in FILTERS:
        known = ", ".join(f"{number} ({name})" for number, name in FILTERS.items())
        raise ValueError(f"resample={resample!r} is not supported. Supported: {known}.")
    resized = values.get("do_resize", True)
    cropped = values.get("do_center_crop", start.crop is not None)
    scaled, normalized = values.get("do_rescale", True), values.get("do_normalize", True)
    size, crop = values.get("size", start.size), values.get("crop_size", start.crop or start.size)
    channels = len(values.get("image_mean", start.mean))
    return Preprocessing(
        size=_size(size) if resized else None,
        crop=_crop(crop) if cropped else None,
        method=FILTERS[resample],
        scale=values.get("rescale_factor", start.scale) if scaled else 1.0,
        mean=tuple(values.get("image_mean", start.mean)) if normalized else (0.0,) * channels,
        std=tuple(values.get("image_std", start.std)) if normalized else (1.0,) * channels,
    )


def preprocess(images: ArrayLike, steps: Preprocessing) -> Array:
    """Resize, crop, scale and normalize images of one size.

    Args:
        images: `[B, H, W, C]`, from 0 to 255 if `steps.scale` is 1/255. Whole numbers stay whole
            when they are resized, as Pillow has it.
        steps: what to do, from `read_preprocessing`.

    Returns:
        `float32[B, height, width, C]`, ready for the model.

    Raises:
        ValueError: the images have other axes or channels, or are smaller than what is cut out.

    Example:
        >>> preprocess(jnp.full((1, 8, 6, 3), 255, "uint8"), Preprocessing(size=(4, 4)))[0, 0, 0]
        Array([1., 1., 1.], dtype=float32)
    """
    images = jnp.asarray(images)
    if images.ndim != 4 or images.shape[-1] != len(steps.mean):
        raise ValueError(
            f"images have shape {images.shape}, but (batch, height, width, {len(steps.mean)}) is "
            "needed. One image is images[None]; a grey one is "
            f"jnp.broadcast_to(images[..., None], (*images.shape, {len(steps.mean)}))."
        )
    x = images.astype(jnp.float32)
    if steps.size is not None:
        whole = jnp.issubdtype(images.dtype, jnp.integer)
        x = _resize(x, _target(x.shape[1:3], steps.size), steps.method, whole)
    x = x if steps.crop is None else _cut(x, steps.crop)
    return (x * steps.scale - jnp.array(steps.mean)) / jnp.array(steps.std)


def _target(given: Sequence[int], size: tuple[int, int] | int) -> tuple[int, int]:
    """Height and width after resizing; with a number, the longer edge keeps the proportions."""
    if not isinstance(size, int):
        return size
    height, width = given
    short = min(height, width)
    return int(size * height / short), int(size * width / short)


def _resize(x: Array, size: tuple[int, int], method: str, whole: bool) -> Array:
    """One axis after the other, as Pillow does, which rounds to bytes after each."""
    for axis in (2, 1):
        shape = (*x.shape[:axis], size[axis - 1], *x.shape[axis + 1 :])
        x = jax.image.resize(x, shape, method)
        x = jnp.clip(jnp.floor(x + 0.5), 0, 255) if whole else x
    return x


def _cut(x: Array, crop: tuple[int, int]) -> Array:
    (height, width), (tall, wide) = x.shape[1:3], crop
    if height < tall or width < wide:
        raise ValueError(
            f"images of {height} x {width} pixels are smaller than the crop, {tall} x {wide}. "
            "Resize them to more: Preprocessing(size=...)."
        )
    top, left = (height - tall) // 2, (width - wide) // 2
    return x[:, top : top + tall, left : left + wide]


def _size(given: Any) -> tuple[int, int] | int:
    if isinstance(given, Mapping) and "shortest_edge" in given and "longest_edge" not in given:
        return int(given["shortest_edge"])
    return _crop(given)


def _crop(given: Any) -> tuple[int, int]:
    if isinstance(given, Mapping):
        if not {"height", "width"} <= given.keys():
            raise ValueError(
                f"size={dict(given)!r} is not supported. Supported: a number, height and width, or "
                "shortest_edge alone."
            )
        return int(given["height"]), int(given["width"])
    height, width = (given, given) if isinstance(given, int) else given
    return int(height), int(width)
