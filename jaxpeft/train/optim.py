"""Learning-rate schedules and optimizers by name, thin over optax."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import optax

from jaxpeft.train.adam8bit import adam8bit

SCHEDULES = ("constant", "linear", "cosine")


def schedule(
    name: str, peak: float, steps: int, *, warmup: int = 0, end: float = 0.0
) -> optax.Schedule:
    """Linear warmup from 0 to `peak`, then constant, or linear or cosine decay to `end`.

    With `p = (t - warmup) / (steps - warmup)`: `linear` is `peak + (end - peak) p`, `cosine` is
    `end + (peak - end) (1 + cos(pi p)) / 2`; both stay at `end` after `steps`.

    Args:
      name: `"constant"`, `"linear"` or `"cosine"`.
      peak: the learning rate at the end of the warmup.
      steps: number of steps of the run, warmup included.
      warmup: number of warmup steps.
      end: the learning rate at `steps`; `"constant"` does not use it.

    Returns:
      An optax schedule, step -> learning rate.

    Raises:
      ValueError: for another name, or if `warmup` does not lie in `[0, steps]`.

    Example:
      >>> rate = schedule("linear", 1.0, steps=10, warmup=2)
      >>> [round(float(rate(t)), 3) for t in (0, 1, 2, 6, 10, 11)]
      [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]

    Reference:
      Cosine: Loshchilov and Hutter, 2017, https://arxiv.org/abs/1608.03983
    """
    if name not in SCHEDULES:
        raise ValueError(f"no schedule {name!r}. Use one of: {', '.join(SCHEDULES)}.")
    if not 0 <= warmup <= steps:
        raise ValueError(f"warmup={warmup} is outside [0, steps={steps}]. Use fewer warmup steps.")
    decay = max(steps - warmup, 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, end, decay),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay, end / peak if peak else 0.0),
    }[name]()
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def _sgd(rate: optax.ScalarOrSchedule, *, weight_decay: float) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum=0.9))


OPTIMIZERS: Mapping[str, Callable[..., optax.GradientTransformation]] = MappingProxyType(
    {"adamw": optax.adamw, "adamw8bit": adam8bit, "lion": optax.lion, "sgd": _sgd}
)
"""Name -> `(learning_rate, *, weight_decay) -> optax.GradientTransformation`."""


def optimizer(
    learning_rate: optax.ScalarOrSchedule,
    *,
    name: str = "adamw",
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """Clips the gradient's global norm, then applies a named optimizer.

    Args:
      learning_rate: a number, or a schedule.
      name: a key of `OPTIMIZERS`.
      weight_decay: decoupled, multiplied by the learning rate (coupled for `"sgd"`).
      clip_norm: the largest global norm that passes unchanged; None for no clipping.

    Returns:
      An optax transformation. Any other optax transformation works in its place.

    Raises:
      ValueError: for a name that is not in `OPTIMIZERS`.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = optimizer(0.1, name="sgd", clip_norm=1.0)
      >>> x = jnp.array([3.0, 4.0])
      >>> [round(float(u), 3) for u in tx.update(x, tx.init(x), x)[0]]  # norm 5 becomes 1
      [-0.06, -0.08]
    """
    if name not in OPTIMIZERS:
        raise ValueError(
            f"no optimizer {name!r}. Use one of: {', '.join(OPTIMIZERS)}; or pass an optax "
            "transformation of your own where this function's result goes."
        )
    rule = OPTIMIZERS[name](learning_rate, weight_decay=weight_decay)
    if clip_norm is None:
        return rule
    return optax.chain(optax.clip_by_global_norm(clip_norm), rule)
