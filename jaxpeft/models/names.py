"""The names of a model's weights: here, in Hugging Face files, and a decoder's in GGUF files."""

from typing import NamedTuple

import numpy as np

from jaxpeft.models.config import DecoderConfig

# Our kernels are (in, out), Hugging Face's (out, in); a convolution's are (height, width, in, out)
# here and (out, in, height, width) there.
LINEAR = (1, 0)
CONVOLUTION = (2, 3, 1, 0)


class Name(NamedTuple):
    """One weight, here and in files.

    Attributes:
        path: the key path in the params tree.
        tensor: the Hugging Face name, with `{layer}` where the weight is stacked on its axis 0. A
            stack is as deep as the weight: the layers of an encoder and a decoder may differ.
        gguf: the name in llama.cpp's files, where it has one.
        axes: `ours = theirs.transpose(axes)` for one layer; empty where they are equal.
        head: whether it belongs to a task, so that it starts afresh where a checkpoint lacks it.
    """

    path: str
    tensor: str
    gguf: str = ""
    axes: tuple[int, ...] = ()
    head: bool = False

    @property
    def stacked(self) -> bool:
        """Whether each layer has its own tensor."""
        return "{layer}" in self.tensor

    def tensors(self, shape: tuple[int, ...]) -> list[str]:
        """The Hugging Face tensors that make up the weight of this shape, in layer order."""
        layers = range(shape[0] if self.stacked else 1)
        return [self.tensor.replace("{layer}", str(layer)) for layer in layers]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of each Hugging Face tensor, when the weight here has shape `shape`."""
        one = shape[1:] if self.stacked else shape
        return tuple(one[axis] for axis in np.argsort(self.axes)) if self.axes else one

    def roles(self, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Which axes of the weight here are stack, input and output, of a matrix (out, in) there.

        Example:
            >>> Name("layers/up/kernel", "layers.{layer}.up.weight", axes=LINEAR).roles(3)
            ((0,), (1,), (2,))
        """
        stack = (0,) if self.stacked else ()
        first, second = (ndim - 2,), (ndim - 1,)
        return (stack, first, second) if self.axes == LINEAR else (stack, second, first)

    def from_hf(self, value: np.ndarray) -> np.ndarray:
        """A layer's weight as it is here."""
        return value.transpose(self.axes) if self.axes else value

    def to_hf(self, value: np.ndarray) -> np.ndarray:
        """A layer's weight as it is in Hugging Face's files; the inverse of `from_hf`."""
        return value.transpose(np.argsort(self.axes)) if self.axes else value


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
    axes = LINEAR if leaf == "kernel" else ()
    return Name(f"layers/{path}/{leaf}", tensor, f"blk.{{layer}}.{gguf}.{kind}", axes)


TABLE: tuple[Name, ...] = (
    Name("embed_tokens/embedding", "model.embed_tokens.weight", "token_embd.weight"),
    *(_layer(path, gguf, "kernel", "weight") for path, gguf in _PROJECTIONS.items()),
    *(_layer(path, gguf, "bias", "bias") for path, gguf in _PROJECTIONS.items()),
    *(_layer(path, gguf, "scale", "weight") for path, gguf in _NORMS.items()),
    Name("norm/scale", "model.norm.weight", "output_norm.weight"),
    Name("lm_head/kernel", "lm_head.weight", "output.weight", LINEAR),
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
