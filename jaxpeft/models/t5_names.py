"""The names of a T5's weights: here and in Hugging Face files."""

from collections.abc import Iterator

from jaxpeft.models.names import LINEAR, Name
from jaxpeft.models.t5_config import T5Config

_ATTENTION = ("q", "k", "v", "o")
_FEED_FORWARD = ("wi", "wi_0", "wi_1", "wo")
_SUBLAYERS = {
    "encoder": {"SelfAttention": _ATTENTION, "DenseReluDense": _FEED_FORWARD},
    "decoder": {
        "SelfAttention": _ATTENTION,
        "EncDecAttention": _ATTENTION,
        "DenseReluDense": _FEED_FORWARD,
    },
}


def _stack(stack: str) -> Iterator[Name]:
    for i, (sublayer, matrices) in enumerate(_SUBLAYERS[stack].items()):
        path, tensor = f"{stack}/block/layer/{i}", f"{stack}.block.{{layer}}.layer.{i}"
        for matrix in matrices:
            here, there = f"{path}/{sublayer}/{matrix}", f"{tensor}.{sublayer}.{matrix}"
            yield Name(f"{here}/kernel", f"{there}.weight", axes=LINEAR)
        yield Name(f"{path}/layer_norm/scale", f"{tensor}.layer_norm.weight")
    # Hugging Face keeps the table of a stack in its first layer.
    table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    yield Name(f"{stack}/relative_attention_bias/embedding", table)
    yield Name(f"{stack}/final_layer_norm/scale", f"{stack}.final_layer_norm.weight")


TABLE: tuple[Name, ...] = (
    Name("shared/embedding", "shared.weight"),
    *_stack("encoder"),
    *_stack("decoder"),
    Name("lm_head/kernel", "lm_head.weight", axes=LINEAR),
)

# What files may hold beside these: the embedding again, as the head or under its names in the
# stacks, and a table for the distances between decoder and encoder that no version reads.
SPARE = (
    r"lm_head\.weight$",
    r"(en|de)coder\.embed_tokens\.weight$",
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",
)


def names(config: T5Config) -> tuple[Name, ...]:
    """The rows of the table that a model with this configuration has.

    Args:
        config: the model's configuration; its feed-forward sublayer and its head decide.

    Returns:
        Rows in the order of the files.

    Example:
        >>> from jaxpeft.models.t5_config import from_hf
        >>> sizes = dict(vocab_size=8, d_model=4, d_kv=2, d_ff=8, num_layers=1, num_heads=2)
        >>> names(from_hf({"model_type": "t5", **sizes}))[1].tensor
        'encoder.block.{layer}.layer.0.SelfAttention.q.weight'
    """
    absent = {"wi"} if config.gated else {"wi_0", "wi_1"}
    absent |= {"lm_head"} if config.tie_word_embeddings else set()
    return tuple(name for name in TABLE if name.path.split("/")[-2] not in absent)
