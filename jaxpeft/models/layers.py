"""Layers that several models are made of."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

# By their names in config.json.
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


class LayerNorm(nnx.Module):
    """`y = scale * (x - mean(x)) / sqrt(var(x) + eps) + bias`, the moments in float32."""

    def __init__(self, shape, *, eps: float, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones(shape, dtype))
        self.bias = nnx.Param(jnp.zeros(shape, dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return self.normalize(x)

    def normalize(self, x: Array) -> Array:
        """The call itself, where no method that acts on activations works."""
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.scale[...] * wide.astype(x.dtype) + self.bias[...]
