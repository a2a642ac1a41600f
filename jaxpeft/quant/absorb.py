"""Updates that a packed weight takes in without rounding: those that are the same over its blocks.

QALoRA's update is constant over groups of inputs, so it moves the zero points of integer formats.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.einsum import Einsum
from jaxpeft.core.labels import View
from jaxpeft.core.structured import Sum
from jaxpeft.quant.formats.host import on_device
from jaxpeft.quant.formats.integer import Integer, shifted
from jaxpeft.quant.offload import fetched
from jaxpeft.quant.weight import QuantizedWeight, wrap

Array = jax.Array


def absorb(weight: Any, base: Any) -> QuantizedWeight | None:
    """A tuned weight `base + updates` as `base` with other zero points; None if it cannot be."""
    fmt = on_device(base.format) if isinstance(base, QuantizedWeight) else None
    if not isinstance(fmt, Integer):
        return None
    first, *updates = _parts(weight)
    if first is not base or fmt.indexed or base.tail:
        return None
    found = [_over_blocks(update, base, fmt) for update in updates]
    known = [part for part in found if part is not None]
    if len(known) < len(found):
        return None
    packed, fmt = shifted(fetched(base).packed, fmt, sum(known, jnp.float32(0)))
    return wrap(packed, fmt, base.shape, axes=base.axes, dtype=base.dtype, compute=base.compute)


def _parts(weight: Any) -> list[Any]:
    if not isinstance(weight, Sum):
        return [weight]
    return [part for whole in weight.parts for part in _parts(whole)]


def _over_blocks(update: Any, base: QuantizedWeight, fmt: Integer) -> Array | None:
    """An update that is constant over blocks, `(*stack, in / block, out)`; None if it is not."""
    if not isinstance(update, Einsum):
        return None
    *stack, inputs, outputs = base.packed_shape
    block = fmt.block or inputs
    views = (
        View("transpose", (tuple(axis for group in base.axes for axis in group),)),
        View("reshape", ((*stack, inputs, outputs),)),
        View("reshape", ((*stack, inputs // block, block, outputs),)),
    )
    moved: Any = update
    for view in views:
        moved = moved and moved.view(view)
    if not isinstance(moved, Einsum):
        return None
    *before, within, last = moved.layout.axes
    if any(set(within) & set(labels) for labels in moved.owned):
        return None
    small = moved.layout.with_axes((*before, last))
    return dataclasses.replace(moved, layout=small).materialize(jnp.float32)
