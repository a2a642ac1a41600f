"""`transform` for linen modules, nnx modules and plain functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen, nnx

from jaxpeft.core.arguments import Names, argument_names
from jaxpeft.core.attention import mark_attention
from jaxpeft.core.method import at_boundaries, methods_of, resolve, together
from jaxpeft.core.site import Site
from jaxpeft.core.transform import Tuned
from jaxpeft.core.transform import transform as transform_function
from jaxpeft.flax.graph import nnx_function
from jaxpeft.flax.linen import linen_function
from jaxpeft.flax.mark import Marks


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
    head = getattr(model, "output_head", None)
    beside = getattr(model, "keys_take_prefix", False)
    fn = as_function(model, marks_for(model, tuning))
    names = argument_namer(model)
    return transform_function(fn, tuning, strict=strict, head=head, names=names, beside=beside)


def marks_for(model: Any, tuning: Any) -> Marks | None:
    """How a model must be marked for a tuning; None if it is not."""
    if not at_boundaries(tuning):
        return None
    needs = together([method.needs for method in methods_of(tuning)])
    provided = getattr(model, "keys_take_prefix", False)
    beside = {virtual.length for virtual in needs.virtual if virtual.beside(provided)}
    if len(beside) > 1:
        raise ValueError(f"prefixes have {sorted(beside)} virtual tokens. Give them one length.")
    return Marks(needs.grows, needs.attention, _Beside(tuning) if beside else None)


@dataclasses.dataclass(frozen=True, eq=False)
class _Beside:
    """The rows of a prefix beside the sequence, where the tuning has one."""

    tuning: Any

    def __call__(self, path: str, x: jax.Array) -> int:
        shape, roles = (1, *x.shape[-2:]), ("stack", "in", "in")  # how deep is not known here
        site = Site(path, shape, x.dtype.name, roles, uses=("call",))
        found = resolve(self.tuning, [site], whole=False)
        virtual = [v for method in found.values() for v in method.needs.virtual]
        return max((v.length for v in virtual if v.beside(True)), default=0)


def as_function(model: Any, marks: Marks | None = None) -> Callable[..., Any]:
    """A model as a pure function of `(params, *inputs, **kwargs)`, its modules marked if asked."""
    if isinstance(model, linen.Module):
        fn = linen_function(model, marks)
    elif isinstance(model, nnx.Module):
        fn = nnx_function(model, marks)
    elif callable(model):
        fn = model
    else:
        raise TypeError(
            "a model is a linen module, an nnx module or a function f(params, *inputs), got "
            f"{model!r}."
        )
    return mark_attention(fn) if marks and marks.attention else fn


def argument_namer(model: Any) -> Callable[[Mapping[str, Any]], tuple[str, ...]] | None:
    """The names of the positional arguments of a function, a module's call, or its `method`."""
    if isinstance(model, linen.Module | nnx.Module):
        return _Namer(type(model))
    return Names(argument_names(model)[1:]) if callable(model) else None


@dataclasses.dataclass(frozen=True)
class _Namer:
    module: type

    def __call__(self, kwargs: Mapping[str, Any]) -> tuple[str, ...]:
        method = kwargs.get("method") or self.module.__call__
        method = getattr(self.module, method) if isinstance(method, str) else method
        bound = hasattr(method, "__self__")
        return argument_names(method)[0 if bound else 1 :]
