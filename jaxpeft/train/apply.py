"""Adding updates to leaves, rounded to nearest or stochastically."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpeft.core.sharding import like

Array = jax.Array


def apply_updates(params: Any, updates: Any, key: Array | None = None) -> Any:
    """`params + updates`, each leaf in its own dtype.

    Bfloat16 has 8 bits of precision: an update below half of a leaf's last place, about
    `2**-9` of its value, is lost when it is rounded to nearest, however often it comes. With a key
    the sum `s` goes to one of its two neighbours `lo <= s <= hi`, to `hi` with probability
    `(s - lo) / (hi - lo)`, so that each update counts on average: `E[round(s)] = s`. Leaves of
    float32 or wider are added as without a key.

    Args:
      params: a tree of arrays.
      updates: a tree like it, from an optax transformation; best in float32.
      key: typed PRNG key, a new one each step; None rounds to nearest, as `optax.apply_updates`.

    Returns:
      A tree like `params`, in its dtypes.

    Raises:
      ValueError: with a key, if a leaf has a floating-point dtype of less than 16 bits.

    Example:
      >>> x, u = {"w": jnp.ones(1000, jnp.bfloat16)}, {"w": jnp.full(1000, 2.0**-10)}
      >>> float(apply_updates(x, u)["w"].astype(jnp.float32).mean())
      1.0
      >>> y = apply_updates(x, u, jax.random.key(0))["w"]
      >>> sorted(set(y.tolist())), abs(float(y.astype(jnp.float32).mean()) - 1 - 2**-10) < 2e-4
      ([1.0, 1.0078125], True)

    Reference:
      Gupta et al. 2015, arXiv:1502.02551; Zamirai et al. 2020, arXiv:2010.06192.
    """
    if key is None:
        return optax.apply_updates(params, updates)
    tree = jax.tree.structure(params)
    count = len(jax.tree.leaves(params))
    keys = jax.tree.unflatten(tree, [jax.random.fold_in(key, i) for i in range(count)])
    return jax.tree.map(_add, params, updates, keys)


def wide(dtype: Any) -> Any:
    """The dtype in which leaves of a dtype are updated, float32 or wider.

    Raises:
      ValueError: if it is a floating-point dtype of less than 16 bits.
    """
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16:
        raise ValueError(
            f"leaves of {jnp.dtype(dtype)} cannot be trained: their steps are larger than updates "
            "are. Cast them, as with jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapter)."
        )
    return jnp.promote_types(dtype, jnp.float32)


def _add(x: Array, u: Array, key: Array) -> Array:
    exact = x.astype(wide(x.dtype)) + u
    if exact.dtype == x.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        return exact.astype(x.dtype)
    near = exact.astype(x.dtype)
    off = exact - near.astype(exact.dtype)
    side = jnp.where(off > 0, jnp.inf, -jnp.inf).astype(x.dtype)
    other = jnp.nextafter(near, side)
    step = other.astype(exact.dtype) - near.astype(exact.dtype)
    noise = like(jax.random.uniform(key, x.shape), x)
    # Where the sum is not finite, so are these: the comparison is false and `near` stays.
    return jnp.where(noise * jnp.abs(step) < jnp.abs(off), other, near)
