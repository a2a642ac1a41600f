"""Files of LoRA and of prefixes for T5s, both ways between PEFT and here."""

import copy

import jax
import numpy as np
import peft
import pytest
import torch

import jaxpeft as jp
from tests.hf.conftest import PEFT_WARNINGS
from tests.models.tiny_t5 import DECODER_MASK, MASK, check, reference
from tests.models.tiny_t5 import pairs as pairs
from tests.models.tiny_t5 import t5 as t5

pytestmark = PEFT_WARNINGS


def logits(tiny, tuned, adapter, pairs):
    apply = jax.jit(tuned.apply)
    return apply(adapter, tiny.params, *pairs, mask=MASK, decoder_mask=DECODER_MASK)


@pytest.mark.parametrize("name", ["t5", "flan"])
def test_a_file_of_peft_gives_the_logits_of_peft(t5, pairs, name, tmp_path):
    tiny = t5(name)
    options = dict(r=3, lora_alpha=6, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    torch_model = peft.get_peft_model(
        copy.deepcopy(tiny.torch_model), peft.LoraConfig(**options, init_lora_weights=False)
    )
    torch_model.save_pretrained(tmp_path)
    tuned, adapter = jp.hf.load_adapter(tmp_path, tiny.model)
    assert len(adapter) == 2 * 3  # q and v of the self-attentions, and of the cross-attention
    expected = reference(torch_model.eval(), *pairs).logits.numpy()
    check(
        np.asarray(logits(tiny, tuned, adapter, pairs))[DECODER_MASK], expected[DECODER_MASK], 1e-4
    )


@pytest.mark.parametrize("known", ["model", "adapter"])
def test_a_file_from_here_gives_the_same_logits_in_peft(t5, pairs, known, tmp_path):
    tiny = t5("flan")
    rules = jp.rules(("**/{q,v}/kernel", jp.lora(2, 4)), ("decoder/**/wo/kernel", jp.lora(3)))
    tuned = jp.transform(tiny.model, rules)
    adapter = tuned.init(jax.random.key(0), tiny.params, *pairs)
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    adapter = tree.unflatten(noise)
    options = dict(model=tiny.model) if known == "model" else {}
    jp.hf.save_adapter(tmp_path, tuned, adapter, **options)
    kind = "SEQ_2_SEQ_LM" if known == "model" else "CAUSAL_LM"
    assert peft.PeftConfig.from_pretrained(tmp_path).task_type == kind
    torch_model = peft.PeftModel.from_pretrained(copy.deepcopy(tiny.torch_model), tmp_path)
    expected = reference(torch_model.eval(), *pairs).logits.numpy()
    check(
        np.asarray(logits(tiny, tuned, adapter, pairs))[DECODER_MASK], expected[DECODER_MASK], 1e-4
    )
    loaded = jp.hf.load_adapter(tmp_path, tiny.model)[1]
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((a == b).all()), dict(loaded), dict(adapter))
    )


def prefixed(tiny, layers):
    """A T5 with a prefix of PEFT's, of which its layers get what PEFT gives them."""
    sizes = dict(num_layers=layers, token_dim=24, num_attention_heads=4)
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, **sizes)
    torch_model = peft.get_peft_model(copy.deepcopy(tiny.torch_model), config)
    with torch.no_grad():
        torch_model.prompt_encoder["default"].embedding.weight.normal_(0, 0.5)
    return torch_model.eval()


def prefix_logits(torch_model, pairs):
    """PEFT's masks of decoders leave no room for a prefix: without padding there."""
    tokens, decoder_tokens = map(torch.tensor, pairs)
    mask = torch.tensor(MASK.astype(int))
    with torch.no_grad():
        return torch_model(tokens, attention_mask=mask, decoder_input_ids=decoder_tokens).logits


@pytest.mark.parametrize("layers", [2, 3])  # the decoder's number, and the encoder's
def test_a_prefix_of_peft_gives_the_logits_of_peft_and_goes_back(t5, pairs, tmp_path, layers):
    tiny = t5("flan")
    torch_model = prefixed(tiny, layers)
    torch_model.save_pretrained(tmp_path / "theirs")
    tuned, adapter = jp.hf.load_adapter(tmp_path / "theirs", tiny.model)
    assert [path.split("/")[0] for path in adapter] == ["decoder"] * 2
    actual = jax.jit(tuned.apply)(adapter, tiny.params, *pairs, mask=MASK)
    check(np.asarray(actual), prefix_logits(torch_model, pairs).numpy(), 1e-4)
    jp.hf.save_adapter(tmp_path / "ours", tuned, adapter, model=tiny.model)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(tiny.torch_model), tmp_path / "ours")
    check(prefix_logits(again.eval(), pairs).numpy(), np.asarray(actual), 1e-4)


def test_a_prefix_that_peft_would_count_differently_is_refused(t5, pairs, tmp_path):
    tiny = t5("flan")
    where = "decoder/**/SelfAttention:{key,value}"
    for glob, shift, message in (
        (where, False, 'shift="queries"'),
        ("**/*Attention:{key,value}", "queries", "decoder's self-attentions alone"),
    ):
        tuned = jp.transform(tiny.model, jp.rules((glob, jp.prefix_tuning(3, shift=shift))))
        adapter = tuned.init(jax.random.key(0), tiny.params, *pairs)
        with pytest.raises(jp.hf.PeftFormatError, match=message):
            jp.hf.save_adapter(tmp_path, tuned, adapter, model=tiny.model)
