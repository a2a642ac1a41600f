"""A tiny random model with a byte-level tokenizer, to try things on without a download."""

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
