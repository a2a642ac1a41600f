"""Tiny random models with tokenizers, to try things on without a download."""

from pathlib import Path

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_tiny_model(directory: Path, corpus: list[str], vocab_size: int = 512) -> Path:
    """Writes a two-layer Llama with random weights, and a tokenizer trained on a few sentences.

    Args:
        directory: the Hugging Face directory to make.
        corpus: what the tokenizer learns its merges from.
        vocab_size: at most that many tokens.

    Returns:
        `directory`.
    """
    from flax import nnx

    from jaxpeft import models

    tokenizer = _tokenizer([*corpus, "system user assistant"], vocab_size)
    config = models.DecoderConfig(
        model_type="llama",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.1,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        eos_token_id=(tokenizer.eos_token_id,),
    )
    model = models.Decoder(config, rngs=nnx.Rngs(0))
    models.save(directory, model, nnx.state(model))
    tokenizer.save_pretrained(directory)
    return directory


def write_tiny_encoder(directory: Path, corpus: list[str]) -> Path:
    """Writes a two-layer BERT with random weights, and a tokenizer of the words of a few sentences.

    Args:
        directory: the Hugging Face directory to make.
        corpus: sentences; their words, split at spaces, are the vocabulary.

    Returns:
        `directory`.
    """
    from flax import nnx

    from jaxpeft import models
    from jaxpeft.models.bert import Bert
    from jaxpeft.models.bert_config import BertConfig

    tokenizer = _words(corpus, "[CLS] $A [SEP]", pad="[PAD]", unk="[UNK]", cls="[CLS]", sep="[SEP]")
    config = BertConfig(
        model_type="bert",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    model = Bert(config, rngs=nnx.Rngs(0))
    models.save(directory, model, nnx.state(model))
    tokenizer.save_pretrained(directory)
    return directory


def write_tiny_seq2seq(directory: Path, corpus: list[str]) -> Path:
    """Writes a two-layer T5 with random weights, and a tokenizer of the words of a few sentences.

    Args:
        directory: the Hugging Face directory to make.
        corpus: sentences; their words, split at spaces, are the vocabulary.

    Returns:
        `directory`.
    """
    from flax import nnx

    from jaxpeft import models
    from jaxpeft.models.t5 import T5
    from jaxpeft.models.t5_config import T5Config

    tokenizer = _words(corpus, "$A </s>", pad="<pad>", eos="</s>", unk="<unk>")
    config = T5Config(
        model_type="t5",
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
    )
    model = T5(config, rngs=nnx.Rngs(0))
    models.save(directory, model, nnx.state(model))
    tokenizer.save_pretrained(directory)
    return directory


def _words(corpus: list[str], form: str, **special: str):
    """A tokenizer of words; special tokens come first, in order, and `form` says where they go."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = [*special.values(), *sorted({word for text in corpus for word in text.split()})]
    numbers = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(WordLevel(numbers, unk_token=special["unk"]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    used = [(word, numbers[word]) for word in special.values() if word in form]
    backend.post_processor = processors.TemplateProcessing(single=form, special_tokens=used)
    names = {f"{name}_token": word for name, word in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _tokenizer(corpus: list[str], vocab_size: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer
