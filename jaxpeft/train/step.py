"""One training step: gradients of the adapter alone, accumulated over micro-batches."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpeft.core.tree import HOLE, combine
from jaxpeft.train.apply import apply_updates, wide
from jaxpeft.train.loss import LossFn

# Folded into a step's key, for rounding; micro-batches fold in their indices, from 0 on.
ROUNDING = 2**31 - 1

Step = Callable[["State", Any, Any], tuple["State", "Metrics"]]
Evaluation = Callable[[Any, Any, Any], tuple[jax.Array, jax.Array]]


class State(NamedTuple):
    """All that changes during training.

    Attributes:
      adapter: the adapter's arrays, fixed leaves included.
      opt_state: optimizer state, of the trainable leaves only.
      step: int32 scalar, the number of updates made.
      key: typed PRNG key of the run; it never changes, each step folds its number in.
    """

    adapter: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array


class Metrics(NamedTuple):
    """What one step reports, float32 scalars.

    Attributes:
      loss: mean over the batch's target tokens, in nats, before the update.
      grad_norm: global norm of that mean's gradient, before clipping.
      tokens: number of target tokens in the batch.
    """

    loss: jax.Array
    grad_norm: jax.Array
    tokens: jax.Array


def _split(adapter: Any, trainable: Any) -> tuple[Any, Any]:
    """The trained leaves and the fixed ones, each with holes where the other has a leaf."""
    if trainable is None:
        trainable = jax.tree.map(lambda _: True, adapter)
    active = jax.tree.map(lambda x, t: x if t else HOLE, adapter, trainable)
    return active, jax.tree.map(lambda x, t: HOLE if t else x, adapter, trainable)


def init_state(
    adapter: Any,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    trainable: Any = None,
) -> State:
    """Makes the state before the first step.

    Args:
      adapter: any pytree of arrays; it is copied, because a step gives up its state's memory.
      optimizer: any optax transformation.
      key: typed PRNG key (`jax.random.key(seed)`) for dropout.
      trainable: a tree of bools like `adapter` (`tuned.trainable(adapter)`), False for leaves
        that stay fixed; None trains them all.

    Returns:
      The `State` at step 0.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> adapter = {"a": jnp.ones(2), "fixed": jnp.arange(3)}
      >>> state = init_state(adapter, optax.adam(1e-3), jax.random.key(0),
      ...                    trainable={"a": True, "fixed": False})
      >>> [x.shape for x in jax.tree.leaves(state.opt_state)]  # count, mu, nu: none for `fixed`
      [(), (2,), (2,)]
    """
    adapter = jax.tree.map(jnp.copy, adapter)
    opt_state = optimizer.init(_wide(_split(adapter, trainable)[0]))
    return State(adapter, opt_state, jnp.zeros((), jnp.int32), jax.random.clone(key))


def _wide(tree: Any) -> Any:
    """The leaves as the optimizer sees them: in float32 where they are narrower."""
    return jax.tree.map(lambda x: x.astype(wide(x.dtype)), tree)


def _micro_batches(batch: Any, n: int) -> Any:
    """Splits the leading axis in `n`, strided so that each device keeps its own rows."""

    def split(x: jax.Array) -> jax.Array:
        if x.shape[0] % n:
            raise ValueError(
                f"a batch of {x.shape[0]} rows cannot be split into micro_batches={n} equal parts. "
                f"Use a batch size that is a multiple of {n}."
            )
        return jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def _accumulate(
    grad_fn: Callable[..., Any], active: Any, batch: Any, key: jax.Array, n: int
) -> Any:
    """Sums `((total, count), grads)` of the micro-batches in float32."""
    if n == 1:
        return grad_fn(active, batch, key)

    def body(carry: Any, inputs: Any) -> tuple[Any, None]:
        index, micro = inputs
        out = grad_fn(active, micro, jax.random.fold_in(key, index))
        return jax.tree.map(lambda c, x: c + x.astype(c.dtype), carry, out), None

    f32 = lambda x: jnp.zeros_like(x, dtype=jnp.float32)  # noqa: E731
    zero = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(f32, active))
    return jax.lax.scan(body, zero, (jnp.arange(n), _micro_batches(batch, n)))[0]


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    trainable: Any = None,
    micro_batches: int = 1,
    stochastic_rounding: bool = False,
) -> Step:
    """Makes a jitted training step.

    The gradient is that of `sum_i total_i / sum_i count_i` over the micro-batches `i`: the mean
    over all target tokens, so the split changes nothing but float32 rounding (and the dropout
    masks, where there is dropout). Gradients exist for the trainable leaves only. Where the loss
    or its gradient is not finite the state comes back as it was, step number included, and
    `Metrics` tells; the caller decides. The optimizer computes in float32 for leaves that are
    narrower, and its sum with them is rounded once. State of the optimizer that is in host memory
    (see `offload`) goes back there.

    Args:
      loss_fn: `(adapter, params, batch, dropout_key) -> (total, count)`, see `causal_lm_loss`.
      optimizer: the transformation that `init_state` was given.
      trainable: the tree of bools that `init_state` was given.
      micro_batches: the batch's leading axis is split in that many parts, run one after another.
      stochastic_rounding: for leaves narrower than float32, see `apply_updates`; its key is the
        run's and the step's, so a run that is continued rounds as one that never stopped.

    Returns:
      `step(state, params, batch) -> (state, metrics)`. The state that goes in is donated: use
      the one that comes out.

    Raises:
      ValueError: at the call, if the leading axis is not a multiple of `micro_batches`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> def loss_fn(adapter, params, batch, dropout_key):
      ...     return jnp.sum((batch @ params + adapter["b"]) ** 2), jnp.float32(batch.shape[0])
      >>> optimizer = optax.sgd(0.25)
      >>> state = init_state({"b": jnp.zeros(())}, optimizer, jax.random.key(0))
      >>> step = make_step(loss_fn, optimizer, micro_batches=2)
      >>> state, metrics = step(state, jnp.ones(1), jnp.ones((4, 1)))
      >>> float(metrics.loss), float(metrics.grad_norm), float(state.adapter["b"])
      (1.0, 2.0, -0.5)
    """

    def step(state: State, params: Any, batch: Any) -> tuple[State, Metrics]:
        def total_and_count(active: Any, micro: Any, key: jax.Array) -> Any:
            return loss_fn(combine(active, fixed), params, micro, key)

        active, fixed = _split(state.adapter, trainable)
        grad_fn = jax.value_and_grad(total_and_count, has_aux=True)
        key = jax.random.fold_in(state.key, state.step)
        (total, count), grads = _accumulate(grad_fn, active, batch, key, micro_batches)
        scale = 1.0 / jnp.maximum(count, 1.0)
        grads = jax.tree.map(lambda g: g * scale, _wide(grads))
        metrics = Metrics(total * scale, optax.tree.norm(grads), count)
        finite = jnp.isfinite(metrics.loss) & jnp.isfinite(metrics.grad_norm)

        def update(active: Any, opt_state: Any, grads: Any) -> tuple[Any, Any]:
            updates, opt_state = optimizer.update(grads, opt_state, _wide(active))
            rounding = jax.random.fold_in(key, ROUNDING) if stochastic_rounding else None
            return apply_updates(active, updates, rounding), opt_state

        def skip(active: Any, opt_state: Any, grads: Any) -> tuple[Any, Any]:
            return active, opt_state

        active, opt_state = jax.lax.cond(finite, update, skip, active, state.opt_state, grads)
        count = state.step + finite
        return State(combine(active, fixed), opt_state, count, state.key), metrics

    return jax.jit(step, donate_argnums=0)


def make_evaluation(loss_fn: LossFn) -> Evaluation:
    """Makes the jitted `(adapter, params, batch) -> (total, count)`, without dropout.

    Args:
      loss_fn: as for `make_step`; its `dropout_key` is None.

    Returns:
      The function that `evaluate` takes.
    """
    return jax.jit(lambda adapter, params, batch: loss_fn(adapter, params, batch, None))


def evaluate(evaluation: Evaluation, adapter: Any, params: Any, batches: Iterable[Any]) -> float:
    """Mean loss over all target tokens of `batches`, in nats.

    Args:
      evaluation: from `make_evaluation`.
      adapter: the adapter.
      params: the base weights.
      batches: any iterable of batches, for instance one epoch of `Batches`.

    Returns:
      `sum(totals) / sum(counts)`.

    Raises:
      ValueError: if there is no target token in them.

    Example:
      >>> evaluate(lambda adapter, params, batch: (sum(batch), len(batch)), {}, {}, [[1], [2, 6]])
      3.0
    """
    sums = [evaluation(adapter, params, batch) for batch in batches]
    count = sum(float(count) for _, count in sums)
    if not count:
        raise ValueError(
            f"{len(sums)} evaluation batches hold no target token, so there is no mean loss. "
            "Give at least one batch with a completion."
        )
    return sum(float(total) for total, _ in sums) / count
