"""The stateful door for Flax nnx: a module with an adapter, to train in place."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from jaxpeft.core.transform import Adapter, Tuned
from jaxpeft.flax.doors import as_function, marks_for, transform


class AdapterParam(nnx.Param):
    """A leaf of an adapter: `nnx.Optimizer(model, tx, wrt=AdapterParam)` trains these alone."""


class Attached(nnx.Module):
    """A module with an adapter, called like the module itself. Made by `attach`."""

    def __init__(self, base: nnx.Module, tuned: Tuned, adapter: Adapter):
        self.base = base
        self.tuned = tuned
        self.structure = jax.tree.structure(adapter)
        self.leaves = nnx.data(jax.tree.map(AdapterParam, dict(adapter)))

    @property
    def adapter(self) -> Adapter:
        """The adapter as it is now, for `save`, `merge` and the pure functions."""
        leaves = jax.tree.leaves(self.leaves, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        return jax.tree.unflatten(self.structure, [leaf[...] for leaf in leaves])

    def __call__(self, *inputs: Any, dropout_key: Any = None, **kwargs: Any) -> Any:
        # The graph as it is now: `train()` and `eval()` change it.
        fn = as_function(self.base, marks_for(self.base, self.tuned.tuning))
        state = nnx.state(self.base)
        out, state = dataclasses.replace(self.tuned, fn=fn).apply(
            self.adapter, state, *inputs, dropout_key=dropout_key, mutable=_MUTABLE, **kwargs
        )
        nnx.update(self.base, state)
        return out


_MUTABLE = nnx.Not(nnx.Param)


def attach(
    model: nnx.Module,
    tuning: Any,
    *inputs: Any,
    key: jax.Array,
    strict: bool = False,
    **kwargs: Any,
) -> Attached:
    """An adapter on an nnx module that is trained in place: the stateful door.

    The same results as the pure functions: a call is `tuned.apply`, and what the base changes in
    its own state (batch statistics, RNG counters) stays in the base.

    Args:
        model: the base module; it is kept, not copied, and its `nnx.Param`s are never changed.
        tuning: a method, `rules(...)` or `chain(...)`.
        *inputs: example inputs of the call.
        key: PRNG key of the fresh adapter.
        strict: raise where a tuned weight would become dense.
        **kwargs: keyword arguments of the example call.

    Returns:
        An nnx module whose new leaves are `AdapterParam` variables.

    Example:
        >>> import jax.numpy as jnp, optax, jaxpeft as jp
        >>> x = jnp.ones((2, 4))
        >>> model = jp.nnx.attach(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jp.lora(2), x,
        ...                       key=jax.random.key(0))
        >>> optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=jp.nnx.AdapterParam)
        >>> wrt = nnx.DiffState(0, jp.nnx.AdapterParam)
        >>> grads = nnx.grad(lambda model: (model(x) ** 2).sum(), argnums=wrt)(model)
        >>> _ = optimizer.update(model, grads)
    """
    tuned = transform(model, tuning, strict=strict)
    adapter = tuned.init(key, nnx.state(model), *inputs, **kwargs)
    return Attached(model, tuned, adapter)
