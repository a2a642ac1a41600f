"""PEFT's LoRA adapters of encoders with heads, both ways."""

import json

import jax
import numpy as np
import peft
import pytest
from safetensors.numpy import load_file

import jaxpeft as jp
from jaxpeft.hf import PeftFormatError, load_adapter, save_adapter
from tests.hf.conftest import PEFT_WARNINGS, randomize
from tests.hf.test_write import random_adapter, same
from tests.models.encoders import HEADS, check, make_encoder, padded, reference

pytestmark = PEFT_WARNINGS
CLASSIFY, TAG, ANSWER = "sequence-classification", "token-classification", "question-answering"
QV = {"distilbert": ["q_lin", "v_lin"]}
# The model, its task, PEFT's name of that, and the modules that PEFT then trains whole.
CASES = {
    "bert": ("bert", CLASSIFY, "SEQ_CLS", ["classifier"]),
    "bert-tokens": ("bert", TAG, "TOKEN_CLS", ["classifier"]),
    "bert-bare": ("bert", None, "FEATURE_EXTRACTION", []),
    "roberta": ("roberta", CLASSIFY, "SEQ_CLS", ["classifier.dense", "classifier.out_proj"]),
    "roberta-answers": ("roberta", ANSWER, "QUESTION_ANS", ["qa_outputs"]),
    "distilbert": ("distilbert", CLASSIFY, "SEQ_CLS", ["classifier", "pre_classifier"]),
}


def saved(model_type, task, directory):
    """A transformers model, and ours of the same weights."""
    torch_model = make_encoder(model_type, task)
    torch_model.save_pretrained(directory)
    return (torch_model, *jp.models.load(directory))


@pytest.mark.parametrize("name", CASES)
def test_what_peft_wrote_is_read_and_what_we_write_peft_reads(tmp_path, name):
    model_type, task, task_type, heads = CASES[name]
    torch_model, model, params = saved(model_type, task, tmp_path / "base")
    tokens, mask = padded(model_type)
    shown = mask if reference(torch_model, tokens, mask).ndim == 3 else slice(None)
    options = dict(r=3, lora_alpha=5, target_modules=QV.get(model_type, ["query", "value"]))
    theirs = peft.get_peft_model(torch_model, peft.LoraConfig(task_type=task_type, **options))
    randomize(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    expected = reference(theirs, tokens, mask)[shown]

    tuned, adapter = load_adapter(tmp_path / "theirs", model)
    actual = jax.jit(tuned.apply)(adapter, params, tokens, mask=mask)
    check(np.asarray(actual)[shown], expected)
    whole = {path for path in adapter if not path.endswith(("query/kernel", "value/kernel"))}
    assert whole == {f"{head.replace('.', '/')}/{x}" for head in heads for x in ("kernel", "bias")}

    save_adapter(tmp_path / "ours", tuned, adapter, model=model)
    first, second = (
        load_file(tmp_path / place / "adapter_model.safetensors") for place in ("theirs", "ours")
    )
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    written = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    for key in ("task_type", "modules_to_save", "r", "lora_alpha", "bias"):
        assert config[key] == written[key], key
    fresh = HEADS[task][0].from_pretrained(tmp_path / "base", attn_implementation="eager")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    check(reference(again, tokens, mask)[shown], expected)


def test_a_tuning_of_ours_with_a_head_is_read_by_peft(tmp_path):
    torch_model, model, params = saved("roberta", CLASSIFY, tmp_path / "base")
    tokens, mask = padded("roberta")
    tuning = jp.rules(("classifier/**", jp.full()), ("encoder/**/kernel", jp.lora(2, alpha=3)))
    tuned = jp.transform(model, tuning)
    adapter = random_adapter(tuned.init(jax.random.key(0), params, tokens, mask=mask))
    save_adapter(tmp_path / "ours", tuned, adapter, model=model)
    again = peft.PeftModel.from_pretrained(torch_model, tmp_path / "ours").eval()
    assert isinstance(again, peft.PeftModelForSequenceClassification)
    logits = jax.jit(tuned.apply)(adapter, params, tokens, mask=mask)
    check(logits, reference(again, tokens, mask))
    check(jax.jit(model.apply)(tuned.merge(adapter, params), tokens, mask=mask), logits)
    _, loaded = load_adapter(tmp_path / "ours", model)
    same(adapter, loaded)


def test_a_bare_lora_leaves_the_head_alone(tmp_path):
    _, model, params = saved("bert", CLASSIFY, tmp_path)
    tokens, mask = padded("bert")
    paths = set(jp.transform(model, jp.lora(2)).init(jax.random.key(0), params, tokens))
    names = {"query", "key", "value", "dense"}
    assert {path.split("/")[-2] for path in paths} == names
    assert "pooler/dense/kernel" in paths and "classifier/kernel" not in paths


def test_a_pooler_that_no_call_uses_is_written_as_torch_has_it(tmp_path):
    torch_model, model, params = saved("bert", None, tmp_path / "base")
    tokens, _ = padded("bert")
    tuning = jp.rules(("pooler/**", jp.full()), ("**/query/kernel", jp.lora(2)))
    tuned = jp.transform(model, tuning)
    adapter = tuned.init(jax.random.key(0), params, tokens)
    save_adapter(tmp_path / "ours", tuned, adapter, model=model)
    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    expected = torch_model.pooler.dense.weight.detach().numpy()
    np.testing.assert_array_equal(tensors["base_model.model.pooler.dense.weight"], expected)


def test_the_model_is_asked_for_where_names_depend_on_it(tmp_path):
    _, model, params = saved("bert", CLASSIFY, tmp_path / "base")
    tokens, _ = padded("bert")
    tuned = jp.transform(model, jp.rules(("**/query/kernel", jp.lora(2))))
    adapter = tuned.init(jax.random.key(0), params, tokens)
    with pytest.raises(ValueError, match="Pass names=.*or model="):
        save_adapter(tmp_path / "ours", tuned, adapter)
    tuning = jp.rules(("**/query/kernel", jp.lora(2)), ("classifier/kernel", jp.full()))
    tuned = jp.transform(model, tuning)
    adapter = tuned.init(jax.random.key(0), params, tokens)
    with pytest.raises(PeftFormatError, match="not on its bias"):
        save_adapter(tmp_path / "ours", tuned, adapter, model=model)
