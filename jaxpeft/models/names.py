"""The names of a decoder's weights: here, in Hugging Face files, and in GGUF files."""

from typing import NamedTuple

from jaxpeft.models.config import DecoderConfig


class Name(NamedTuple):
    """One row of the table.

    `path` is the key path in the params tree, `tensor` the Hugging Face name and `gguf` that of
    llama.cpp, both with `{layer}` where the weight is stacked over layers on its axis 0.
    `transposed` says that the Hugging Face matrix is `(out, in)` while ours is `(in, out)`.
    """

    path: str
    tensor: str
    gguf: str
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        """Whether each layer has its own tensor."""
        return "{layer}" in self.tensor


_PROJECTIONS = {
    "self_attn/q_proj": "attn_q",
    "self_attn/k_proj": "attn_k",
    "self_attn/v_proj": "attn_v",
    "self_attn/o_proj": "attn_output",
    "mlp/gate_proj": "ffn_gate",
    "mlp/up_proj": "ffn_up",
    "mlp/down_proj": "ffn_down",
}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def _layer(path: str, gguf: str, leaf: str, kind: str) -> Name:
    tensor = f"model.layers.{{layer}}.{path.replace('/', '.')}.{kind}"
    return Name(f"layers/{path}/{leaf}", tensor, f"blk.{{layer}}.{gguf}.{kind}", leaf == "kernel")


TABLE: tuple[Name, ...] = (
    Name("embed_tokens/embedding", "model.embed_tokens.weight", "token_embd.weight"),
    *(_layer(path, gguf, "kernel", "weight") for path, gguf in _PROJECTIONS.items()),
    *(_layer(path, gguf, "bias", "bias") for path, gguf in _PROJECTIONS.items()),
    *(_layer(path, gguf, "scale", "weight") for path, gguf in _NORMS.items()),
    Name("norm/scale", "model.norm.weight", "output_norm.weight"),
    Name("lm_head/kernel", "lm_head.weight", "output.weight", transposed=True),
)


def names(config: DecoderConfig) -> tuple[Name, ...]:
    """The rows of the table that a model with this configuration has.

    Args:
        config: the decoder's configuration; its biases and tied head decide.

    Returns:
        Rows in the order of the files.

    Example:
        >>> from jaxpeft.models.config import from_hf
        >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=8, num_hidden_layers=1,
        ...              num_attention_heads=2)
        >>> names(from_hf({"model_type": "llama", **sizes}))[1].tensor
        'model.layers.{layer}.self_attn.q_proj.weight'
    """
    absent = set()
    if not config.qkv_bias:
        absent |= {f"layers/self_attn/{p}_proj/bias" for p in "qkv"}
    if not config.o_bias:
        absent |= {"layers/self_attn/o_proj/bias"}
    if not config.mlp_bias:
        absent |= {f"layers/mlp/{p}_proj/bias" for p in ("gate", "up", "down")}
    if config.tie_word_embeddings:
        absent |= {"lm_head/kernel"}
    return tuple(name for name in TABLE if name.path not in absent)
