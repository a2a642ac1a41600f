"""Tiny random vision transformers of transformers, saved as Hugging Face directories."""

import numpy as np
import pytest
import torch
import transformers

SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=12,
    patch_size=4,
    num_channels=3,
    initializer_range=0.2,
    num_labels=3,
)
OBLONG = dict(image_size=(12, 8), patch_size=(4, 2), num_channels=1, qkv_bias=False)
# The class in transformers, and options.
MODELS = {
    "vit": ("ViTForImageClassification", {}),
    "vit-oblong": ("ViTForImageClassification", OBLONG | dict(hidden_act="relu")),
    "deit": ("DeiTForImageClassification", dict(hidden_act="gelu_new")),
    "deit-teacher": ("DeiTForImageClassificationWithTeacher", {}),
    "vit-bare": ("ViTModel", dict(pooler_output_size=20)),
}


@pytest.fixture(scope="session")
def vit_oracle(tmp_path_factory):
    """`vit_oracle(name)` gives the transformers model and the directory where it is saved."""
    made = {}

    def get(name):
        if name not in made:
            class_name, options = MODELS[name]
            config = transformers.AutoConfig.for_model(name.split("-")[0], **SIZES | options)
            torch.manual_seed(0)
            model = getattr(transformers, class_name)(config).eval()
            with torch.no_grad():
                for tensor in model.parameters():
                    tensor.add_(torch.randn_like(tensor) * 0.2)
            made[name] = model, tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name][1])
        return made[name]

    return get


def pixels(torch_model, size=None):
    """Two random images, `float32[2, H, W, C]`."""
    config = torch_model.config
    size = config.image_size if size is None else size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, height, width, config.num_channels, generator=generator).numpy()


def reference(torch_model, images, **kw):
    """What the transformers model gives for images `[B, H, W, C]`."""
    with torch.no_grad():
        return torch_model(torch.tensor(np.asarray(images)).permute(0, 3, 1, 2), **kw)


def check(actual, expected, rtol=1e-5):
    """Equal to `rtol` of the largest value."""
    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual) / scale, expected / scale, atol=rtol)
