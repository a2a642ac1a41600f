"""Preprocessing against the image processors of transformers, which use Pillow."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from jaxpeft.models.vit_images import Preprocessing, preprocess, read_preprocessing

SMALL = dict(size={"height": 24, "width": 20})
PROCESSORS = {
    "vit": (ViTImageProcessorPil, SMALL),
    "vit-cubic": (ViTImageProcessorPil, SMALL | dict(resample=3)),
    "vit-lanczos": (ViTImageProcessorPil, SMALL | dict(resample=1)),
    "vit-nearest": (ViTImageProcessorPil, SMALL | dict(resample=0)),
    "vit-larger": (ViTImageProcessorPil, dict(size={"height": 50, "width": 60})),
    "vit-shorter-edge": (ViTImageProcessorPil, dict(size={"shortest_edge": 16})),
    "vit-rescaled-only": (
        ViTImageProcessorPil,
        dict(do_resize=False, do_normalize=False, rescale_factor=1 / 127.5),
    ),
    "deit": (DeiTImageProcessorPil, dict(size=SMALL["size"], crop_size={"height": 16, "width": 9})),
    "deit-uncropped": (DeiTImageProcessorPil, SMALL | dict(do_center_crop=False)),
}


@pytest.fixture
def photos():
    """Two smooth images of 40 x 31 pixels with some noise, as bytes."""
    rng = np.random.default_rng(0)
    coarse = torch.tensor(rng.random((2, 3, 5, 4)))
    smooth = torch.nn.functional.interpolate(coarse, size=(40, 31), mode="bilinear").numpy()
    noisy = smooth.transpose(0, 2, 3, 1) * 200 + rng.normal(0, 8, (2, 40, 31, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_equal_those_of_transformers(photos, tmp_path, name):
    make, options = PROCESSORS[name]
    processor = make(**options)
    processor.save_pretrained(tmp_path)
    steps = read_preprocessing(tmp_path)
    expected = processor(list(photos), return_tensors="np")["pixel_values"]
    got = jax.jit(preprocess, static_argnums=1)(photos, steps).transpose(0, 3, 1, 2)
    assert got.shape == expected.shape and got.dtype == jnp.float32
    # Pillow has weights in 22 bits: where they meet a half, it may go to the other side.
    one = steps.scale / min(steps.std)
    error = np.abs(np.asarray(got) - expected)
    assert error.max() < 1.01 * one and (error > 0.01 * one).mean() < 0.06


def test_fractions_are_resized_as_torch_does(photos):
    images = torch.tensor(photos).permute(0, 3, 1, 2).double() / 255
    expected = torch.nn.functional.interpolate(
        images, size=(13, 50), mode="bicubic", antialias=True, align_corners=False
    )
    steps = Preprocessing((13, 50), None, "cubic", 1.0, (0.0,) * 3, (1.0,) * 3)
    got = preprocess(photos / np.float32(255), steps)
    np.testing.assert_allclose(got, expected.permute(0, 2, 3, 1), atol=1e-5)


def test_files_of_old_transformers_have_numbers_for_sizes(tmp_path):
    values = {"feature_extractor_type": "DeiTFeatureExtractor", "size": 32, "crop_size": 28}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    steps = read_preprocessing(tmp_path)
    assert (steps.size, steps.crop, steps.method) == ((32, 32), (28, 28), "cubic")


def test_errors_name_the_remedy(tmp_path, photos):
    with pytest.raises(FileNotFoundError, match=r"Preprocessing\(size="):
        read_preprocessing(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    for values, words in (
        ({"resample": 5}, "resample=5.*2 .linear."),
        ({"size": {"longest_edge": 8}}, "longest_edge.*shortest_edge alone"),
    ):
        path.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=words):
            read_preprocessing(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_preprocessing(tmp_path)
    with pytest.raises(ValueError, match=r"images\[None\]"):
        preprocess(photos[0], Preprocessing())
    with pytest.raises(ValueError, match="16 x 16 pixels are smaller than the crop, 20 x 20"):
        preprocess(photos, Preprocessing((16, 16), (20, 20)))
