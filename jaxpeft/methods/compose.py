"""Methods made of methods: each on a part of the sequence or of the batch, or their average.

split         x' = [m_0(x_0); m_1(x_1); ...] along the sequence, batch_split along the batch
average       x' = x + sum_i w_i (m_i(x) - x)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.method import Leaves, Method
from jaxpeft.core.site import Site
from jaxpeft.core.tap import Here
from jaxpeft.methods.composed import Stages, made_of, run

Array = jax.Array


def split(*methods: Any, at: int | Sequence[int]) -> Method:
    """Each method on its own part of the sequence: `x' = [m_0(x[:at]); m_1(x[at:])]`.

    Leaves: those of the methods, under "0", "1", ...

    Args:
        *methods: methods at call boundaries, chains of them, or None for a part left as it is.
        at: where the parts begin but the first: positions on the second last axis, one fewer than
            there are methods.

    Returns:
        A method that goes where all of them go.

    Raises:
        ValueError: if the numbers of methods and parts differ, or positions do not increase.
        TypeError: if one is no method at call boundaries.

    Example:
        >>> from jaxpeft.methods.bottleneck import bottleneck
        >>> method = split(bottleneck(8), bottleneck(4), at=64)

    Reference:
        AdapterHub's `Split`: Poth et al. 2023, arXiv:2311.11077.
    """
    starts = [at] if isinstance(at, int) else list(at)
    if starts != sorted(set(starts)) or len(starts) != len(methods) - 1:
        raise ValueError(
            f"at={at!r} for {len(methods)} methods: {len(methods) - 1} increasing positions."
        )

    def call(stages: Stages, site: Site, leaves: Leaves, x: Array, here: Here) -> Array:
        bounds = [0, *(min(start, x.shape[-2]) for start in starts), x.shape[-2]]
        return _apart(stages, site, leaves, x, here, bounds, axis=x.ndim - 2)

    return made_of("split", methods, call, {"at": starts})


def batch_split(*methods: Any, sizes: Sequence[int]) -> Method:
    """Each method on its own rows of the batch: `sizes[0]` rows by the first, and so on.

    Leaves: those of the methods, under "0", "1", ...

    Args:
        *methods: methods at call boundaries, chains of them, or None for rows left as they are.
        sizes: rows for each, together the whole batch, which is the axis before the sequence.

    Returns:
        A method that goes where all of them go.

    Raises:
        ValueError: if there are not as many sizes as methods, or (in the call) rows are left over.
        TypeError: if one is no method at call boundaries.

    Example:
        >>> from jaxpeft.methods.bottleneck import bottleneck
        >>> method = batch_split(bottleneck(8), None, sizes=(3, 1))

    Reference:
        AdapterHub's `BatchSplit`: Poth et al. 2023, arXiv:2311.11077.
    """
    if len(sizes) != len(methods):
        raise ValueError(f"sizes={tuple(sizes)} for {len(methods)} methods: one for each.")
    bounds = [0, *itertools.accumulate(sizes)]

    def call(stages: Stages, site: Site, leaves: Leaves, x: Array, here: Here) -> Array:
        axis = max(x.ndim - 3, 0)
        if x.shape[axis] != bounds[-1]:
            raise ValueError(f"sizes={tuple(sizes)}, but {site.path!r} has {x.shape[axis]} rows.")
        return _apart(stages, site, leaves, x, here, bounds, axis)

    return made_of("batch_split", methods, call, {"sizes": list(sizes)})


def average(*methods: Any, weights: Sequence[float] | None = None) -> Method:
    """The weighted average of what methods do: `x' = x + sum_i w_i (m_i(x) - x)`.

    Leaves: those of the methods, under "0", "1", ...

    Args:
        *methods: methods at call boundaries, or chains of them.
        weights: `w`, of any sum; equal ones of sum 1 when absent.

    Returns:
        A method that goes where all of them go.

    Raises:
        ValueError: if there are not as many weights as methods.
        TypeError: if one is no method at call boundaries.

    Example:
        >>> from jaxpeft.methods.bottleneck import bottleneck
        >>> method = average(bottleneck(8), bottleneck(8), weights=(0.7, 0.3))

    Reference:
        AdapterHub's `Average`, as its documentation has it: Poth et al. 2023, arXiv:2311.11077.
    """
    shares = [1 / len(methods)] * len(methods) if weights is None else [float(w) for w in weights]
    if len(shares) != len(methods):
        raise ValueError(f"weights={weights!r} for {len(methods)} methods: one for each.")

    def call(stages: Stages, site: Site, leaves: Leaves, x: Array, here: Here) -> Array:
        parts = (run(m, n, site, leaves, x, here) for n, m in stages.items())
        named = zip(stages, parts, strict=True)
        return x + sum(shares[int(name)] * (part - x) for name, part in named)

    return made_of("average", methods, call, {"weights": shares})


def _apart(
    stages: Stages, site: Site, leaves: Leaves, x: Array, here: Here, bounds: Any, axis: int
) -> Array:
    """The methods on the parts of `x` between bounds, and on those of what they may read."""
    pieces = []
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):

        def cut(value: Any, start: int = start, stop: int = stop) -> Any:
            whole = getattr(value, "ndim", 0) == x.ndim and value.shape[axis] == x.shape[axis]
            return jax.lax.slice_in_dim(value, start, stop, axis=axis) if whole else value

        piece, sources = cut(x), {name: cut(value) for name, value in here.sources.items()}
        if str(i) in stages:
            there = here._replace(sources=sources)
            piece = run(stages[str(i)], str(i), site, leaves, piece, there)
        pieces.append(piece)
    return jnp.concatenate(pieces, axis=axis)
