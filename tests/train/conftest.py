"""A tiny model with a dict adapter, and tiny tokenizers; nothing is downloaded."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jaxpeft import train

VOCABULARY = 11

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def apply(adapter, params, tokens, *, mask, dropout_key):
    """An embedding, a causal mean over what came before, a low-rank change, and a head."""
    hidden = params["embedding"][tokens] * mask[..., None]
    hidden = jnp.cumsum(hidden, axis=1) / jnp.cumsum(mask, axis=1)[..., None]
    hidden = hidden @ params["kernel"] + hidden @ adapter["proj"]["a"] @ adapter["proj"]["b"]
    if dropout_key is not None:
        keep = jax.random.bernoulli(dropout_key, 0.9, hidden.shape)
        hidden = jnp.where(keep & adapter["head"]["dropout"], hidden / 0.9, hidden)
    return hidden * adapter["head"]["scale"] @ params["embedding"].T


loss_fn = train.causal_lm_loss(apply)


def make_adapter(dropout=False):
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(8, 2)), 0.1 * rng.normal(size=(2, 8))
    return {
        "proj": {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)},
        "head": {"scale": jnp.ones(8), "dropout": jnp.array(dropout)},
    }


TRAINABLE = {"proj": {"a": True, "b": True}, "head": {"scale": True, "dropout": False}}


def make_params():
    rng = np.random.default_rng(0)
    embedding, kernel = rng.normal(size=(VOCABULARY, 8)), rng.normal(size=(8, 8))
    return {"embedding": jnp.asarray(embedding, "float32"), "kernel": jnp.asarray(kernel, "f4")}


def make_batches(batch_size=4, lengths=(24,)):
    rng = np.random.default_rng(2)
    examples = []
    for length in (3, 9, 5, 14, 20, 7, 4, 11, 6, 8):
        tokens = rng.integers(0, VOCABULARY, length)
        examples.append(train.Example(tokens, np.arange(length) >= length // 2))
    return train.Batches(examples, batch_size, seed=3, lengths=lengths)


@pytest.fixture(scope="session")
def tiny():
    optimizer = optax.adam(0.05)
    return SimpleNamespace(
        loss_fn=loss_fn,
        adapter=make_adapter,
        params=make_params(),
        batches=make_batches,
        trainable=TRAINABLE,
        optimizer=optimizer,
        step=train.make_step(loss_fn, optimizer, trainable=TRAINABLE),
    )


def _trained(pre_tokenizer, alphabet):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    corpus = ["the quick brown fox", "two and two is four", "user assistant system answer"] * 4
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def byte_level():
    tokenizer = _trained(
        pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace():
    letters = sorted(set(map(chr, range(33, 127))) | {"\n", "▁"})
    tokenizer = _trained(pre_tokenizers.Metaspace(prepend_scheme="first"), letters)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


@pytest.fixture(scope="session", params=[byte_level, metaspace], ids=lambda f: f.__name__)
def plain_tokenizer(request):
    return PreTrainedTokenizerFast(
        tokenizer_object=request.param(), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def with_chat(tokenizer):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session", params=[byte_level, metaspace], ids=lambda f: f.__name__)
def chat_tokenizer(request):
    return with_chat(request.param())


@pytest.fixture(scope="session")
def byte_chat_tokenizer():
    return with_chat(byte_level())
