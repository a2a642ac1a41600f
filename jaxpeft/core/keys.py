"""PRNG keys: of either kind, and one of its own for each site."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def typed_key(key: Any) -> Array:
    if not hasattr(key, "dtype"):
        raise TypeError(
            f"expected a PRNG key such as jax.random.key(0), got {type(key).__name__}. "
            "The call is tuned.init(key, params, *inputs)."
        )
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if is_typed else jax.random.wrap_key_data(key)


def site_key(key: Array, path: str) -> Array:
    """A key of its own for each site, the same in every process."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)
