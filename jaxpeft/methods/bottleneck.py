r"""Bottleneck adapters: a small two-layer network behind a module.

h' = h + up(f(down(h))),   down: d -> m,  up: m -> d
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.method import Leaves, Method
from jaxpeft.core.site import Site
from jaxpeft.core.tap import Here


def bottleneck(
    width: int,
    *,
    activation: str | Callable[[jax.Array], jax.Array] = "relu",
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Method:
    """A sequential bottleneck adapter: `h' = h + up(f(down(h)))`.

    Leaves: `down` (stack..., width, d) normal with standard deviation 0.02, `down_bias` (stack...,
    width), `up` (stack..., width, d) and `up_bias` (stack..., d) zero: `width * (2 d + 1) + d`
    parameters a layer. A fresh adapter changes nothing. It works at call boundaries: rules name a
    module and a side, "**/mlp:out" or "**/attn:in".

    Args:
        width: of the bottleneck, `m`; AdapterHub's reduction factor is `d / m`.
        activation: `f`, a function or the name of one in `jax.nn`. Files keep the name, so an
            adapter with a function of your own is loaded with `tuning=`.
        dropout: share of `h` that the network does not see, when a key is given.
        dtype: of the leaves; products are computed in the dtype of `h`.

    Returns:
        A method. As a bare tuning it goes to the output of every module inside the model, which
        is seldom meant: name the modules by rules.

    Raises:
        ValueError: if `width` or `dropout` is out of range, or `activation` is no function's name.

    Example:
        >>> import jaxpeft as jp
        >>> tuning = jp.rules(("**/{attention,mlp}:out", jp.bottleneck(48)))

    Reference:
        Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00052.
    """
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"width={width!r} is not a width. Use a positive int: bottleneck(48).")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout={dropout} is not a share. Use 0 <= dropout < 1.")

    f, name = _named(activation)

    def start(key: jax.Array, site: Site, weight: Any) -> Leaves:
        del weight
        *stack, features = site.shape
        down = 0.02 * jax.random.normal(key, (*stack, width, features), dtype)
        return {
            "down": down,
            "down_bias": jnp.zeros((*stack, width), dtype),
            "up": jnp.zeros((*stack, width, features), dtype),
            "up_bias": jnp.zeros((*stack, features), dtype),
        }

    def call(site: Site, leaves: Leaves, h: jax.Array, here: Here) -> jax.Array:
        del site
        down, down_bias, up, up_bias = (
            leaves[name].astype(h.dtype) for name in ("down", "down_bias", "up", "up_bias")
        )
        seen = h
        if here.key is not None and dropout:
            keep = jax.random.bernoulli(here.key, 1.0 - dropout, h.shape)
            seen = jnp.where(keep, h / (1.0 - dropout), 0.0)
        return h + f(seen @ down.T + down_bias) @ up + up_bias

    def fits(site: Site) -> bool:
        return site.boundary

    return Method(
        "bottleneck",
        start,
        None,
        fits,
        lambda site: site.boundary and site.path.endswith(":out") and site.path != ":out",
        {"width": width, "activation": name, "dropout": dropout},
        call=call,
    )


def _named(activation: str | Callable[[jax.Array], jax.Array]) -> tuple[Callable[..., Any], str]:
    """The function, and its name: that in `jax.nn` where it is one of those."""
    if isinstance(activation, str):
        if not callable(getattr(jax.nn, activation, None)):
            raise ValueError(f"activation={activation!r} is not in jax.nn. Use 'relu', 'gelu', ...")
        return getattr(jax.nn, activation), activation
    name = getattr(activation, "__name__", repr(activation))
    if getattr(jax.nn, name, None) is activation:
        return activation, name
    return activation, f"{getattr(activation, '__module__', '?')}.{name}"
