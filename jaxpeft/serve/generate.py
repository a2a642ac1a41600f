"""Generate text with a key-value cache: one compiled prefill, one compiled loop."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxpeft.core.transform import Tuned
from jaxpeft.serve.sample import sample

Apply = Callable[..., Any]
Settings = dict[str, Any]


def generate(
    apply: Apply,
    state: tuple[Any, ...],
    tokens: Array,
    *,
    cache: Any,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    mask: Array | None = None,
) -> Array:
    """Continue each sequence of a batch.

    `apply` is compiled with everything in `state` as arguments, so new weights or another adapter
    of the same shapes need no recompilation. Pass the same function each time, a method like
    `model.apply` or `tuned.apply` and not a fresh lambda: compiled code is kept per function.

    Args:
        apply: `apply(*state, tokens, mask=..., cache=...) -> (logits[B, T, V], cache)`.
        state: what comes before the tokens: `(params,)`, or `(adapter, params)`.
        tokens: `int32[B, T]`, the prompts, padded on either side.
        cache: an empty cache of at least `T + max_new_tokens` slots, and of `tuned.virtual_tokens`
            more for a tuned model: `model.init_cache(B, slots)`.
        max_new_tokens: how many tokens to add at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample from the k likeliest tokens only.
        top_p: sample from the likeliest tokens of this total probability only.
        key: random key, needed when `temperature > 0`.
        eos_token_id: a sequence that draws it (or one of them) is finished; the loop stops when
            all are. None goes on to the end.
        pad_token_id: fills what follows the end of a sequence; the first end token when absent.
        mask: `bool[B, T]`, False at padding. None says that there is none.

    Returns:
        `int32[B, max_new_tokens]`, the new tokens.

    Raises:
        ValueError: a setting is out of range, `key` is missing, or the cache is too short.

    Example:
        >>> import jax.numpy as jnp
        >>> def apply(step, tokens, *, mask, cache):  # a "model" that counts
        ...     return jax.nn.one_hot(tokens + step, 10), cache
        >>> generate(apply, (2,), jnp.array([[0, 1]]), cache={}, max_new_tokens=3).tolist()
        [[3, 5, 7]]
    """
    ends = _ends(eos_token_id)
    settings = _settings(temperature, top_k, top_p, key)
    tokens, mask = _prompt(tokens, mask)
    _check_length(apply, cache, tokens, max_new_tokens)
    pad = ends[0] if pad_token_id is None and ends else pad_token_id or 0
    static = dict(apply=apply, top_k=top_k)
    first, cache, key = _prefill(state, tokens, mask, cache, key, settings, **static)
    return _loop(
        state, first, cache, key, settings, pad, **static, ends=ends, length=max_new_tokens
    )


def stream(
    apply: Apply,
    state: tuple[Any, ...],
    tokens: Array,
    *,
    cache: Any,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    mask: Array | None = None,
) -> Iterator[Array]:
    """Like `generate`, but yield the tokens of each step as soon as they are drawn.

    The tokens are those that `generate` gives for the same arguments. A finished sequence goes on
    drawing while others in its batch are at work; cut it at its first end token.

    Args:
        apply: see `generate`.
        state: see `generate`.
        tokens: see `generate`.
        cache: see `generate`.
        max_new_tokens: see `generate`.
        temperature: see `generate`.
        top_k: see `generate`.
        top_p: see `generate`.
        key: see `generate`.
        eos_token_id: see `generate`; the stream ends when every sequence has drawn one.
        mask: see `generate`.

    Yields:
        `int32[B]` per step, the end tokens included.

    Raises:
        ValueError: see `generate`.

    Example:
        >>> import jax.numpy as jnp
        >>> def apply(step, tokens, *, mask, cache):
        ...     return jax.nn.one_hot(tokens + step, 10), cache
        >>> [int(t[0]) for t in stream(apply, (2,), jnp.array([[0]]), cache={}, max_new_tokens=3)]
        [2, 4, 6]
    """
    ends = _ends(eos_token_id)
    settings = _settings(temperature, top_k, top_p, key)
    tokens, mask = _prompt(tokens, mask)
    _check_length(apply, cache, tokens, max_new_tokens)
    return _stream(apply, state, tokens, mask, cache, max_new_tokens, top_k, key, settings, ends)


def _stream(
    apply, state, tokens, mask, cache, max_new_tokens, top_k, key, settings, ends
) -> Iterator[Array]:
    static = dict(apply=apply, top_k=top_k)
    token, cache, key = _prefill(state, tokens, mask, cache, key, settings, **static)
    done = _is_end(token, ends)
    for left in reversed(range(max_new_tokens)):
        yield token
        if left == 0 or (ends and bool(done.all())):
            return
        token, cache, key = _step(state, token, cache, key, settings, **static)
        done = done | _is_end(token, ends)


@functools.partial(jax.jit, static_argnames=("apply", "top_k"))
def _prefill(state, tokens, mask, cache, key, settings, *, apply, top_k):
    logits, cache = apply(*state, tokens, mask=mask, cache=cache)
    slots = jnp.arange(tokens.shape[1])
    last = jnp.max(jnp.where(mask, slots, 0), axis=1)
    logits = jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]
    key, now = _split(key)
    return sample(now, logits, top_k=top_k, **settings), cache, key


@functools.partial(jax.jit, static_argnames=("apply", "top_k", "ends", "length"))
def _loop(state, first, cache, key, settings, pad, *, apply, top_k, ends, length):
    output = jnp.full((first.shape[0], length), pad, jnp.int32).at[:, 0].set(first)

    def unfinished(carry):
        i, _, done, _, _, _ = carry
        return (i < length) & ~done.all()

    def body(carry):
        i, token, done, output, cache, key = carry
        token, cache, key = _advance(state, token, cache, key, settings, apply, top_k)
        output = output.at[:, i].set(jnp.where(done, pad, token))
        return i + 1, token, done | _is_end(token, ends), output, cache, key

    carry = (jnp.int32(1), first, _is_end(first, ends), output, cache, key)
    return jax.lax.while_loop(unfinished, body, carry)[3]


@functools.partial(jax.jit, static_argnames=("apply", "top_k"), donate_argnames=("cache",))
def _step(state, token, cache, key, settings, *, apply, top_k):
    return _advance(state, token, cache, key, settings, apply, top_k)


def _advance(state, token, cache, key, settings, apply, top_k):
    """One decoding step: the token enters the cache, and the next one is drawn."""
    mask = jnp.ones((token.shape[0], 1), bool)
    logits, cache = _continuing(apply)(*state, token[:, None], mask=mask, cache=cache)
    key, now = _split(key)
    return sample(now, logits[:, -1], top_k=top_k, **settings), cache, key


def _continuing(apply: Apply) -> Apply:
    """The call for tokens that follow a prompt: a tuned model has its virtual tokens in front."""
    owner = getattr(apply, "__self__", None)
    return owner.decode if isinstance(owner, Tuned) else getattr(apply, "decode", apply)


def _split(key: Array | None) -> tuple[Array | None, Array | None]:
    return (None, None) if key is None else tuple(jax.random.split(key))


def _is_end(token: Array, ends: tuple[int, ...]) -> Array:
    return jnp.isin(token, jnp.array(ends, jnp.int32)) if ends else jnp.zeros(token.shape, bool)


def _ends(eos_token_id: int | Sequence[int] | None) -> tuple[int, ...]:
    if eos_token_id is None:
        return ()
    return (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)


def _settings(
    temperature: float, top_k: int | None, top_p: float | None, key: Array | None
) -> Settings:
    if temperature < 0:
        raise ValueError(f"temperature={temperature} is negative. Use 0 for greedy decoding.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} keeps no token. Use top_k >= 1, or None for all.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is not in (0, 1]. Use None to keep all tokens.")
    if temperature == 0:
        return {"temperature": None, "top_p": None}
    if key is None:
        raise ValueError(
            f"temperature={temperature} draws at random and needs key=jax.random.key(seed). "
            "Use temperature=0.0 for greedy decoding."
        )
    return {"temperature": temperature, "top_p": top_p}


def _prompt(tokens: Array, mask: Array | None) -> tuple[Array, Array]:
    tokens = jnp.asarray(tokens, jnp.int32)
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens have shape {tokens.shape}; give [batch, length] with length > 0.")
    mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
    if mask.shape != tokens.shape:
        raise ValueError(f"mask has shape {mask.shape} but tokens have {tokens.shape}.")
    return tokens, mask


def _check_length(apply: Apply, cache: Any, tokens: Array, max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} asks for no token. Use 1 or more.")
    owner = getattr(apply, "__self__", None)
    virtual = owner.virtual_tokens if isinstance(owner, Tuned) else 0
    needed = virtual + tokens.shape[1] + max_new_tokens
    slots = cache["mask"].shape[1] if isinstance(cache, dict) and "mask" in cache else needed
    if slots < needed:
        of_tuning = f"{virtual} virtual tokens (tuned.virtual_tokens), " if virtual else ""
        raise ValueError(
            f"the cache has {slots} slots, but {of_tuning}{tokens.shape[1]} prompt tokens and "
            f"max_new_tokens={max_new_tokens} need {needed}. "
            f"Use cache=model.init_cache({tokens.shape[0]}, {needed})."
        )
