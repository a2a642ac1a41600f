r"""Adam whose two moments are bytes: block-wise 8-bit optimizer state.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

in float32. Between steps a moment is `table[code] * absmax`, with one absmax for each block of 256
elements in row-major order.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxpeft.core.sharding import automatic, placed_as, spread
from jaxpeft.quant.formats.dynamic import BLOCK, codes_of, decode_dynamic, dynamic_table
from jaxpeft.train.chunks import in_chunks

Array = jax.Array
MIN_SIZE = 4096
BYTES = 4


class Moment(NamedTuple):
    """A moment in bytes, of rows `(..., n)` of whole blocks: those of a leaf, or all of it.

    A leaf whose last axis is not whole blocks is one array `(blocks, 256)`, filled up with zeros.

    Attributes:
      codes: uint32 `(..., n / 4)`, four codes each, the first one in the lowest byte: `view` them
        as uint8 in numpy. A TPU moves words between its memory and the host's, but not bytes.
      absmax: float32 `(..., n / 256)`, the largest magnitude of each block.
    """

    codes: Any
    absmax: Any


class ScaleByAdam8bitState(NamedTuple):
    """State of `scale_by_adam8bit`.

    Attributes:
      count: int32 scalar, updates made.
      mu: first moments, a `Moment` in place of each leaf, or float32 in place of a small one.
      nu: second moments, likewise.
    """

    count: Array  # type: ignore[assignment]
    mu: Any
    nu: Any


def scale_by_adam8bit(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, min_size: int = MIN_SIZE
) -> optax.GradientTransformation:
    """Adam's direction from moments that are kept in 8 bits: 2.03 bytes a parameter, not 8.

    The moments of a step are unpacked, updated and used in float32, a chunk at a time, and then
    rounded to the nearest of 256 values of the dynamic map (signed for `m`, unsigned for `v`), as
    bitsandbytes does. But a `v` that is not 0 is not rounded to 0, which would make steps explode
    where gradients within a block differ by a factor of a thousand. Updates are float32, also for
    leaves of a narrower dtype.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      min_size: leaves of fewer elements keep float32 moments.

    Returns:
      An optax transformation.

    Raises:
      ValueError: if a decay is not in `[0, 1)`, or `eps` or `min_size` is negative.

    Example:
      >>> params = {"w": jnp.ones((32, 256)), "b": jnp.ones(8)}
      >>> state = scale_by_adam8bit().init(params)
      >>> state.mu["w"].codes.shape, state.mu["w"].absmax.shape, state.mu["b"].dtype
      ((32, 64), (32, 1), dtype('float32'))

    Reference:
      Dettmers et al. 2021, arXiv:2110.02861; Kingma and Ba 2014, arXiv:1412.6980.
    """
    _check(b1, b2, eps, min_size)

    def init(params: Any) -> ScaleByAdam8bitState:
        def fresh(signed: bool) -> Any:
            return jax.tree.map(lambda x: _fresh(x, signed, min_size), params)

        return ScaleByAdam8bitState(jnp.zeros((), jnp.int32), fresh(True), fresh(False))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        count = optax.safe_increment(state.count)
        step = functools.partial(_leaf, count=count, b1=b1, b2=b2, eps=eps)
        found = jax.tree.map(step, updates, state.mu, state.nu)
        # Each leaf has become (direction, mu, nu): take them apart.
        steps, mu, nu = (
            jax.tree.map(lambda _, parts, i=i: parts[i], updates, found) for i in range(3)
        )
        return steps, ScaleByAdam8bitState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def adam8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    mask: Any = None,
    min_size: int = MIN_SIZE,
) -> optax.GradientTransformation:
    """Adam, or AdamW with `weight_decay`, with 8-bit state; see `scale_by_adam8bit`.

    Args:
      learning_rate: a number, or a schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled, multiplied by the learning rate.
      mask: which leaves decay, as for `optax.adamw`.
      min_size: leaves of fewer elements keep float32 moments.

    Returns:
      An optax transformation.

    Raises:
      ValueError: as `scale_by_adam8bit`.

    Example:
      >>> optimizer, x = adam8bit(0.5, min_size=0), jnp.array([3.0, -4.0])
      >>> updates, state = optimizer.update(x, optimizer.init(x), x)
      >>> [round(float(u), 3) for u in updates]
      [-0.5, 0.5]

    Reference:
      Dettmers et al. 2021, arXiv:2110.02861.
    """
    return optax.chain(
        scale_by_adam8bit(b1, b2, eps, min_size=min_size),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _check(b1: Any, b2: Any, eps: Any, min_size: int) -> None:
    for name, decay in (("b1", b1), ("b2", b2)):
        if _is_known(decay) and not 0 <= decay < 1:
            raise ValueError(f"{name}={decay} is no decay. Use a number from 0 to below 1.")
    if (_is_known(eps) and eps < 0) or min_size < 0:
        raise ValueError(f"eps={eps} and min_size={min_size}: neither can be negative.")


def _is_known(number: Any) -> bool:
    """`optax.inject_hyperparams` traces what it injects."""
    return not isinstance(number, jax.core.Tracer)


def _fresh(x: Array, signed: bool, min_size: int) -> Moment | Array:
    if x.size < min_size:
        return jnp.zeros_like(x, jnp.float32)
    *lead, columns = _rows_shape(x)
    zero = np.full(BYTES, np.searchsorted(dynamic_table(signed), 0), np.uint8).view(np.uint32)
    codes = jnp.full((*lead, columns // BYTES), zero)
    absmax = jnp.zeros((*lead, columns // BLOCK))
    return Moment(*(placed_as(array, spread(x, array.shape)) for array in (codes, absmax)))


def _leaf(g: Array, mu: Any, nu: Any, *, count: Array, b1: float, b2: float, eps: float) -> Any:
    """The direction and the two moments of one leaf after a step."""

    def adam(g: Array, m: Array, v: Array, unbias: Any) -> Any:
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * (g * g)
        return m / unbias[0] / (jnp.sqrt(v / unbias[1]) + eps), m, v

    def step(arrays: Any, others: Any, unbias: Any) -> Any:
        g, *moments = arrays
        mu, nu = Moment(*moments[:2]), Moment(*moments[2:])
        u, m, v = adam(g, _decode(mu, True), _decode(nu, False), unbias)
        return [u, *_encode(m, True), *_encode(v, False)]

    g, unbias = g.astype(jnp.float32), [_bias(b1, count), _bias(b2, count)]
    if not isinstance(mu, Moment):
        return adam(g, mu, nu, unbias)
    rows = automatic(_rows, spread(g, _rows_shape(g)), g)
    u, *moments = in_chunks(step, [rows, *mu, *nu], scalars=unbias)
    u = automatic(functools.partial(_unrows, g.shape), spread(g, g.shape), u)
    return u, Moment(*moments[:2]), Moment(*moments[2:])


def _bias(decay: Any, count: Array) -> Array:
    """`1 - decay^count`; the power is so close to 1 at first that the difference loses digits."""
    log: Any = jnp.log(decay) if isinstance(decay, jax.Array) else _log(decay)
    return -jnp.expm1(count.astype(jnp.float32) * log)


def _log(decay: float) -> float:
    return math.log(decay) if decay else -math.inf


def _rows_shape(x: Array) -> tuple[int, ...]:
    whole = x.ndim and x.shape[-1] % BLOCK == 0
    return x.shape if whole else (-(-x.size // BLOCK), BLOCK)


def _rows(x: Array) -> Array:
    """A leaf as rows of whole blocks; in row-major order, with zeros behind, if it has none."""
    shape = _rows_shape(x)
    if shape == x.shape:
        return x
    return jnp.pad(x.reshape(-1), (0, math.prod(shape) - x.size)).reshape(shape)


def _unrows(shape: tuple[int, ...], rows: Array) -> Array:
    """The inverse of `_rows`."""
    return rows if rows.shape == shape else rows.reshape(-1)[: math.prod(shape)].reshape(shape)


# Codes and values are made element by element in the leaf's shape, so that the compiler splits them
# over an auto mesh as it does the leaf.
def _spread(absmax: Array) -> Array:
    """The absmax of each element's block."""
    each = jnp.broadcast_to(absmax[..., None], (*absmax.shape, BLOCK))
    return each.reshape(*absmax.shape[:-1], -1)


def _encode(x: Array, signed: bool) -> Moment:
    absmax = jnp.max(jnp.abs(x.reshape(*x.shape[:-1], -1, BLOCK)), axis=-1)
    codes = codes_of(x, _spread(absmax), signed=signed)
    if not signed:
        codes = jnp.where(x > 0, jnp.maximum(codes, 1), codes)
    codes = codes.reshape(*x.shape[:-1], -1, BYTES)
    return Moment(lax.bitcast_convert_type(codes, jnp.uint32), absmax)


def _decode(moment: Moment, signed: bool) -> Array:
    codes = lax.bitcast_convert_type(moment.codes, jnp.uint8)
    codes = codes.reshape(*codes.shape[:-2], -1)
    return decode_dynamic(codes, _spread(moment.absmax), signed=signed)
