"""Generate text with an encoder-decoder: what is read is encoded once, then the decoder loops."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxpeft.core.transform import Tuned
from jaxpeft.serve.generate import Apply, generate


@dataclasses.dataclass(frozen=True)
class _Decoder:
    """An encoder-decoder as `generate` takes a decoder: equal for equal `apply`s."""

    apply: Apply

    def __call__(self, *inputs: Any, mask: Array, cache: Any) -> tuple[Array, Any]:
        *state, tokens, encoder_mask, decoder_tokens = inputs
        # Virtual tokens stay in the cache, and their logits go.
        own = {"virtual": "keep"} if _tuned(self.apply) else {}
        logits, cache = self.apply(
            *state, tokens, decoder_tokens, mask=encoder_mask, decoder_mask=mask, cache=cache, **own
        )
        return logits[:, -decoder_tokens.shape[1] :], cache

    def decode(self, *inputs: Any, mask: Array, cache: Any) -> tuple[Array, Any]:
        """The call for tokens that follow others in the cache."""
        *state, _, _, decoder_tokens = inputs
        owner = _tuned(self.apply)
        call = owner.decode if owner else self.apply
        return call(*state, None, decoder_tokens, decoder_mask=mask, cache=cache)


def _tuned(apply: Apply) -> Tuned | None:
    owner = getattr(apply, "__self__", None)
    return owner if isinstance(owner, Tuned) else None


def generate_seq2seq(
    apply: Apply,
    state: tuple[Any, ...],
    tokens: Array,
    *,
    cache: Any,
    max_new_tokens: int,
    decoder_start_token_id: int = 0,
    decoder_tokens: Array | None = None,
    decoder_mask: Array | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
    eos_token_id: int | Sequence[int] | None = 1,
    pad_token_id: int = 0,
    mask: Array | None = None,
) -> Array:
    """Write an answer to each sequence of a batch, token by token.

    One compiled program encodes `tokens` and the decoder's prompt, another loops over the new
    tokens with the keys and values of both in the cache. As in `generate`, everything in `state`
    is an argument of the compiled code: pass the same `apply` each time, `model.apply` or
    `tuned.apply`, and new weights or another adapter need no recompilation.

    Args:
        apply: `apply(*state, tokens, decoder_tokens, mask=..., decoder_mask=..., cache=...) ->
            (logits[B, T, V], cache)`. The first call has the tokens; in later ones they are None
            and there is no `mask`, so that the cache holds what is needed of them.
        state: what comes before the tokens: `(params,)`, or `(adapter, params)`.
        tokens: `int32[B, S]`, what to read, padded on either side.
        cache: an empty cache of at least `P + max_new_tokens` slots, where P is the length of
            `decoder_tokens`, or 1, and of `tuned.virtual_tokens` more for a tuned model:
            `model.init_cache(B, slots)`.
        max_new_tokens: how many tokens to write at most.
        decoder_start_token_id: what the decoder's input starts with, where `decoder_tokens` is not
            given; 0 in every T5.
        decoder_tokens: `int32[B, P]`, how the answers begin, start token included, padded on
            either side.
        decoder_mask: `bool[B, P]`, False at padding of `decoder_tokens`.
        temperature: see `generate`.
        top_k: see `generate`.
        top_p: see `generate`.
        key: see `generate`.
        eos_token_id: see `generate`; 1 in every T5.
        pad_token_id: fills what follows the end of an answer.
        mask: `bool[B, S]`, False at padding of `tokens`. None says that there is none.

    Returns:
        `int32[B, max_new_tokens]`, the new tokens.

    Raises:
        ValueError: a setting is out of range, `key` is missing, or the cache is too short.

    Example:
        >>> import jax
        >>> def apply(step, tokens, decoder_tokens, *, mask=None, decoder_mask, cache):
        ...     step = cache.get("step", step if tokens is None else step + tokens[:, :1])
        ...     return jax.nn.one_hot(decoder_tokens + step, 20), {"step": step}
        >>> generate_seq2seq(apply, (2,), jnp.array([[3, 9]]), cache={}, max_new_tokens=3).tolist()
        [[5, 10, 15]]
    """
    tokens, mask = _padded("", tokens, mask)
    if decoder_tokens is None:
        decoder_tokens = jnp.full((len(tokens), 1), decoder_start_token_id)
    start, start_mask = _padded("decoder_", decoder_tokens, decoder_mask)
    if len(start) != len(tokens):
        raise ValueError(
            f"decoder_tokens are {len(start)} sequences, but tokens are {len(tokens)}. "
            "Give one beginning for each sequence."
        )
    # Padding goes to the left: new tokens follow the last one in the very next slot.
    order = jnp.argsort(start_mask, axis=1, stable=True)
    start, start_mask = (jnp.take_along_axis(x, order, axis=1) for x in (start, start_mask))
    return generate(
        _Decoder(apply), (*state, tokens, mask), start, cache=cache, max_new_tokens=max_new_tokens,
        temperature=temperature, top_k=top_k, top_p=top_p, key=key, eos_token_id=eos_token_id,
        pad_token_id=pad_token_id, mask=start_mask,
    )  # fmt: skip


def _padded(name: str, tokens: Array, mask: Array | None) -> tuple[Array, Array]:
    tokens = jnp.asarray(tokens, jnp.int32)
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(
            f"{name}tokens have shape {tokens.shape}; give [batch, length] with length > 0."
        )
    mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
    if mask.shape != tokens.shape:
        raise ValueError(f"{name}mask has shape {mask.shape} but {name}tokens have {tokens.shape}.")
    return tokens, mask
