"""How a low-rank factor starts: functions `(key, shape, fan_in, rank) -> float32 array`."""

from __future__ import annotations

import jax


def kaiming_uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int, rank: int) -> jax.Array:
    """Uniform on (-1/sqrt(fan_in), 1/sqrt(fan_in)), PEFT's default for `A`.

    He et al. 2015 (arXiv:1502.01852) with a = sqrt(5), the bound that torch's linear layers use.

    >>> kaiming_uniform(jax.random.key(0), (4, 2), fan_in=4, rank=2).shape
    (4, 2)
    """
    del rank
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def gaussian(key: jax.Array, shape: tuple[int, ...], fan_in: int, rank: int) -> jax.Array:
    """Normal with standard deviation 1/rank, PEFT's "gaussian".

    >>> gaussian(jax.random.key(0), (4, 2), fan_in=4, rank=2).shape
    (4, 2)
    """
    del fan_in
    return jax.random.normal(key, shape) / rank
