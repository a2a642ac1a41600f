"""Draw the next token from logits."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def keep_top_k(logits: Array, k: int) -> Array:
    """Keep the k largest logits (Fan et al. 2018, arXiv 1805.04833); the others become -inf.

    Args:
        logits: `[..., V]`.
        k: how many to keep; a tie with the last one is kept too.

    Returns:
        An array like `logits`.

    Example:
        >>> keep_top_k(jnp.array([1.0, 3.0, 2.0]), 2)
        Array([-inf,   3.,   2.], dtype=float32)
    """
    least = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def keep_top_p(logits: Array, p: ArrayLike) -> Array:
    """Keep the fewest tokens whose probabilities reach p (Holtzman et al. 2020, arXiv 1904.09751).

    Args:
        logits: `[..., V]`.
        p: probability mass in (0, 1].

    Returns:
        An array like `logits`, -inf at the tokens left out.

    Example:
        >>> keep_top_p(jnp.log(jnp.array([0.5, 0.3, 0.2])), 0.6).tolist()[2]
        -inf
    """
    order = jnp.argsort(-logits, axis=-1)
    ranked = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    kept = jnp.take_along_axis(before < p, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, logits, -jnp.inf)


def sample(
    key: Array | None,
    logits: Array,
    *,
    temperature: ArrayLike | None,
    top_k: int | None = None,
    top_p: ArrayLike | None = None,
) -> Array:
    """Draw from `softmax(logits / temperature)`, or take the largest logit.

    Args:
        key: random key; None only for greedy decoding.
        logits: `float[B, V]`.
        temperature: None is greedy decoding.
        top_k: see `keep_top_k`.
        top_p: see `keep_top_p`; it applies after `top_k`.

    Returns:
        `int32[B]`.

    Raises:
        ValueError: a temperature is given without a key.
    """
    if temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if key is None:
        raise ValueError(f"temperature={temperature} draws at random and needs a key.")
    logits = logits / temperature
    logits = logits if top_k is None else keep_top_k(logits, top_k)
    logits = logits if top_p is None else keep_top_p(logits, top_p)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
