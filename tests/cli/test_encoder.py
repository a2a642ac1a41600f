"""Commands that are given an encoder where they know decoders best."""

import shutil

import pytest

from tests.models.encoders import make_encoder


@pytest.fixture(scope="module")
def encoder(tiny_model, tmp_path_factory):
    """A BERT with a classifier, with the tokenizer of another model beside it."""
    directory = tmp_path_factory.mktemp("encoder") / "bert"
    shutil.copytree(tiny_model, directory)
    model = make_encoder("bert", "sequence-classification")
    model.save_pretrained(directory)
    return directory, sum(parameter.numel() for parameter in model.parameters())


def test_inspect_shows_an_encoder(jaxpeft, encoder):
    directory, parameters = encoder
    result = jaxpeft("inspect", directory)
    assert result.code == 0
    assert "architecture bert" in result.out and f"parameters {parameters:,}" in result.out
    assert "task sequence-classification" in result.out
    assert "classifier/kernel" in result.out


def test_an_encoder_writes_no_text(jaxpeft, encoder):
    result = jaxpeft("generate", encoder[0], "--prompt", "a")
    assert result.code != 0
    assert "task='causal-lm' is not supported for model_type='bert'" in result.err
