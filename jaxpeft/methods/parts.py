"""Pieces that methods on activations share: what they read, norms, dropout, activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.site import Site
from jaxpeft.core.tap import Here, kind_per_head

Array = jax.Array

_MORE: dict[str, Callable[[Array], Array]] = {
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def activation_named(activation: str | Callable[[Array], Array]) -> tuple[Callable[..., Any], str]:
    """The function, and its name: that in `jax.nn` where it is one of those."""
    if isinstance(activation, str):
        found = _MORE.get(activation) or getattr(jax.nn, activation, None)
        if not callable(found):
            raise ValueError(
                f"activation={activation!r} is not in jax.nn. Use 'relu', 'gelu', 'gelu_exact', ..."
            )
        return found, activation
    name = getattr(activation, "__name__", repr(activation))
    if getattr(jax.nn, name, None) is activation:
        return activation, name
    return activation, f"{getattr(activation, '__module__', '?')}.{name}"


def has_features(site: Site) -> bool:
    """Whether it is a call boundary with features last, `(..., features)`, not one of heads."""
    return site.boundary and not kind_per_head(site.path)


def widths(site: Site) -> dict[str, int]:
    """The activations that a method may read at a boundary, and their widths."""
    return {"x": site.shape[-1], **dict(site.sources)}


def first_there(wanted: Sequence[str], there: Any, place: str) -> str:
    """The first of the `wanted` activations that a place has."""
    for name in wanted:
        if name in there:
            return name
    shown = ", ".join(map(repr, wanted))
    raise ValueError(
        f"the method at {place!r} reads {shown}, but what can be read there is "
        f"{', '.join(map(repr, there))}. Give one of those, or choose another boundary."
    )


def value_at(name: str, x: Array, here: Here) -> Array:
    """The activation `name` at a boundary whose value is `x` by now.

    The sum with the stream and its norm are made of `x` as the methods before this one left it.
    The norm is that of the model, whose parameters the boundary carries as `norm_scale`,
    `norm_bias` and `norm_eps`; a boundary without them gives the norm of its own value.
    """
    sources = here.sources
    if name == "x":
        return x
    if name == "sum" and "stream" in sources:
        return sources["stream"] + x
    if name == "norm" and {"stream", "norm_scale", "norm_bias", "norm_eps"} <= sources.keys():
        scale, bias, eps = (sources[f"norm_{part}"] for part in ("scale", "bias", "eps"))
        return layer_norm(sources["stream"] + x, scale, bias, eps)
    return sources[name]


def layer_norm(x: Array, scale: Array, bias: Array, eps: Any = 1e-5) -> Array:
    """`scale * (x - mean(x)) / sqrt(var(x) + eps) + bias`, in float32, in the dtype of `x`."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt((wide * wide).mean(axis=-1, keepdims=True) + eps)
    return (wide * scale + bias).astype(x.dtype)


def dropped(x: Array, rate: float, key: Array | None, shape: Any = None) -> Array:
    """`x` with a share of its entries zero and the others larger; `shape` is that of the mask."""
    if key is None or not rate:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape if shape is None else shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


def folded(key: Array | None, number: int) -> Array | None:
    """A key of its own for one of several uses."""
    return None if key is None else jax.random.fold_in(key, number)


def check_share(**rates: float) -> None:
    for name, rate in rates.items():
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"{name}={rate} is not a share. Use 0 <= {name} < 1.")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is none of {', '.join(map(repr, choices))}.")
