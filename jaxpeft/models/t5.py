"""T5 in Flax NNX: T5 1.0 and 1.1, Flan-T5, mT5.

    x = x + Attention(RMSNorm(x)),   x = x + CrossAttention(RMSNorm(x), encoded),
    x = x + W_o f(RMSNorm(x)),       f(n) = act(W_i n)  or  act(W_i0 n) * (W_i1 n)

Attention adds a learned bias for the distance between query and key, one table for all layers of a
stack, and does not divide by the square root of the head width. The layers of each stack are
stacked on axis 0 and one `jax.lax.scan` runs them. Letters in shapes: B batch, T decoder tokens, S
encoder tokens, L layers, D model, N heads, H head width, F hidden width, V vocabulary.

References: Raffel et al. 2020 (arXiv 1910.10683), Shazeer 2020 (2002.05202), Xue et al. 2021
(2010.11934), Chung et al. 2022 (2210.11416).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jaxpeft.flax.mark import Point
from jaxpeft.models.decoder import KEEP_PROJECTIONS, Embedding, Linear, Policy, RMSNorm
from jaxpeft.models.layers import ACTIVATIONS
from jaxpeft.models.masks import over_keys
from jaxpeft.models.model import Model
from jaxpeft.models.names import Name
from jaxpeft.models.t5_config import T5Config
from jaxpeft.models.t5_names import names
from jaxpeft.models.t5_positions import distance_buckets

Cache = dict[str, Array]
Heads = tuple[Array, Array]
Read = Callable[["Attention", Array], Heads]


class Attention(nnx.Module):
    """`softmax(q k^T + bias) v`, of queries from here and of keys and values that `read` gives."""

    def __init__(self, config: T5Config, layers: int, **kw: Any):
        width, heads = config.d_model, config.num_heads * config.d_kv
        shape, stddev = (layers, width, heads), width**-0.5 * config.initializer_factor
        self.q = Linear(shape, bias=False, stddev=stddev * config.d_kv**-0.5, **kw)
        self.k = Linear(shape, bias=False, stddev=stddev, **kw)
        self.v = Linear(shape, bias=False, stddev=stddev, **kw)
        stddev = heads**-0.5 * config.initializer_factor
        self.o = Linear((layers, heads, width), bias=False, stddev=stddev, **kw)
        self.query, self.key, self.value, self.context = Point(), Point(), Point(), Point()
        self.head_dim = config.d_kv

    def project(self, x: Array) -> Heads:
        """Keys and values `[B, S, N, H]` of `x[B, S, D]`."""
        return self._heads(self.k(x)), self._heads(self.v(x))

    def __call__(self, x: Array, read: Read, bias: Array | None, visible: Array) -> Array:
        q = self.query(self._heads(self.q(x)))
        k, v = read(self, x)
        k, v = self.key(k), self.value(v)
        if bias is not None:  # made for the keys of a prefix too, if that has positions
            bias = over_keys(bias[..., : k.shape[1]], k)
        mask = over_keys(visible, k)
        y = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=1.0)
        y = self.context(y, query=q)
        return self.o(y.reshape(*x.shape[:-1], -1))

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], -1, self.head_dim)


class FeedForward(nnx.Module):
    """`W_o act(W_i x)`, or `W_o (act(W_i0 x) * W_i1 x)` where it is gated."""

    def __init__(self, config: T5Config, layers: int, **kw: Any):
        width, hidden = config.d_model, config.d_ff
        stddev = width**-0.5 * config.initializer_factor
        if config.gated:
            self.wi_0 = Linear((layers, width, hidden), bias=False, stddev=stddev, **kw)
            self.wi_1 = Linear((layers, width, hidden), bias=False, stddev=stddev, **kw)
        else:
            self.wi = Linear((layers, width, hidden), bias=False, stddev=stddev, **kw)
        stddev = hidden**-0.5 * config.initializer_factor
        self.wo = Linear((layers, hidden, width), bias=False, stddev=stddev, **kw)
        self.gated, self.activation = config.gated, config.activation

    def __call__(self, x: Array) -> Array:
        act = ACTIVATIONS[self.activation]
        return self.wo(act(self.wi_0(x)) * self.wi_1(x) if self.gated else act(self.wi(x)))


class Sublayer(nnx.Module):
    """`x + f(RMSNorm(x))`, where `f` is the module that it holds under its Hugging Face name."""

    def __init__(self, name: str, inner: nnx.Module, config: T5Config, layers: int, dtype: Any):
        setattr(self, name, inner)
        self.layer_norm = RMSNorm(
            (layers, config.d_model), eps=config.layer_norm_epsilon, dtype=dtype
        )
        self.delta = Point()
        self.inner = name

    def __call__(self, x: Array, *inputs: Any) -> Array:
        h = getattr(self, self.inner)(self.layer_norm(x), *inputs)
        return x + self.delta(h, stream=x, sum=lambda: x + h)


class Block(nnx.Module):
    """One layer; as an attribute of `Stack` its weights hold all layers, stacked on axis 0."""

    def __init__(self, config: T5Config, layers: int, *, crossed: bool, **kw: Any):
        names = ["SelfAttention", "EncDecAttention"] if crossed else ["SelfAttention"]
        inner: list[tuple[str, nnx.Module]]
        inner = [(name, Attention(config, layers, **kw)) for name in names]
        inner += [("DenseReluDense", FeedForward(config, layers, **kw))]
        dtype = kw["dtype"]
        self.layer = nnx.List(
            [Sublayer(name, module, config, layers, dtype) for name, module in inner]
        )

    def __call__(self, x: Array, *attentions: tuple[Any, ...]) -> Array:
        for sublayer, inputs in zip(self.layer, (*attentions, ()), strict=True):
            x = sublayer(x, *inputs)
        return x


class Stack(nnx.Module):
    """The layers of the encoder or of the decoder, and the table of their position biases."""

    def __init__(self, config: T5Config, layers: int, *, crossed: bool, **kw: Any):
        buckets = config.relative_attention_num_buckets
        stddev = config.d_model**-0.5 * config.initializer_factor
        self.block = Block(config, layers, crossed=crossed, **kw)
        self.relative_attention_bias = Embedding((buckets, config.num_heads), stddev=stddev, **kw)
        self.final_layer_norm = RMSNorm(
            (config.d_model,), eps=config.layer_norm_epsilon, dtype=kw["dtype"]
        )
        one_sided = buckets if crossed else buckets // 2
        self.one_sided, self.crossed = one_sided, crossed
        self.max_distance = config.relative_attention_max_distance

    def bias(self, queries: Array, keys: int) -> Array:
        """`[1, N, T, S]` for query slots `[T]` and the first keys; the decoder looks back only."""
        behind = queries[:, None] - jnp.arange(keys)[None, :]
        distance = jnp.maximum(behind, 0) if self.crossed else jnp.abs(behind)
        table = jnp.asarray(distance_buckets(self.one_sided, self.max_distance))
        bucket = table[jnp.minimum(distance, self.max_distance)]
        if not self.crossed:
            bucket = bucket + jnp.where(behind < 0, self.one_sided, 0)
        return self.relative_attention_bias(bucket).transpose(2, 0, 1)[None]


class T5(Model):
    """An encoder-decoder language model.

    Args:
        config: shapes and constants.
        dtype: of the weights and of the activations.
        remat: which activations of a layer the backward pass finds kept; see `Decoder`.
        rngs: source of the random initial weights.

    Example:
        >>> from jaxpeft.models.t5_config import from_hf
        >>> config = from_hf(dict(model_type="t5", vocab_size=8, d_model=4, d_kv=2, d_ff=8,
        ...     num_layers=2, num_heads=2))
        >>> model = T5(config, rngs=nnx.Rngs(0))
        >>> model(jnp.array([[1, 2, 3]]), jnp.array([[0, 4]])).shape
        (1, 2, 8)
    """

    keys_take_prefix = True

    def __init__(
        self,
        config: T5Config,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: Policy | None = KEEP_PROJECTIONS,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        table, stddev = (config.vocab_size, config.d_model), config.initializer_factor
        self.config = config
        self.remat = remat
        self.shared = Embedding(table, stddev=stddev, **kw)
        self.encoder = Stack(config, config.num_layers, crossed=False, **kw)
        self.decoder = Stack(config, config.num_decoder_layers, crossed=True, **kw)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(table[::-1], bias=False, stddev=stddev, **kw)

    @property
    def output_head(self) -> str | None:
        """Where the weights of the head are, which a bare method leaves alone."""
        return None if self.config.tie_word_embeddings else "lm_head/kernel"

    def names(self) -> tuple[Name, ...]:
        """One row for each weight, in the order of the files."""
        return names(self.config)

    def example(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Abstract inputs of a small call that uses every weight."""
        return tuple(jax.ShapeDtypeStruct((2, length), jnp.int32) for length in (3, 2))

    def __call__(
        self,
        tokens: Array | None,
        decoder_tokens: Array,
        *,
        mask: Array | None = None,
        decoder_mask: Array | None = None,
        cache: Cache | None = None,
        encoded: Array | None = None,
        position_offset: int = 0,
        query_offset: int = 0,
    ) -> Array | tuple[Array, Cache]:
        """Next-token logits of the decoder.

        Args:
            tokens: `int32[B, S]`, what to read. None where `encoded` or the cache stands for it.
            decoder_tokens: `int32[B, T]`, what has been written, `decoder_start_token_id` first.
            mask: `bool[B, S]`, False at padding of `tokens`, on whichever side.
            decoder_mask: `bool[B, T]`, False at padding of `decoder_tokens`.
            cache: from `init_cache` or an earlier call; the T tokens follow what it holds. The
                first call puts the keys and values of the encoder's output in, and later ones
                look at neither `tokens` nor `mask` nor `encoded`.
            encoded: `encode(tokens, mask=mask)`, where it is known already.
            position_offset: length of a prefix that takes the first positions among the keys of
                self-attentions. The other keys move on, but queries do not: so AdapterHub's library
                counts. At 0 a prefix has no position, and its bias is 0.
            query_offset: by how much the decoder's queries move on, as behind past keys.

        Returns:
            `float32[B, T, V]`; with a cache, `(logits, cache)`. Logits at padding are meaningless.
        """
        y, slots = self.shared(decoder_tokens), jnp.arange(decoder_tokens.shape[1])
        decoder_mask = _mask(decoder_mask, decoder_tokens)
        if cache is None:
            encoded, mask = self._reading(tokens, mask, encoded, position_offset)
            visible = _causal(slots, slots, decoder_mask)
            bias = self.decoder.bias(query_offset + slots, position_offset + len(slots))
            return self._logits(self._decode(y, bias, visible, encoded, mask))
        if "cross_mask" not in cache:
            encoded, mask = self._reading(tokens, mask, encoded, position_offset)
            cache = cache | {"cross_mask": mask}
        start = cache["index"]
        cache = cache | {
            "mask": jax.lax.dynamic_update_slice(cache["mask"], decoder_mask, (0, start)),
            "index": start + len(slots),
        }
        queries, keys = start + slots, cache["mask"].shape[1]
        visible = _causal(queries, jnp.arange(keys), cache["mask"])
        bias = self.decoder.bias(query_offset + queries, position_offset + keys)
        y, cache = self._decode_cached(y, bias, visible, encoded, cache, start)
        return self._logits(y), cache

    def encode(
        self, tokens: Array, *, mask: Array | None = None, position_offset: int = 0
    ) -> Array:
        """The encoder's output.

        Args:
            tokens: `int32[B, S]`.
            mask: `bool[B, S]`, False at padding, on whichever side.
            position_offset: as for the call.

        Returns:
            `[B, S, D]` in the dtype of the weights, meaningless at padding.
        """
        slots = jnp.arange(tokens.shape[1])
        visible = _mask(mask, tokens)[:, None, None]
        bias = self.encoder.bias(slots, position_offset + len(slots))

        def step(x: Array, block: Block) -> tuple[Array, None]:
            return block(x, (Attention.project, bias, visible)), None

        x = jax.lax.scan(self._checkpoint(step), self.shared(tokens), self.encoder.block)[0]
        return self.encoder.final_layer_norm(x)

    def init_cache(self, batch: int, length: int, dtype: DTypeLike | None = None) -> Cache:
        """An empty key-value cache for the decoder.

        Args:
            batch: number of sequences.
            length: slots for all decoder tokens together, the start token and padding included.
            dtype: of the keys and values; the weights' dtype when absent.

        Returns:
            A dict of arrays: `k`, `v` `[L, B, length, N, H]`, `mask` `[B, length]`, `index` (next
            slot). The first call adds `cross_k`, `cross_v` `[L, B, S, N, H]` and `cross_mask`
            `[B, S]`.
        """
        config = self.config
        dtype = self.shared.embedding.dtype if dtype is None else dtype
        shape = (config.num_decoder_layers, batch, length, config.num_heads, config.d_kv)
        return {
            "k": jnp.zeros(shape, dtype),
            "v": jnp.zeros(shape, dtype),
            "mask": jnp.zeros((batch, length), bool),
            "index": jnp.zeros((), jnp.int32),
        }

    def _reading(
        self, tokens: Array | None, mask: Array | None, encoded: Array | None, position_offset: int
    ) -> tuple[Array, Array]:
        """The encoder's output and which of it is no padding."""
        if encoded is None and tokens is not None:
            encoded = self.encode(tokens, mask=mask, position_offset=position_offset)
        if encoded is None:
            raise ValueError(
                "tokens=None, but nothing has been encoded: the cache is fresh and encoded=None. "
                "Give the tokens in the first call."
            )
        return encoded, _mask(mask, encoded[..., 0])

    def _checkpoint(self, step: Callable[..., Any]) -> Callable[..., Any]:
        if self.remat is None:
            return step
        # A scan's body is compiled apart from its backward pass: nothing there to keep separate.
        return jax.checkpoint(step, policy=self.remat, prevent_cse=False)

    def _decode(self, y: Array, bias: Array, visible: Array, encoded: Array, mask: Array) -> Array:
        def read(attention: Attention, _: Array) -> Heads:
            return attention.project(encoded)

        def step(y: Array, block: Block) -> tuple[Array, None]:
            crossed = (read, None, mask[:, None, None])
            return block(y, (Attention.project, bias, visible), crossed), None

        return jax.lax.scan(self._checkpoint(step), y, self.decoder.block)[0]

    def _decode_cached(self, y, bias, visible, encoded, cache, start):
        first = "cross_k" not in cache
        crossed = cache["cross_mask"][:, None, None]

        # Keys and values of all layers are carried, not scanned over: XLA then writes the new
        # rows in place, where stacked outputs would copy the whole cache at each step.
        def step(carry, layer):
            (y, keys, values), (block, i, cross) = carry, layer

            def store(attention: Attention, x: Array) -> Heads:
                nonlocal keys, values
                k, v = attention.project(x)
                keys, values = _write(keys, k, i, start), _write(values, v, i, start)
                return keys[i].astype(k.dtype), values[i].astype(v.dtype)

            def read(attention: Attention, x: Array) -> Heads:
                nonlocal cross
                cross = attention.project(encoded) if first else cross
                return cross[0].astype(x.dtype), cross[1].astype(x.dtype)

            y = block(y, (store, bias, visible), (read, None, crossed))
            new = jax.tree.map(lambda heads: heads.astype(keys.dtype), cross) if first else None
            return (y, keys, values), new

        stored: Any = None if first else (cache["cross_k"], cache["cross_v"])
        layers = (self.decoder.block, jnp.arange(self.config.num_decoder_layers), stored)
        (y, keys, values), new = jax.lax.scan(step, (y, cache["k"], cache["v"]), layers)
        cross_k, cross_v = new if first else stored
        return y, cache | {"k": keys, "v": values, "cross_k": cross_k, "cross_v": cross_v}

    def _logits(self, y: Array) -> Array:
        y = self.decoder.final_layer_norm(y)
        if self.config.scale_decoder_outputs:
            y = y * self.config.d_model**-0.5
        tied = self.config.tie_word_embeddings
        head = self.shared.embedding[...].T if tied else self.lm_head.kernel[...]
        return jnp.matmul(y, head, preferred_element_type=jnp.float32)


def _mask(mask: Array | None, tokens: Array) -> Array:
    return jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)


def _write(cache: Array, heads: Array, layer: Array, start: Array) -> Array:
    rows = heads[None].astype(cache.dtype)
    return jax.lax.dynamic_update_slice(cache, rows, (layer, 0, start, 0, 0))


def _causal(queries: Array, keys: Array, mask: Array) -> Array:
    """`bool[B, 1, T, S]`: a query sees the keys up to its own slot that are no padding."""
    return ((keys[None, :] <= queries[:, None]) & mask[:, None, :])[:, None]
