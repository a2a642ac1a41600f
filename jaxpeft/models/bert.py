"""BERT, MiniLM, RoBERTa, XLM-RoBERTa and DistilBERT encoders in Flax NNX.

    h = LayerNorm(words + positions + types)
    h = LayerNorm(h + Attention(h)),   h = LayerNorm(h + W_2 act(W_1 h))

All of them have the tree of BERT's module names. The weights of all layers are stacked on axis 0
and one `jax.lax.scan` runs them. Letters in shapes: B texts, T tokens, D model, N heads, L layers,
C classes.

References: Devlin et al. 2018 (arXiv 1810.04805), Liu et al. 2019 (1907.11692), Sanh et al. 2019
(1910.01108), Conneau et al. 2019 (1911.02116), Wang et al. 2020 (2002.10957).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jaxpeft.flax.mark import Point
from jaxpeft.models.bert_config import BertConfig
from jaxpeft.models.bert_names import names
from jaxpeft.models.decoder import KEEP_PROJECTIONS, Embedding, Linear, Policy
from jaxpeft.models.heads import head_modules, make_heads, run_heads
from jaxpeft.models.layers import ACTIVATIONS, LayerNorm
from jaxpeft.models.masks import over_keys
from jaxpeft.models.model import Model
from jaxpeft.models.names import Name


class Embeddings(nnx.Module):
    """`LayerNorm(word_embeddings[tokens] + position_embeddings[positions] + types)`."""

    def __init__(self, config: BertConfig, **kw: Any):
        width = config.hidden_size
        self.word_embeddings = Embedding((config.vocab_size, width), **kw)
        self.position_embeddings = Embedding((config.max_position_embeddings, width), **kw)
        if config.type_vocab_size:
            self.token_type_embeddings = Embedding((config.type_vocab_size, width), **kw)
        self.LayerNorm = LayerNorm((width,), eps=config.layer_norm_eps, dtype=kw["dtype"])

    def __call__(self, tokens: Array, positions: Array, token_types: Array | None) -> Array:
        x = self.word_embeddings(tokens)
        if hasattr(self, "token_type_embeddings"):
            token_types = jnp.zeros_like(tokens) if token_types is None else token_types
            x = x + self.token_type_embeddings(token_types)
        return self.LayerNorm(x + self.position_embeddings(positions))


class Projections(nnx.Module):
    """The maps to queries, keys and values, under the name that Hugging Face gives them."""

    def __init__(self, config: BertConfig, **kw: Any):
        shape = (config.num_hidden_layers, config.hidden_size, config.hidden_size)
        self.query = Linear(shape, bias=True, **kw)
        self.key = Linear(shape, bias=True, **kw)
        self.value = Linear(shape, bias=True, **kw)


class Output(nnx.Module):
    """`y = LayerNorm(stream + delta)`, `delta = W x` a sublayer's last projection."""

    def __init__(self, config: BertConfig, width: int, **kw: Any):
        layers, out = config.num_hidden_layers, config.hidden_size
        self.dense = Linear((layers, width, out), bias=True, **kw)
        self.LayerNorm = LayerNorm((layers, out), eps=config.layer_norm_eps, dtype=kw["dtype"])

    def __call__(self, x: Array, stream: Array, *, delta: Point) -> Array:
        y = self.dense(x)
        y = delta(
            y,
            stream=stream,
            sum=lambda: stream + y,
            norm=lambda: self.LayerNorm.normalize(stream + y),
        )
        return self.LayerNorm(stream + y)


class Attention(nnx.Module):
    """Multi-head attention of every token to every token that is no padding."""

    def __init__(self, config: BertConfig, **kw: Any):
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.self = Projections(config, **kw)
        self.output = Output(config, config.hidden_size, **kw)
        self.query, self.key, self.value = Point(), Point(), Point()
        self.context = Point()
        self.delta = Point()

    def __call__(self, x: Array, visible: Array | None) -> Array:
        heads = (*x.shape[:-1], -1, self.head_dim)
        q = self.query(self.self.query(x).reshape(heads))
        k = self.key(self.self.key(x).reshape(heads))
        v = self.value(self.self.value(x).reshape(heads))
        y = jax.nn.dot_product_attention(q, k, v, mask=over_keys(visible, k))
        y = self.context(y, query=q)
        return self.output(y.reshape(x.shape), x, delta=self.delta)


class Intermediate(nnx.Module):
    """`y = act(W_1 x)`."""

    def __init__(self, config: BertConfig, **kw: Any):
        shape = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
        self.activation = config.hidden_act
        self.dense = Linear(shape, bias=True, **kw)

    def __call__(self, x: Array) -> Array:
        return ACTIVATIONS[self.activation](self.dense(x))


class MLPOutput(Output):
    """`y = LayerNorm(stream + W_2 x)`."""

    def __init__(self, config: BertConfig, **kw: Any):
        super().__init__(config, config.intermediate_size, **kw)
        self.delta = Point()

    def __call__(self, x: Array, stream: Array) -> Array:  # type: ignore[override]
        return super().__call__(x, stream, delta=self.delta)


class Block(nnx.Module):
    """One layer; as an attribute of `Encoder` its weights hold all layers, stacked on axis 0."""

    def __init__(self, config: BertConfig, **kw: Any):
        self.attention = Attention(config, **kw)
        self.intermediate = Intermediate(config, **kw)
        self.output = MLPOutput(config, **kw)

    def __call__(self, x: Array, visible: Array | None) -> Array:
        x = self.attention(x, visible)
        return self.output(self.intermediate(x), x)


class Encoder(nnx.Module):
    """All layers, `[B, T, D]` to `[B, T, D]`."""

    def __init__(self, config: BertConfig, remat: Policy | None, **kw: Any):
        self.remat = remat
        self.layer = Block(config, **kw)

    def __call__(self, x: Array, visible: Array | None) -> Array:
        def step(x: Array, block: Block) -> tuple[Array, None]:
            return block(x, visible), None

        if self.remat is not None:
            # A scan's body is compiled apart from its backward pass: nothing to keep separate.
            step = jax.checkpoint(step, policy=self.remat, prevent_cse=False)
        return jax.lax.scan(step, x, self.layer)[0]


class Bert(Model):
    """An encoder: BERT, MiniLM, RoBERTa, XLM-RoBERTa or DistilBERT, with the head of its task.

    Args:
        config: shapes and constants; its `task` decides what a call returns.
        dtype: of the weights and of the activations.
        remat: which activations of a layer the backward pass finds kept, as in `Decoder`.
        rngs: source of the random initial weights.

    Example:
        >>> from jaxpeft.models.bert_config import from_hf
        >>> config = from_hf(dict(model_type="bert", vocab_size=8, hidden_size=4,
        ...     intermediate_size=8, num_hidden_layers=2, num_attention_heads=2),
        ...     task="sequence-classification", labels=["no", "perhaps", "yes"])
        >>> model = Bert(config, rngs=nnx.Rngs(0))
        >>> model(jnp.array([[1, 2, 3]])).shape
        (1, 3)
    """

    keys_take_prefix = True

    def __init__(
        self,
        config: BertConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: Policy | None = KEEP_PROJECTIONS,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = dict(stddev=config.initializer_range, dtype=dtype, rngs=rngs)
        self.config = config
        self.embeddings = Embeddings(config, **kw)
        self.encoder = Encoder(config, remat, **kw)
        for name, module in make_heads(config, **kw).items():
            setattr(self, name, module)

    def __call__(
        self,
        tokens: Array,
        *,
        mask: Array | None = None,
        token_types: Array | None = None,
        positions: Array | None = None,
        position_offset: int = 0,
    ) -> Array:
        """What the task asks for, or the last hidden states.

        Args:
            tokens: `int32[B, T]`.
            mask: `bool[B, T]`, False at padding, on whichever side.
            token_types: `int32[B, T]`, which of two texts a token is in; zeros when absent. Not
                for DistilBERT, which does not tell them apart.
            positions: `int32[B, T]`. When absent they count slots from 0; RoBERTa's count the
                tokens that are not `config.pad_token_id`, from `config.pad_token_id + 1`.
            position_offset: added to all positions: a prefix takes the first ones in `peft`.

        Returns:
            For `config.task` None, `[B, T, D]` in the weights' dtype; "sequence-classification" and
            "regression", `float32[B, C]`; "token-classification", `float32[B, T, C]`;
            "question-answering", `float32[B, T, 2]`, logits of the start and of the end;
            "embedding", `float32[B, D]` of length 1.

        Raises:
            ValueError: a text is longer than the table of positions, or DistilBERT gets types.
        """
        mask = None if mask is None else mask.astype(bool)
        if positions is None:
            positions = _positions(self.config, tokens)
        if token_types is not None and not self.config.type_vocab_size:
            raise ValueError(f"token_types are none of {self.config.model_type!r}. Leave them out.")
        x = self.embeddings(tokens, positions + position_offset, token_types)
        visible = None if mask is None else mask[:, None, None, :]
        x = self.encoder(x, visible)
        return run_heads(self, self.config, x, mask)

    @property
    def output_head(self) -> str | None:
        """The path of the map to logits, which a bare method leaves alone."""
        modules = head_modules(self.config)
        return f"{modules[-1]}/kernel" if modules else None

    def names(self) -> tuple[Name, ...]:
        """The weights' names in Hugging Face's files."""
        return names(self.config)

    def example(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Abstract tokens of a small call."""
        return (jax.ShapeDtypeStruct((2, 3), jnp.int32),)


def _positions(config: BertConfig, tokens: Array) -> Array:
    room = config.max_position_embeddings - config.first_position
    if tokens.shape[1] > room:
        raise ValueError(
            f"tokens have length {tokens.shape[1]}, but this {config.model_type!r} model has "
            f"{room} positions. Truncate: tokens[:, :{room}]."
        )
    if not config.counts_tokens:
        return jnp.arange(tokens.shape[1])[None]
    real = (tokens != config.pad_token_id).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real + config.pad_token_id
