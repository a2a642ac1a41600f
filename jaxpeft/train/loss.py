"""Next-token cross-entropy over the tokens that are to be learned."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpeft.train.batches import Batch

LossFn = Callable[[Any, Any, Any, jax.Array | None], tuple[jax.Array, jax.Array]]
"""`loss_fn(adapter, params, batch, dropout_key) -> (total, count)`, both float32 scalars."""


def cross_entropy(
    logits: jax.Array, labels: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sums the cross-entropy of the masked-in labels, and counts them.

    `total = sum_t mask_t (logsumexp(logits_t) - logits_t[labels_t])`, `count = sum_t mask_t`;
    the mean loss in nats per token is `total / count`. Sums, not means, so that batches with
    different numbers of labels add up exactly.

    Args:
      logits: `[..., vocabulary]`, any float dtype; computed in float32.
      labels: `[...]` integers; their values do not matter where `mask` is False.
      mask: `[...]`, True where the label counts.

    Returns:
      `(total, count)`, two float32 scalars.

    Example:
      >>> import jax.numpy as jnp
      >>> total, count = cross_entropy(
      ...     jnp.zeros((3, 4)), jnp.array([0, 1, 2]), jnp.array([True, True, False]))
      >>> round(float(total / count), 4), float(count)  # log(4)
      (1.3863, 2.0)
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    total = jnp.sum(jnp.where(mask, losses, 0.0))
    return total, jnp.sum(mask, dtype=jnp.float32)


def next_token_loss(
    logits: jax.Array, tokens: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each target token under the logits one position before it.

    Args:
      logits: `[batch, length, vocabulary]`, what the model says of `tokens`.
      tokens: `[batch, length]` integers.
      targets: `[batch, length]`, True for the tokens to learn. The first token of a row has
        nothing before it and never counts.

    Returns:
      `(total, count)` as in `cross_entropy`.

    Example:
      >>> import jax.numpy as jnp
      >>> tokens = jnp.array([[5, 6, 7]])
      >>> logits = 100.0 * jax.nn.one_hot(jnp.array([[6, 7, 0]]), 8)  # right both times
      >>> total, count = next_token_loss(logits, tokens, jnp.array([[True, True, True]]))
      >>> float(total), float(count)
      (0.0, 2.0)
    """
    # The labels move, not the logits: slicing `[batch, length, vocabulary]` would copy it.
    labels = jnp.roll(tokens, -1, axis=1)
    mask = jnp.roll(targets, -1, axis=1).at[:, -1].set(False)
    return cross_entropy(logits, labels, mask)


def causal_lm_loss(apply: Callable[..., jax.Array]) -> LossFn:
    """Makes the loss function of a causal language model from `Tuned.apply`.

    Args:
      apply: `apply(adapter, params, tokens, *, mask, dropout_key) -> logits`.

    Returns:
      `loss_fn(adapter, params, batch, dropout_key) -> (total, count)` for `make_step` and
      `make_evaluation`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxpeft.train import Batch
      >>> def apply(adapter, params, tokens, *, mask, dropout_key):
      ...     return adapter["table"][tokens]
      >>> rows = jnp.array([[1, 2, 3]])
      >>> batch = Batch(tokens=rows, mask=rows > 0, targets=rows > 1)
      >>> total, count = causal_lm_loss(apply)({"table": jnp.zeros((4, 4))}, {}, batch, None)
      >>> round(float(total / count), 4)
      1.3863
    """

    def loss_fn(
        adapter: Any, params: Any, batch: Batch, dropout_key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        logits = apply(adapter, params, batch.tokens, mask=batch.mask, dropout_key=dropout_key)
        return next_token_loss(logits, jnp.asarray(batch.tokens), jnp.asarray(batch.targets))

    return loss_fn
