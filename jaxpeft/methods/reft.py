r"""Representation fine-tuning (ReFT): hidden states edited in a subspace, at a few positions.

LoReFT  h' = h + R^T (W h + b - R h),  R R^T = I        NoReFT  the same with any R
DiReFT  h' = h + R^T (W h + b),        any R            R, W: (r, d)
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxpeft.core.method import Method
from jaxpeft.methods.reft_form import Reft, reft


def loreft(
    rank: int,
    *,
    first: int | None = 3,
    last: int = 0,
    tied: bool = False,
    activation: str = "identity",
    dropout: float = 0.0,
    init: str = "zero",
    dtype: Any = jnp.float32,
) -> Method:
    """LoReFT: `h' = h + R^T (f(W h + b) - R h)` at some positions, the rows of `R` orthonormal.

    Leaves, under `first` for the first positions and `last` for the last ones: `source` (stack...,
    r, d) is `W`, `bias` (stack..., r), and `rotation` (stack..., r, d), of which `R` is the Q of a
    QR decomposition with a positive diagonal: a `rotation` with orthonormal rows is `R` itself. So
    `r (2 d + 1)` parameters a layer, twice that for both ends. A fresh adapter changes nothing.

    Positions are counted among the tokens that `apply` is told to be real by its keyword argument
    `token_mask` (bool[B, T]), else among all of them. A call that continues a cache has none of
    the first positions: give it a mask of zeros.

    Args:
        rank: `r`, of the subspace.
        first: positions to edit at the start of each sequence; None: every position.
        last: positions to edit at the end. Where both meet, the last ones' edit holds.
        tied: one edit for both ends, under `first`.
        activation: `f`, the name of a function in `jax.nn`.
        dropout: share of the entries of `h'` that are dropped at these positions, given a key.
        init: "zero": the update starts at zero; "uniform": all leaves uniform on
            (-1/sqrt(d), 1/sqrt(d)), as in the authors' code, `rotation` made orthonormal.
        dtype: of the leaves; products are computed in the dtype of `h`.

    Returns:
        A method for the outputs of blocks, `rules(("layers:out", loreft(4)))`. As a bare tuning it
        goes to all blocks of the models of this library.

    Raises:
        ValueError: if an option is out of range, or `rank` exceeds the width of a site.

    Example:
        >>> import jaxpeft as jp
        >>> tuning = jp.rules(("**/block:out", loreft(4, first=7, last=7)))

    Reference:
        Wu et al. 2024, arXiv:2404.03592.
    """
    form = Reft(True, True, first, last, tied, activation, dropout)
    return reft("loreft", form, rank, init, dtype)


def noreft(
    rank: int,
    *,
    first: int | None = 3,
    last: int = 0,
    tied: bool = False,
    activation: str = "identity",
    dropout: float = 0.0,
    init: str = "zero",
    dtype: Any = jnp.float32,
) -> Method:
    """NoReFT: `loreft` with any `R`, which is the leaf `rotation` itself.

    Example:
        >>> import jaxpeft as jp
        >>> tuning = jp.rules(("**/block:out", noreft(4)))

    Reference:
        Wu et al. 2024, arXiv:2404.03592; the name is AdapterHub's.
    """
    form = Reft(False, True, first, last, tied, activation, dropout)
    return reft("noreft", form, rank, init, dtype)


def direft(
    rank: int,
    *,
    first: int | None = 3,
    last: int = 0,
    tied: bool = False,
    activation: str = "identity",
    dropout: float = 0.0,
    init: str = "zero",
    dtype: Any = jnp.float32,
) -> Method:
    """DiReFT: `h' = h + R^T f(W h + b)`, any `R`; else as `loreft`.

    Example:
        >>> import jaxpeft as jp
        >>> tuning = jp.rules(("**/block:out", direft(4)))

    Reference:
        Wu et al. 2024, arXiv:2404.03592.
    """
    form = Reft(False, False, first, last, tied, activation, dropout)
    return reft("direft", form, rank, init, dtype)
