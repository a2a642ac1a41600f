"""The loss of context-aware prompt tuning, over the labels of the context and of the input."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Array = jax.Array


def cpt_loss(
    logits: Array,
    labels: Array,
    ids: Sequence[int],
    types: Sequence[int],
    *,
    input_types: Array | None = None,
    decay: float = 1.0,
    ignore: int = -100,
) -> tuple[Array, Array]:
    """The sum of `decay^k * cross entropy` over the labels of context and input, and their count.

    Their quotient is the loss of PEFT. `k` counts the examples behind a label's own: 0 for the
    input, 1 for the last example of the context, and so on.

    Args:
        logits: `(B, n + T, V)` for the context and the tokens: `apply(..., virtual="keep")`.
        labels: `int[B, T]`, the tokens themselves, or `ignore`.
        ids: the `n` tokens of the context, as for `cpt`.
        types: of them.
        input_types: `int[B, T]`, types of the tokens, counted from one example: 1, 2, 3, 4, and 0
            for padding. By default every token is part of a label.
        decay: factor from an example to the one before it.
        ignore: label of the positions that do not count.

    Returns:
        `(total, count)`, two float32 scalars.

    Example:
        >>> logits, labels = jnp.zeros((1, 6, 8)), jnp.array([[3, 4]])
        >>> total, count = cpt_loss(logits, labels, [5, 1, 3, 6], [1, 2, 3, 4], decay=0.9)
        >>> round(float(total / jnp.log(8)), 4), float(count)  # 0.9 + 1 + 1
        (2.9, 3.0)

    Reference:
        Blau et al. 2024, arXiv:2410.17222.
    """
    batch = labels.shape[0]
    given = jnp.full(labels.shape, 4) if input_types is None else input_types
    last = -(-max(types) // 4) * 4  # the end of the last example
    given = jnp.where(given > 0, given + last, 0)
    before = (jnp.broadcast_to(jnp.array(row), (batch, len(row))) for row in (ids, types))
    # Labels move, not logits, as slicing `[B, n + T, V]` would copy it; the last one is no label.
    targets, kinds = (
        jnp.roll(jnp.concatenate([row, rest], axis=1), -1, axis=1)
        for row, rest in zip(before, (labels, given), strict=True)
    )
    is_label = ((kinds > 0) & (kinds % 4 == 0)).at[:, -1].set(False)
    counted = is_label & (targets != ignore)
    chosen = jnp.take_along_axis(logits, jnp.where(counted, targets, 0)[..., None], axis=-1)
    wide = logits.astype(jnp.float32)
    losses = jax.nn.logsumexp(wide, axis=-1) - chosen[..., 0].astype(jnp.float32)
    weights = decay ** _rank(jnp.where(is_label, kinds, 0)).astype(jnp.float32)
    return jnp.sum(losses * weights * counted), jnp.sum(counted, dtype=jnp.float32)


def _rank(values: Array) -> Array:
    """For each entry how many different values in its row are greater."""
    order = jnp.argsort(-values, axis=1)
    falling = jnp.take_along_axis(values, order, axis=1)
    steps = jnp.pad(jnp.diff(falling, axis=1) != 0, ((0, 0), (1, 0)))
    return jnp.put_along_axis(
        jnp.zeros_like(values), order, jnp.cumsum(steps, axis=1), axis=1, inplace=False
    )
