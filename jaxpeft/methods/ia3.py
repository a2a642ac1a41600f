"""(IA)^3: learned scales on what linear maps return, or on what they are given.

W' = W * l,   y = (x W) * l   or   y = (x * l) W
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.method import Leaves, Method
from jaxpeft.core.scaled import Scaled
from jaxpeft.core.sharding import inherit
from jaxpeft.core.site import Site
from jaxpeft.core.tap import Here


def ia3(on: str = "out", *, dtype: Any = jnp.float32) -> Method:
    """(IA)^3: `W' = W * l`, with one scale an output or one an input.

    Leaf `l`, of ones: axes (stack..., out...) or (stack..., in...), so as many parameters a layer
    as the map has outputs or inputs. It is computed as `(x W) * l` or `(x * l) W`. A fresh adapter
    changes nothing. PEFT scales the outputs of keys and values, and the inputs of the second
    projection of the feedforward network.

    With "activations" it works at call boundaries, `h' = h * l` with `l` (stack..., features). A
    layer's bias is then scaled too, as PEFT does, but the adapter cannot be merged.

    Args:
        on: "out" for the axes of outputs, "in" for those of inputs (of a convolution, the channels:
            the axis beside that of the outputs), "activations" for call boundaries.
        dtype: of the leaf; products with it are rounded to the dtype of the activations.

    Returns:
        A method. As a bare tuning it goes to every linear map except looked-up tables and the
        output head that the model names; with "activations" it needs rules.

    Raises:
        ValueError: if `on` is none of the three.

    Example:
        >>> import jaxpeft as jp
        >>> tuning = jp.rules(
        ...     ("**/{k,v}_proj/kernel", ia3()),
        ...     ("**/down_proj/kernel", ia3("in")),
        ... )

    Reference:
        Liu et al. 2022, arXiv:2205.05638.
    """
    if on not in ("in", "out", "activations"):
        raise ValueError(f'on={on!r} is none of "out", "in" and "activations".')

    def start(key: jax.Array, site: Site, weight: Any) -> Leaves:
        del key
        axes = _axes(site, on)
        ones = jnp.ones([site.shape[axis] for axis in axes], dtype)
        return {"l": ones if site.boundary else inherit(ones, weight, axes)}

    def tuned(site: Site, leaves: Leaves, weight: Any, key: jax.Array | None) -> Scaled:
        del key
        return Scaled.along(weight, leaves["l"], _axes(site, on))

    def call(site: Site, leaves: Leaves, h: jax.Array, here: Here) -> jax.Array:
        del site, here
        return h * leaves["l"]

    if on == "activations":
        return Method("ia3", start, None, _is_boundary, lambda site: False, {"on": on}, call=call)
    return Method(
        "ia3",
        start,
        tuned,
        fits=lambda site: site.linear,
        bare=lambda site: site.linear and not site.table,
        options={"on": on},
    )


def _is_boundary(site: Site) -> bool:
    return site.boundary


def _axes(site: Site, on: str) -> tuple[int, ...]:
    """The axes that the scale lies along, those of layers and experts included."""
    if site.boundary:
        return tuple(range(len(site.shape)))
    side = site.axes("in") if on == "in" else site.axes("out", "")
    if on == "in" and "conv_general_dilated" in site.uses:
        (out,) = site.axes("out")
        side = tuple(sorted(side, key=lambda axis: abs(axis - out)))[:1]
    return tuple(sorted((*site.axes("stack", "batch"), *side)))
