"""The largest singular triplets of matrices: functions `(matrix, rank) -> (u, s, vt)`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
Triplets = tuple[Array, Array, Array]
Svd = Callable[[Array, int], Triplets]


def exact_svd(matrix: Array, rank: int) -> Triplets:
    """From a full decomposition.

    Args:
        matrix: `(..., m, n)`.
        rank: how many triplets.

    Returns:
        `u (..., m, rank)`, `s (..., rank)` from the largest down, `vt (..., rank, n)`.

    Example:
        >>> exact_svd(jnp.diag(jnp.array([1.0, 3.0, 2.0])), 2)[1].tolist()
        [3.0, 2.0]
    """
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return u[..., :rank], s[..., :rank], vt[..., :rank, :]


def randomized_svd(power: int = 8, *, oversample: int = 8, seed: int = 0) -> Svd:
    """By subspace iteration from a random start: products with `rank + oversample` columns.

    Args:
        power: of `M M^T`; more separate triplets of close values better.
        oversample: columns beyond the rank.
        seed: of the start.

    Returns:
        A function like `exact_svd`.

    Example:
        >>> _, s, _ = randomized_svd()(jnp.diag(0.5 ** jnp.arange(20)), 2)
        >>> s.round(4).tolist()
        [1.0, 0.5]

    Reference:
        Halko et al. 2011, arXiv:0909.4061, algorithm 4.4.
    """

    def svd(matrix: Array, rank: int) -> Triplets:
        columns = min(rank + oversample, *matrix.shape[-2:])
        shape = (*matrix.shape[:-2], matrix.shape[-1], columns)
        # Accelerators multiply float32 in fewer bits unless told otherwise.
        with jax.default_matmul_precision("highest"):
            basis = matrix @ jax.random.normal(jax.random.key(seed), shape, matrix.dtype)
            back = jnp.swapaxes(matrix, -1, -2)
            for _ in range(power):
                basis = matrix @ jnp.linalg.qr(back @ jnp.linalg.qr(basis)[0])[0]
            basis, _ = jnp.linalg.qr(basis)
            u, s, vt = exact_svd(jnp.swapaxes(basis, -1, -2) @ matrix, rank)
            return basis @ u, s, vt

    return svd
