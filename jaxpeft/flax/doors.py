"""`transform` for linen modules, nnx modules and plain functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import linen, nnx

from jaxpeft.core.method import at_boundaries
from jaxpeft.core.transform import Tuned
from jaxpeft.core.transform import transform as transform_function
from jaxpeft.flax.linen import linen_function
from jaxpeft.flax.nnx import nnx_function


def transform(model: Any, tuning: Any, *, strict: bool = False) -> Tuned:
    """A tuned version of a model, as pure functions; the model and its params stay as they are.

    Args:
        model: a linen module (params: the variables that `module.apply` takes), an nnx module
            (params: the `nnx.State` of `nnx.split`), or a function of `(params, *inputs)`.
        tuning: a method such as `lora(8)`, `rules(...)` or `chain(...)`.
        strict: raise `MaterializeError` where a tuned weight would become dense.

    Returns:
        `Tuned`, with `init`, `apply`, `merge`, `trainable` and `sites`. `apply` has the outputs and
        the keyword arguments of the model's own call: `method=`, `rngs=` and `mutable=` for linen;
        for nnx `method=`, and `mutable=True` (or a filter) for `(outputs, state)`.

    Raises:
        TypeError: if `model` is none of the three.

    Example:
        >>> import jax, jax.numpy as jnp, flax.linen as nn, jaxpeft as jp
        >>> model, x = nn.Dense(3), jnp.ones((2, 4))
        >>> params = model.init(jax.random.key(0), x)
        >>> tuned = jp.transform(model, jp.lora(2))
        >>> adapter = tuned.init(jax.random.key(1), params, x)
        >>> bool((tuned.apply(adapter, params, x) == model.apply(params, x)).all())
        True
    """
    fn = as_function(model, tapped=at_boundaries(tuning))
    return transform_function(fn, tuning, strict=strict, head=getattr(model, "output_head", None))


def as_function(model: Any, *, tapped: bool = False) -> Callable[..., Any]:
    """A model as a pure function of `(params, *inputs, **kwargs)`, its modules tapped if asked."""
    if isinstance(model, linen.Module):
        return linen_function(model, tapped=tapped)
    if isinstance(model, nnx.Module):
        return nnx_function(model, tapped=tapped)
    if callable(model):
        return model
    raise TypeError(
        f"a model is a linen module, an nnx module or a function f(params, *inputs), got {model!r}."
    )
