"""The networks that compute the prompt of P-tuning: an MLP, behind an LSTM or not."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpeft.core.method import Leaves

Array = jax.Array


def perceptron(key: Array, widths: tuple[int, ...], dtype: Any) -> Leaves:
    """Fresh linear layers of these widths, started as torch starts them."""
    sizes = zip(widths, widths[1:], strict=False)
    layers = {}
    for i, (inner, outer) in enumerate(sizes):
        one, two = jax.random.split(jax.random.fold_in(key, i))
        layers[f"kernel_{i}"] = _uniform(one, (inner, outer), inner, dtype)
        layers[f"bias_{i}"] = _uniform(two, (outer,), inner, dtype)
    return layers


def bidirectional_lstm(key: Array, width: int, hidden: int, layers: int, dtype: Any) -> Leaves:
    """A fresh LSTM, started as torch starts it; directions and gates on axes of its leaves."""
    found = {}
    for i in range(layers):
        inner = 2 * hidden if i else width
        shapes: dict[str, tuple[int, ...]] = {
            "input": (2, inner, 4 * hidden),
            "state": (2, hidden, 4 * hidden),
            "gates": (2, 4 * hidden),
        }
        keys = jax.random.split(jax.random.fold_in(key, i), len(shapes))
        for at, (name, shape) in zip(keys, shapes.items(), strict=True):
            found[f"{name}_{i}"] = _uniform(at, shape, hidden, dtype)
    return found


def _uniform(key: Array, shape: tuple[int, ...], inputs: int, dtype: Any) -> Array:
    bound = 1 / math.sqrt(inputs)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def computed(leaves: Leaves) -> Array:
    """The prompt `(n, d)`."""
    x = leaves["embedding"]
    for i in range(sum(name.startswith("gates_") for name in leaves)):
        x = _bidirectional(x, *(leaves[f"{name}_{i}"] for name in ("input", "state", "gates")))
    last = sum(name.startswith("kernel_") for name in leaves) - 1
    for i in range(last + 1):
        x = x @ leaves[f"kernel_{i}"] + leaves[f"bias_{i}"]
        x = x if i == last else jax.nn.relu(x)
    return x


def _bidirectional(x: Array, kernel: Array, state: Array, bias: Array) -> Array:
    """The hidden states `(n, 2h)` of an LSTM over the rows of `x`, from both ends."""
    inputs = jnp.einsum("sni,sio->nso", jnp.stack([x, x[::-1]]), kernel) + bias

    def step(carry: tuple[Array, Array], inputs: Array) -> tuple[tuple[Array, Array], Array]:
        h, c = carry
        gates = inputs + jnp.einsum("sh,sho->so", h, state)
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros((2, state.shape[1]), x.dtype)
    _, found = lax.scan(step, (zero, zero), inputs)
    return jnp.concatenate([found[:, 0], found[::-1, 1]], axis=-1)
