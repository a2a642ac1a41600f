"""ViT and DeiT against transformers on the same random weights."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

import jaxpeft as jp
from jaxpeft.models.vit import ViT
from jaxpeft.models.vit_config import from_hf, to_hf
from jaxpeft.models.vit_positions import cubic_matrix
from tests.models.vit_oracle import MODELS, SIZES, check, pixels, reference
from tests.models.vit_oracle import vit_oracle as vit_oracle

CLASSIFIERS = [name for name in MODELS if name != "vit-bare"]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_logits_equal_transformers(vit_oracle, name):
    torch_model, directory = vit_oracle(name)
    model, params = jp.models.load(directory)
    images = pixels(torch_model)
    logits = jax.jit(model.apply)(params, images)
    assert logits.dtype == jnp.float32
    check(logits, reference(torch_model, images).logits)


def test_each_head_of_a_distilled_deit(vit_oracle):
    torch_model, directory = vit_oracle("deit-teacher")
    model, params = jp.models.load(directory)
    expected = reference(torch_model, pixels(torch_model))
    logits = nnx.merge(nnx.graphdef(model), params).head_logits(pixels(torch_model))
    check(logits[0], expected.cls_logits)
    check(logits[1], expected.distillation_logits)


@pytest.mark.parametrize("name", MODELS)
def test_saved_files_are_those_of_transformers(vit_oracle, tmp_path, name):
    torch_model, directory = vit_oracle(name)
    model, params = jp.models.load(directory, task=None if name in CLASSIFIERS else "embedding")
    jp.models.save(tmp_path, model, params)
    wanted, got = (load_file(path / "model.safetensors") for path in (directory, tmp_path))
    assert got.keys() == wanted.keys()
    assert all((got[key] == wanted[key]).all() for key in wanted)
    again = type(torch_model).from_pretrained(tmp_path)
    wanted, got = torch_model.config.to_dict(), again.config.to_dict()
    assert {key for key in wanted if wanted[key] != got[key]} <= {"_name_or_path", "dtype"}


def test_a_bare_model_gives_states_or_its_pooled_class_token(vit_oracle):
    torch_model, directory = vit_oracle("vit-bare")
    images = pixels(torch_model)
    expected = reference(torch_model, images)
    model, params = jp.models.load(directory)
    check(jax.jit(model.apply)(params, images), expected.last_hidden_state)
    model, params = jp.models.load(directory, task="embedding")
    check(jax.jit(model.apply)(params, images), expected.pooler_output)


def test_a_classifier_gives_embeddings_and_states_too(vit_oracle):
    torch_model, directory = vit_oracle("deit")
    images = pixels(torch_model)
    expected = reference(torch_model.deit, images).last_hidden_state
    model, params = jp.models.load(directory, task="embedding")
    check(jax.jit(model.apply)(params, images), expected[:, 0])


def test_a_head_for_other_labels_starts_afresh(vit_oracle):
    torch_model, directory = vit_oracle("vit-bare")
    images = pixels(torch_model)
    load = lambda **kw: jp.models.load(directory, task="image-classification", **kw)  # noqa: E731
    model, params = load(labels=["cat", "dog"])
    assert model.config.labels == ("cat", "dog")
    states = reference(torch_model, images).last_hidden_state[:, 0].numpy()
    kernel = np.asarray(params["classifier"]["kernel"][...])
    assert np.std(kernel) == pytest.approx(SIZES["initializer_range"], rel=0.3)
    check(jax.jit(model.apply)(params, images), states @ kernel)
    other = load(labels=2, seed=1)[1]["classifier"]["kernel"][...]
    assert not np.array_equal(other, kernel)


@pytest.mark.parametrize("name", ["vit", "deit-teacher"])
@pytest.mark.parametrize("size", [(20, 24), (9, 12)])
def test_positions_are_interpolated_for_other_sizes(vit_oracle, name, size):
    torch_model, directory = vit_oracle(name)
    model, params = jp.models.load(directory)
    images = pixels(torch_model, size)
    expected = reference(torch_model, images, interpolate_pos_encoding=True).logits
    check(jax.jit(partial(model.apply, interpolate=True))(params, images), expected)
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} .*interpolate=True"):
        model.apply(params, images)


@pytest.mark.parametrize("given, wanted", [(3, 7), (7, 3), (4, 4), (1, 5)])
def test_the_cubic_kernel_is_that_of_torch(given, wanted):
    values = torch.eye(given, dtype=torch.float64)[None, :, None, :]
    expected = torch.nn.functional.interpolate(values, size=(1, wanted), mode="bicubic")
    np.testing.assert_allclose(cubic_matrix(given, wanted), expected[0, :, 0].T, atol=1e-6)


def test_the_encoder_takes_any_number_of_tokens(vit_oracle):
    torch_model, directory = vit_oracle("vit")
    model, params = jp.models.load(directory)
    states = torch.randn(2, 17, SIZES["hidden_size"])
    encoder = nnx.merge(nnx.graphdef(model), params).encoder
    expected = states
    for layer in torch_model.vit.layers:
        expected = layer(expected)
    check(encoder(jnp.asarray(states.numpy())), expected)


@pytest.mark.parametrize("remat", ["kept", None])
def test_gradients_equal_torch_whatever_is_recomputed(vit_oracle, remat):
    torch_model, directory = vit_oracle("vit")
    model, params = jp.models.load(directory)
    images, labels = pixels(torch_model), np.array([2, 0])
    torch_model.zero_grad()
    logits = torch_model(torch.tensor(images).permute(0, 3, 1, 2)).logits
    torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()

    def loss(params):
        scores = jax.nn.log_softmax(model.apply(params, images))
        return -jnp.mean(scores[jnp.arange(2), labels])

    if remat is None:
        model.encoder.remat = None
    grads = jax.jit(jax.grad(loss))(params)
    query = torch_model.vit.layers[1].attention.q_proj.weight.grad.T
    check(grads["encoder"]["layer"]["attention"]["attention"]["query"]["kernel"][...][1], query)
    patches = torch_model.vit.embeddings.patch_embeddings.projection.weight.grad
    kernel = grads["embeddings"]["patch_embeddings"]["projection"]["kernel"][...]
    check(kernel, patches.permute(2, 3, 1, 0))
    torch_model.zero_grad()


def test_bfloat16_stays_close(vit_oracle):
    torch_model, directory = vit_oracle("vit")
    model, params = jp.models.load(directory, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    logits = jax.jit(model.apply)(params, pixels(torch_model))
    assert logits.dtype == jnp.float32
    # bfloat16 keeps 8 bits; three layers of random signs lose a little more than one of them.
    check(logits, reference(torch_model, pixels(torch_model)).logits, rtol=5e-2)


def config_of(**options):
    return {"model_type": "vit", **SIZES, **options}


def test_configs_go_both_ways(vit_oracle):
    for name in MODELS:
        values = json.loads((vit_oracle(name)[1] / "config.json").read_text())
        config = from_hf(values)
        assert from_hf(to_hf(config, "float32")) == config


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(model_type="swin"), "model_type='swin'.*vit, deit"),
        (dict(hidden_act="mish"), "hidden_act='mish'.*gelu"),
        (dict(num_attention_heads=5), "hidden_size=32 is no multiple of num_attention_heads=5"),
        (dict(patch_size=16), "smaller than patch_size"),
    ],
)
def test_what_is_not_supported_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        from_hf(config_of(**options))


def test_a_missing_size_and_an_unknown_task_are_named():
    values = config_of()
    del values["patch_size"]
    with pytest.raises(ValueError, match="lacks patch_size"):
        from_hf(values)
    with pytest.raises(ValueError, match="task='causal-lm'.*'image-classification'"):
        from_hf(config_of(), task="causal-lm")


def test_images_with_their_channels_first_are_refused():
    def call(images):
        return ViT(from_hf(config_of(), task="embedding"), rngs=nnx.Rngs(0))(images)

    with pytest.raises(ValueError, match=r"\(2, 3, 12, 12\).*\(12, 12, 3\)"):
        jax.eval_shape(call, jnp.zeros((2, 3, 12, 12)))
