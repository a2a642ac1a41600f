"""A Llama-like decoder (Llama, Mistral, Qwen2, SmolLM2) in Flax NNX.

    h = h + Attention(RMSNorm(h)),   h = h + W_down (silu(W_gate n) * W_up n),  n = RMSNorm(h)

All layers' weights are stacked on axis 0 and one `jax.lax.scan` runs them, so that compile time
does not grow with depth. Letters in shapes: B batch, T new tokens, S key slots, L layers, D model,
N query heads, K key heads, H head width, F hidden width of the MLP, V vocabulary.

References: Touvron et al. 2023 (arXiv 2302.13971), Jiang et al. 2023 (2310.06825), Yang et al. 2024
(2407.10671).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from jaxpeft.flax.mark import Point
from jaxpeft.models.config import DecoderConfig
from jaxpeft.models.masks import over_keys
from jaxpeft.models.model import Model
from jaxpeft.models.names import Name, names
from jaxpeft.models.rope import apply_rope, rope_frequencies

Cache = dict[str, Array]
Policy = Callable[..., Any]
Store = Callable[[Array, Array], tuple[Array, Array]]
KEEP_PROJECTIONS = jax.checkpoint_policies.save_only_these_names("projection")


class Linear(nnx.Module):
    """`y = x @ kernel + bias`, kernel `(*stack, in, out)`."""

    def __init__(self, shape, *, bias: bool, stddev: float, dtype: DTypeLike, rngs: nnx.Rngs):
        kernel = stddev * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(kernel.astype(dtype))
        if bias:
            self.bias = nnx.Param(jnp.zeros((*shape[:-2], shape[-1]), dtype))

    def __call__(self, x: Array) -> Array:
        y = x @ self.kernel[...]
        y = y + self.bias[...] if hasattr(self, "bias") else y
        return checkpoint_name(y, "projection")


class RMSNorm(nnx.Module):
    """`y = scale * x / sqrt(mean(x^2) + eps)`, the mean in float32."""

    def __init__(self, shape, *, eps: float, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones(shape, dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.scale[...] * wide.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, **kw: Any):
        layers, width = config.num_hidden_layers, config.hidden_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = Linear((layers, width, queries), bias=config.qkv_bias, **kw)
        self.k_proj = Linear((layers, width, keys), bias=config.qkv_bias, **kw)
        self.v_proj = Linear((layers, width, keys), bias=config.qkv_bias, **kw)
        self.o_proj = Linear((layers, queries, width), bias=config.o_bias, **kw)
        self.query, self.key, self.value, self.context = (Point() for _ in range(4))
        self.delta = Point()

    def __call__(
        self, x: Array, rope: tuple[Array, Array], visible: Array, store: Store, *, stream: Array
    ) -> Array:
        heads = (*x.shape[:-1], -1, self.head_dim)
        q = apply_rope(self.q_proj(x).reshape(heads), *rope)
        k = apply_rope(self.k_proj(x).reshape(heads), *rope)
        v = self.v_proj(x).reshape(heads)
        k, v = store(k, v)
        q, k, v = self.query(q), self.key(k), self.value(v)
        y = jax.nn.dot_product_attention(q, k, v, mask=over_keys(visible, k))
        y = self.context(y, query=q)
        y = self.o_proj(y.reshape(*x.shape[:-1], -1))
        return self.delta(y, stream=stream, sum=lambda: stream + y)


class MLP(nnx.Module):
    """`y = W_down (silu(W_gate x) * W_up x)`."""

    def __init__(self, config: DecoderConfig, **kw: Any):
        layers, width, hidden = (
            config.num_hidden_layers, config.hidden_size, config.intermediate_size
        )  # fmt: skip
        kw["bias"] = config.mlp_bias
        self.gate_proj = Linear((layers, width, hidden), **kw)
        self.up_proj = Linear((layers, width, hidden), **kw)
        self.down_proj = Linear((layers, hidden, width), **kw)
        self.delta = Point()

    def __call__(self, x: Array, *, stream: Array) -> Array:
        y = self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.delta(y, stream=stream, sum=lambda: stream + y)


class Block(nnx.Module):
    """One layer; as an attribute of `Decoder` its weights hold all layers, stacked on axis 0."""

    def __init__(self, config: DecoderConfig, **kw: Any):
        norm = dict(eps=config.rms_norm_eps, dtype=kw["dtype"])
        shape = (config.num_hidden_layers, config.hidden_size)
        self.input_layernorm = RMSNorm(shape, **norm)
        self.self_attn = Attention(config, **kw)
        self.post_attention_layernorm = RMSNorm(shape, **norm)
        self.mlp = MLP(config, **kw)

    def __call__(self, x: Array, rope: tuple[Array, Array], visible: Array, store: Store) -> Array:
        x = x + self.self_attn(self.input_layernorm(x), rope, visible, store, stream=x)
        return x + self.mlp(self.post_attention_layernorm(x), stream=x)


class Embedding(nnx.Module):
    """`y = embedding[tokens]`, embedding `(V, D)`."""

    def __init__(self, shape, *, stddev: float, dtype: DTypeLike, rngs: nnx.Rngs):
        table = stddev * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.embedding = nnx.Param(table.astype(dtype))

    def __call__(self, tokens: Array) -> Array:
        return jnp.take(self.embedding[...], tokens, axis=0)


class Decoder(Model):
    """A causal language model.

    Args:
        config: shapes and constants.
        dtype: of the weights and of the activations.
        remat: which activations of a layer the backward pass finds kept; the others it computes
            again. By default the outputs of the projections are kept, which costs next to no time
            and halves the memory of activations. `jax.checkpoint_policies.nothing_saveable` keeps
            only the inputs of layers, for a third more time; None keeps everything.
        rngs: source of the random initial weights.

    Example:
        >>> from jaxpeft.models.config import from_hf
        >>> config = from_hf(dict(model_type="llama", vocab_size=8, hidden_size=4,
        ...     intermediate_size=8, num_hidden_layers=2, num_attention_heads=2))
        >>> model = Decoder(config, rngs=nnx.Rngs(0))
        >>> model(jnp.array([[1, 2, 3]])).shape
        (1, 3, 8)
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: Policy | None = KEEP_PROJECTIONS,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = dict(stddev=config.initializer_range, dtype=dtype, rngs=rngs)
        table = (config.vocab_size, config.hidden_size)
        self.config = config
        self.remat = remat
        self.embed_tokens = Embedding(table, **kw)
        self.layers = Block(config, **kw)
        self.norm = RMSNorm((config.hidden_size,), eps=config.rms_norm_eps, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(table[::-1], bias=False, **kw)

    def __call__(
        self,
        tokens: Array,
        *,
        positions: Array | None = None,
        mask: Array | None = None,
        cache: Cache | None = None,
    ) -> Array | tuple[Array, Cache]:
        """Next-token logits.

        Args:
            tokens: `int32[B, T]`.
            positions: `int32[B, T]` for the rotary embedding; counted from the mask when absent.
            mask: `bool[B, T]`, False at padding, on whichever side. Causality is implied.
            cache: from `init_cache` or an earlier call; the T tokens follow what it holds.

        Returns:
            `float32[B, T, V]`; with a cache, `(logits, cache)`. Logits at padding are meaningless.
        """
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        if positions is None:
            positions = count(mask) if cache is None else count(mask) + cache["count"][:, None]
        x = self.embed_tokens(tokens)
        if cache is None:
            return self._logits(self.layered(x, positions, mask))
        rope = rope_frequencies(self.config, positions)
        start = cache["index"]
        cache = cache | {
            "positions": _write(cache["positions"], positions, start),
            "mask": _write(cache["mask"], mask, start),
            "count": cache["count"] + mask.sum(axis=1, dtype=jnp.int32),
            "index": start + tokens.shape[1],
        }
        slots = jnp.arange(cache["mask"].shape[1])
        queries = start + jnp.arange(tokens.shape[1])
        visible = _visible(
            queries, slots, positions, cache["positions"], cache["mask"],
            self.config.sliding_window,
        )  # fmt: skip
        x, keys, values = self._run_cached(x, rope, visible, cache["k"], cache["v"], start)
        return self._logits(x), cache | {"k": keys, "v": values}

    def layered(self, x: Array, positions: Array, mask: Array) -> Array:
        """What the layers make of embeddings `x` (B, T, D), in front of the last norm."""
        rope, slots = rope_frequencies(self.config, positions), jnp.arange(x.shape[1])
        visible = _visible(slots, slots, positions, positions, mask, self.config.sliding_window)
        return self._run(x, rope, visible)

    @property
    def output_head(self) -> str | None:
        """Where the weights of the head are, which a bare method leaves alone."""
        return None if self.config.tie_word_embeddings else "lm_head/kernel"

    def names(self) -> tuple[Name, ...]:
        """The weights' names in Hugging Face's and llama.cpp's files."""
        return names(self.config)

    def example(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Abstract tokens of a small call."""
        return (jax.ShapeDtypeStruct((2, 3), jnp.int32),)

    def init_cache(self, batch: int, length: int, dtype: DTypeLike | None = None) -> Cache:
        """An empty key-value cache.

        Args:
            batch: number of sequences.
            length: slots for prompt and generated tokens together, padding included.
            dtype: of the keys and values; the weights' dtype when absent.

        Returns:
            A dict of arrays: `k`, `v` `[L, B, length, K, H]`, `positions`, `mask` `[B, length]`,
            `count` `[B]` (real tokens so far), `index` (next slot).
        """
        config = self.config
        dtype = self.embed_tokens.embedding.dtype if dtype is None else dtype
        heads = (config.num_key_value_heads, config.head_dim)
        shape = (config.num_hidden_layers, batch, length, *heads)
        return {
            "k": jnp.zeros(shape, dtype),
            "v": jnp.zeros(shape, dtype),
            "positions": jnp.zeros((batch, length), jnp.int32),
            "mask": jnp.zeros((batch, length), bool),
            "count": jnp.zeros((batch,), jnp.int32),
            "index": jnp.zeros((), jnp.int32),
        }

    def _run(self, x: Array, rope: tuple[Array, Array], visible: Array) -> Array:
        def step(x: Array, block: Block) -> tuple[Array, None]:
            return block(x, rope, visible, lambda k, v: (k, v)), None

        if self.remat is None:
            return jax.lax.scan(step, x, self.layers)[0]
        # A scan's body is compiled apart from its backward pass: nothing there to keep separate.
        step = jax.checkpoint(step, policy=self.remat, prevent_cse=False)
        return jax.lax.scan(step, x, self.layers)[0]

    def _run_cached(self, x, rope, visible, keys, values, start):
        # Keys and values of all layers are carried, not scanned over: XLA then writes the new
        # rows in place, where stacked outputs would copy the whole cache at each step.
        def step(carry, block_and_layer):
            (x, keys, values), (block, layer) = carry, block_and_layer

            def store(k: Array, v: Array) -> tuple[Array, Array]:
                nonlocal keys, values
                keys = jax.lax.dynamic_update_slice(
                    keys, k[None].astype(keys.dtype), (layer, 0, start, 0, 0)
                )
                values = jax.lax.dynamic_update_slice(
                    values, v[None].astype(values.dtype), (layer, 0, start, 0, 0)
                )
                return keys[layer].astype(k.dtype), values[layer].astype(v.dtype)

            return (block(x, rope, visible, store), keys, values), None

        layers = jnp.arange(self.config.num_hidden_layers)
        return jax.lax.scan(step, (x, keys, values), (self.layers, layers))[0]

    def _logits(self, x: Array) -> Array:
        x = self.norm(x)
        tied = self.config.tie_word_embeddings
        head = self.embed_tokens.embedding[...].T if tied else self.lm_head.kernel[...]
        return jnp.matmul(x, head, preferred_element_type=jnp.float32)


def count(mask: Array) -> Array:
    """The position of each token, counted from the mask of those that are no padding."""
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def _write(buffer: Array, rows: Array, start: Array) -> Array:
    rows = jnp.broadcast_to(rows, (buffer.shape[0], rows.shape[1])).astype(buffer.dtype)
    return jax.lax.dynamic_update_slice(buffer, rows, (0, start))


def _visible(query_slots, key_slots, query_positions, key_positions, mask, window) -> Array:
    """`bool[B, 1, T, S]`: which key a query sees, by slot order, padding and window."""
    visible = (key_slots[None, :] <= query_slots[:, None]) & mask[:, None, :]
    if window is not None:
        visible &= query_positions[:, :, None] - key_positions[:, None, :] < window
    return visible[:, None]
