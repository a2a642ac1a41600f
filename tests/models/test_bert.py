"""Encoders and their heads against transformers, on the same random weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxpeft.models import load, save
from tests.models.encoders import HEADS, SIZES, TYPES, check, make_encoder, padded, reference

# XLM-RoBERTa is a RoBERTa under another name, and a regression a classifier of one class.
WITH_HEADS = [
    *((kind, task) for kind in ("bert", "roberta", "distilbert") for task in HEADS if task),
    ("xlm-roberta", "sequence-classification"),
]
WITH_HEADS = [case for case in WITH_HEADS if case[1] != "regression" or case[0] == "bert"]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """`oracle(model_type, task)` gives the transformers model and the directory it is saved in."""
    made = {}

    def get(model_type, task=None):
        if (model_type, task) not in made:
            directory = tmp_path_factory.mktemp(f"{model_type}-{task}")
            model = make_encoder(model_type, task)
            model.save_pretrained(directory)
            made[model_type, task] = (model, directory)
        return made[model_type, task]

    return get


def equal(params, other):
    return jax.tree.all(jax.tree.map(np.array_equal, params, other))


def check_padded(model, params, torch_model, tokens, mask):
    """Equal where there is a text; what a model makes of padding does not matter."""
    actual = jax.jit(model.apply)(params, tokens, mask=mask)
    expected = reference(torch_model, tokens, mask)
    if expected.ndim == 3:
        actual, expected = np.asarray(actual)[mask], expected[mask]
    check(actual, expected)


def check_written(auto, directory, torch_model):
    """transformers reads the same weights from what was written, and all of them."""
    again, report = auto.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
    expected = torch_model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())
    return again


@pytest.mark.parametrize("model_type", TYPES)
def test_a_bare_model_is_read_and_written_whole(oracle, tmp_path, model_type):
    torch_model, directory = oracle(model_type)
    model, params = load(directory)
    step = jax.jit(model.apply)  # one program for both sides
    for side in ("left", "right"):
        tokens, mask = padded(model_type, side)
        states = step(params, tokens, mask=mask)
        check(np.asarray(states)[mask], reference(torch_model, tokens, mask)[mask])
    assert states.dtype == jnp.float32
    save(tmp_path, model, params)
    check_written(transformers.AutoModel, tmp_path, torch_model)


@pytest.mark.parametrize(("model_type", "task"), WITH_HEADS)
def test_each_head_is_read_and_written(oracle, tmp_path, model_type, task):
    torch_model, directory = oracle(model_type, task)
    model, params = load(directory)
    assert model.config.task == task
    tokens, mask = padded(model_type)
    check_padded(model, params, torch_model, tokens, mask)
    save(tmp_path, model, params)
    again = check_written(HEADS[task][0], tmp_path, torch_model)
    check(reference(again, tokens, mask), reference(torch_model, tokens, mask), rtol=1e-6)
    assert again.config.id2label == torch_model.config.id2label
    assert again.config.problem_type == torch_model.config.problem_type


def test_types_and_positions_that_are_given(oracle):
    types = (np.arange(9) > np.array([[4], [7]])).astype(int)
    positions = np.arange(9)[None] * 2 + np.array([[0], [3]])
    tokens, _ = padded("bert")
    torch_model, directory = oracle("bert")
    model, params = load(directory)
    actual = jax.jit(model.apply)(params, tokens, token_types=types, positions=positions)
    given = dict(token_type_ids=types, position_ids=positions)
    check(actual, reference(torch_model, tokens, **given))
    torch_model, directory = oracle("roberta")
    model, params = load(directory)
    actual = jax.jit(model.apply)(params, tokens, positions=positions)
    check(actual, reference(torch_model, tokens, position_ids=positions))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_are_pooled_over_the_mask_and_have_length_one(oracle, tmp_path, pooling):
    torch_model, directory = oracle("bert")
    torch_model.save_pretrained(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    modes = {"pooling_mode_cls_token": pooling == "cls", "pooling_mode_mean_tokens": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    model, params = load(tmp_path, task="embedding")
    tokens, mask = padded("bert", "left")
    states = reference(torch_model, tokens, mask)
    pooled = states[:, 0] if pooling == "cls" else (states * mask[..., None]).sum(1)
    expected = pooled / np.linalg.norm(pooled, axis=-1, keepdims=True)
    check(jax.jit(model.apply)(params, tokens, mask=mask), expected)
    save(tmp_path / "saved", model, params)
    assert load(tmp_path / "saved", task="embedding")[0].config == model.config


def test_bfloat16_stays_close_to_float32(oracle):
    torch_model, directory = oracle("roberta", "sequence-classification")
    model, params = load(directory, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    tokens, mask = padded("roberta")
    logits = jax.jit(model.apply)(params, tokens, mask=mask)
    assert logits.dtype == jnp.float32
    # bfloat16 keeps 8 bits; three layers of random signs lose a little more than one of them.
    check(logits, reference(torch_model, tokens, mask), rtol=5e-2)


def test_gradients_equal_torch(oracle):
    torch_model, directory = oracle("distilbert", "sequence-classification")
    model, params = load(directory)
    tokens, mask = padded("distilbert")
    torch_model.zero_grad()
    given = dict(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(int)))
    torch_model(**given, labels=torch.tensor([2, 0])).loss.backward()
    expected = torch_model.distilbert.transformer.layer[1].attention.q_lin.weight.grad.numpy()

    @jax.jit
    @jax.grad
    def gradient(params):
        scores = jax.nn.log_softmax(model.apply(params, tokens, mask=mask))
        return -(scores[0, 2] + scores[1, 0]) / 2

    kernel = gradient(params)["encoder"]["layer"]["attention"]["self"]["query"]["kernel"][...]
    check(kernel[1], expected.T, rtol=1e-4)


def test_a_head_that_the_file_lacks_starts_afresh(oracle):
    _, directory = oracle("roberta")
    options = dict(task="sequence-classification", labels=["no", "yes", "maybe"])
    model, params = load(directory, **options)
    assert model.config.labels == ("no", "yes", "maybe")
    head = params["classifier"]
    assert head["out_proj"]["kernel"].shape == (32, 3) and not head["out_proj"]["bias"][...].any()
    kernel = head["dense"]["kernel"][...]
    assert float(kernel.std()) == pytest.approx(SIZES["initializer_range"], rel=0.1)
    same, other = (
        load(directory, **options, seed=seed)[1]["classifier"]["dense"]["kernel"][...]
        for seed in (0, 1)
    )
    assert np.array_equal(kernel, same) and not np.isclose(kernel, other).all()
    assert equal(load(directory)[1]["encoder"], params["encoder"])


def test_other_labels_replace_the_head(oracle):
    torch_model, directory = oracle("bert", "sequence-classification")
    renamed, params = load(directory, labels=["a", "b", "c"])
    expected = torch_model.classifier.weight.detach().numpy().T
    np.testing.assert_array_equal(params["classifier"]["kernel"][...], expected)
    assert renamed.config.labels == ("a", "b", "c")
    more, params = load(directory, labels=5)
    assert params["classifier"]["kernel"].shape == (32, 5) and more.config.outputs == 5
    pooler = torch_model.bert.pooler.dense.weight.detach().numpy().T
    np.testing.assert_array_equal(params["pooler"]["dense"]["kernel"][...], pooler)


def test_old_names_and_other_heads_in_a_file(oracle, tmp_path):
    """The first BERT's files: TensorFlow's names of norms, a head of masked words, a buffer."""
    from safetensors.numpy import load_file, save_file

    torch_model, directory = oracle("bert")
    tensors = {f"bert.{name}": value for name, value in load_file(
        directory / "model.safetensors").items()}  # fmt: skip
    for old, new in (("gamma", "weight"), ("beta", "bias")):
        for name in [name for name in tensors if name.endswith(f"LayerNorm.{new}")]:
            tensors[name.removesuffix(new) + old] = tensors.pop(name)
    tensors["cls.predictions.bias"] = np.zeros(64, np.float32)
    tensors["bert.embeddings.position_ids"] = np.arange(40)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    assert equal(load(tmp_path)[1], load(directory)[1])
    tensors["bert.encoder.stray"] = np.zeros(1, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has unknown 1 tensors.*bert.encoder.stray"):
        load(tmp_path)


def test_what_an_encoder_cannot_do_is_said(oracle):
    _, directory = oracle("distilbert")
    model, params = load(directory)
    tokens = np.ones((1, 41), int)
    with pytest.raises(ValueError, match=r"length 41.*has 40 positions"):
        model.apply(params, tokens)
    with pytest.raises(ValueError, match="token_types"):
        model.apply(params, tokens[:, :3], token_types=tokens[:, :3])
    with pytest.raises(ValueError, match=r"length 39.*has 38 positions"):
        model, params = load(oracle("roberta")[1])
        model.apply(params, tokens[:, :39])
    with pytest.raises(ValueError, match="task='causal-lm'.*Supported: 'sequence-classification'"):
        load(directory, task="causal-lm")
    for labels in ("yes", [], ["a", "a"]):
        with pytest.raises(ValueError, match="no list of one or more different names"):
            load(directory, task="sequence-classification", labels=labels)
    with pytest.raises(ValueError, match="there are no classes to name"):
        load(directory, task="embedding", labels=2)
