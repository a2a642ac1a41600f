"""Prompts and prefixes in PEFT's files, both ways, held to `peft`'s own outputs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file

import jaxpeft as jp

# What `peft` says of `transformers`.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SIZES = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
             num_attention_heads=4)  # fmt: skip
TOKENS = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
CONFIGS = {
    "prompt": peft.PromptTuningConfig,
    "p-tuning": lambda **kw: peft.PromptEncoderConfig(encoder_hidden_size=8, **kw),
    "prefix": peft.PrefixTuningConfig,
    "projected prefix": lambda **kw: peft.PrefixTuningConfig(
        prefix_projection=True, encoder_hidden_size=8, **kw
    ),
}
TUNINGS = {
    "prompt": jp.prompt_tuning(3),
    "prefix": jp.prefix_tuning(3),
    "projected prefix": jp.prefix_tuning(3, hidden=5),
}


def torch_model(family):
    torch.manual_seed(0)
    if family == "llama":
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.BertConfig(**SIZES, max_position_embeddings=32, num_labels=3)
        model = transformers.BertForSequenceClassification(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model.eval()


@pytest.fixture(scope="module", params=["llama", "bert"])
def base(request, tmp_path_factory):
    family = request.param
    path = tmp_path_factory.mktemp(family)
    torch_model(family).save_pretrained(path)
    task = "CAUSAL_LM" if family == "llama" else "SEQ_CLS"
    return family, task, *jp.models.load(path)


def torch_logits(model, family):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(TOKENS), attention_mask=torch.tensor(MASK)).logits
    logits = logits.numpy()
    return logits[:, -TOKENS.shape[1] :][MASK.astype(bool)] if family == "llama" else logits


def our_logits(tuned, adapter, params, family):
    y = np.asarray(tuned.apply(adapter, params, jnp.asarray(TOKENS), mask=jnp.asarray(MASK) > 0))
    return y[MASK.astype(bool)] if family == "llama" else y


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_file_of_peft_gives_its_outputs_and_is_saved_as_it_was(kind, base, tmp_path):
    family, task, model, params = base
    tuned_torch = peft.get_peft_model(
        torch_model(family), CONFIGS[kind](task_type=task, num_virtual_tokens=3)
    ).eval()
    for parameter in tuned_torch.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
    tuned_torch.save_pretrained(tmp_path / "theirs")
    tuned, adapter = jp.hf.load_adapter(tmp_path / "theirs", model)
    expected = torch_logits(tuned_torch, family)
    np.testing.assert_allclose(our_logits(tuned, adapter, params, family), expected, atol=1e-5)

    jp.hf.save_adapter(tmp_path / "ours", tuned, adapter, model=model)
    theirs, ours = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")
    )
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)
    # PEFT cannot load its own file of a projected prefix as anything but a flat one.
    again = peft.PeftModel.from_pretrained(torch_model(family), tmp_path / "ours").eval()
    np.testing.assert_allclose(torch_logits(again, family), expected, atol=1e-5)


@pytest.mark.parametrize("kind", TUNINGS)
def test_peft_reads_what_is_tuned_here(kind, base, tmp_path):
    family, _, model, params = base
    shift = {"shift": True} if family == "bert" and "prefix" in kind else {}
    hidden = {"hidden": 5} if "projected" in kind else {}
    method = jp.prefix_tuning(3, **shift, **hidden) if "prefix" in kind else TUNINGS[kind]
    # PEFT trains the classifier of a classification model, and looks for it in the file.
    head = [jp.rules(("classifier/**", jp.full()))] if family == "bert" else []
    tuned = jp.transform(model, jp.chain(method, *head))
    adapter = tuned.init(jax.random.key(0), params, jnp.asarray(TOKENS))
    jp.hf.save_adapter(tmp_path, tuned, adapter, model=model)
    theirs = peft.PeftModel.from_pretrained(torch_model(family), tmp_path).eval()
    np.testing.assert_allclose(
        torch_logits(theirs, family), our_logits(tuned, adapter, params, family), atol=1e-5
    )


CAUSAL = {
    "adaption prompt": peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1),
    "cpt": peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[1, 2, 3, 4], cpt_mask=[1] * 4,
        cpt_tokens_type_mask=[1, 2, 3, 4], opt_projection_epsilon=3.0,
    ),
    "multitask": peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2, num_ranks=2
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CAUSAL)
def test_files_of_methods_for_causal_models(kind, tmp_path):
    torch_model("llama").save_pretrained(tmp_path / "base")
    model, params = jp.models.load(tmp_path / "base")
    theirs = peft.get_peft_model(torch_model("llama"), CAUSAL[kind]).eval()
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.5 if "gate" in name else 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    tuned, adapter = jp.hf.load_adapter(tmp_path / "theirs", model)
    tasks = {"task_ids": torch.tensor([1, 0])} if kind == "multitask" else {}
    given = {name: jnp.asarray(value.numpy()) for name, value in tasks.items()}
    ours = tuned.apply(adapter, params, jnp.asarray(TOKENS), mask=jnp.asarray(MASK) > 0, **given)

    def outputs(model):
        with torch.no_grad():
            mask = torch.tensor(MASK)
            logits = model(input_ids=torch.tensor(TOKENS), attention_mask=mask, **tasks).logits
        return logits[:, -TOKENS.shape[1] :].numpy()[MASK.astype(bool)]

    np.testing.assert_allclose(np.asarray(ours)[MASK.astype(bool)], outputs(theirs), atol=1e-5)
    jp.hf.save_adapter(tmp_path / "ours", tuned, adapter, model=model)
    one, other = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "ours"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(other[name], value)
    again = peft.PeftModel.from_pretrained(torch_model("llama"), tmp_path / "ours").eval()
    np.testing.assert_allclose(outputs(again), outputs(theirs), atol=1e-5)


def test_a_prefix_of_an_unrolled_model_nobody_here_wrote_keeps_its_layers(tmp_path):
    class Model(nnx.Module):
        def __init__(self):
            self.table = nnx.Embed(31, 8, rngs=nnx.Rngs(0))
            make = lambda i: nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(i))  # noqa: E731
            self.layers = nnx.List([make(1), make(2)])

        def __call__(self, tokens):
            x = self.table(tokens)
            for layer in self.layers:
                x = x + layer(x)
            return x

    model = Model()
    params = nnx.state(model)
    tuned = jp.transform(model, jp.prefix_tuning(3, place="front"))
    adapter = tuned.init(jax.random.key(0), params, jnp.asarray(TOKENS))
    jp.hf.save_adapter(tmp_path, tuned, adapter)
    rows = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    second = adapter["layers/1:value"]["prefix"]
    np.testing.assert_array_equal(rows.reshape(3, 2, 2, 2, 4)[:, 1, 1], second)
    again, loaded = jp.hf.load_adapter(tmp_path, model, sites=adapter.sites)
    np.testing.assert_array_equal(
        again.apply(loaded, params, jnp.asarray(TOKENS)),
        tuned.apply(adapter, params, jnp.asarray(TOKENS)),
    )


def test_what_peft_cannot_hold_is_refused(base, tmp_path):
    family, _, model, params = base
    tuned = jp.transform(model, jp.chain(jp.prompt_tuning(2), jp.lora(2)))
    adapter = tuned.init(jax.random.key(0), params, jnp.asarray(TOKENS))
    with pytest.raises(ValueError, match="PROMPT_TUNING stands alone"):
        jp.hf.save_adapter(tmp_path, tuned, adapter, model=model)


def test_a_file_that_does_not_fit_is_refused(base, tmp_path):
    family, _, model, params = base
    tuned = jp.transform(model, jp.prompt_tuning(3))
    adapter = tuned.init(jax.random.key(0), params, jnp.asarray(TOKENS))
    jp.hf.save_adapter(tmp_path, tuned, adapter, model=model)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_virtual_tokens": 4}))
    with pytest.raises(ValueError, match=r"has shape \(3, 16\), expected \(4, 16\)"):
        jp.hf.load_adapter(tmp_path, model)
