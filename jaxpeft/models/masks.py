"""Masks of attentions."""

import jax.numpy as jnp
from jax import Array


def over_keys(mask: Array | None, keys: Array) -> Array | None:
    """A mask `(..., S)` for `keys` `(B, P + S, K, H)`: the P in front, a prefix's, are all seen.

    Args:
        mask: bool, True where a key is seen; or float, to be added to the scores; None for all.
        keys: what is attended to; as long as the mask, unless prefix tuning made it longer.

    Returns:
        The mask `(..., P + S)`.
    """
    if mask is None:
        return None
    added = jnp.issubdtype(mask.dtype, jnp.floating)
    widths = [(0, 0)] * (mask.ndim - 1) + [(keys.shape[-3] - mask.shape[-1], 0)]
    return jnp.pad(mask, widths, constant_values=0.0 if added else True)
