"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), as transformers computes them."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpeft.models.config import DecoderConfig, RopeScaling


def inverse_frequencies(config: DecoderConfig) -> np.ndarray:
    """`theta^(-2i/H)` for `i < H/2` in radians per position, stretched by `config.rope_scaling`.

    Args:
        config: gives head width H, theta and the scaling.

    Returns:
        `float32[H/2]`.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    return (frequencies / llama3_divisors(frequencies, scaling)).astype(np.float32)


def llama3_divisors(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """What Llama 3.1 divides each frequency by: 1 for short waves, `factor` for long ones.

    In between, `1 / divisor` goes linearly in `context / wavelength` from `1 / factor` to 1.

    Args:
        frequencies: radians per position, `[H/2]`.
        scaling: the constants, with `rope_type="llama3"`.

    Returns:
        `[H/2]`, the numbers that llama.cpp stores as `rope_freqs.weight`.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    waves = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    share = np.clip((waves - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - share) / scaling.factor + share)


def rope_frequencies(config: DecoderConfig, positions: Array) -> tuple[Array, Array]:
    """Cosine and sine of each position's angles.

    Args:
        config: the decoder's configuration.
        positions: `int32[B, T]`.

    Returns:
        Two `float32[B, T, 1, H/2]`.
    """
    angles = positions[:, :, None, None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Turn the pairs `(x[i], x[i + H/2])` by the angles: the "rotate half" layout.

    Args:
        x: queries or keys `[B, T, heads, H]`.
        cos: `[B, T, 1, H/2]`.
        sin: `[B, T, 1, H/2]`.

    Returns:
        An array like `x`.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
