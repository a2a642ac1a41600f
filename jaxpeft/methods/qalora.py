r"""QALoRA: LoRA on sums over groups of inputs, which merges into zero points exactly.

    W'[i] = W[i] + (alpha / rank) * (A B)[i // group]      y = x W + (alpha / rank) * (pool(x) A) B

`pool` adds up each group of `group` inputs, so the update is the same for all weights of a group.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.einsum import Einsum
from jaxpeft.core.labels import View
from jaxpeft.core.method import Leaves, Method, tune_weight
from jaxpeft.core.sharding import inherit
from jaxpeft.core.site import Site
from jaxpeft.core.structured import Structured, Sum
from jaxpeft.methods.inits import kaiming_uniform
from jaxpeft.methods.lora import Init, lora


def qalora(
    rank: int,
    alpha: float | None = None,
    *,
    group: int = 128,
    dropout: float = 0.0,
    init: Init = kaiming_uniform,
    dtype: Any = jnp.float32,
) -> Method:
    """Quantization-aware LoRA: `W'[i] = W[i] + (alpha / rank) * (A B)[i // group]`.

    Leaf `a` has axes (stack..., rank, in / group), `b` has (stack..., rank, out...) and starts at
    zero: `rank * (in / group + out)` parameters a layer. A fresh adapter changes nothing. Where the
    base is `jaxpeft.quant.int4` or `int8` in blocks that divide `group`, `jaxpeft.quant.merge`
    moves its zero points and leaves all codes as they are, without any error of rounding to codes.

    PEFT multiplies the means of groups by their number, in place of their size as the paper and
    this do: its `A` is `group**2 / in` times this one.

    Args:
        rank: of the update; at most in / group and out.
        alpha: numerator of the scale; `rank` by default, a scale of 1.
        group: inputs that are added up; a multiple of the base's block size.
        dropout: share of the entries of `x` that the update does not see, when a key is given.
        init: start of `A`, as for `lora`, with in / group inputs.
        dtype: of `A` and `B`.

    Returns:
        A method. As a bare tuning it goes to every linear map except looked-up tables and the
        output head that the model names.

    Raises:
        ValueError: if an option is out of range, or `group` does not divide the inputs of a site.

    Example:
        >>> import jaxpeft as jp, jax, jax.numpy as jnp
        >>> base = jp.quantize({"w": jnp.ones((64, 8))}, jp.quant.int4(32))
        >>> tuned = jp.transform(lambda p, x: x @ p["w"], jp.qalora(2, group=32))
        >>> adapter = tuned.init(jax.random.key(0), base, jnp.ones((1, 64)))
        >>> adapter["w"]["a"].shape
        (2, 2)

    Reference:
        Xu et al. 2023, arXiv:2309.14717.
    """
    if not isinstance(group, int) or group < 1:
        raise ValueError(
            f"group={group!r} is no size. Use the block size of the base, such as 128."
        )
    method = lora(rank, alpha, dropout=dropout, init=init, dtype=dtype)

    def start(key: jax.Array, site: Site, weight: Any) -> Leaves:
        leaves = method.init(key, _pooled(site, group), None)
        tuned(site, leaves, weight, None)  # raises where groups do not fit the axes
        both, ins, outs = site.axes("stack", "batch"), site.axes("in"), site.axes("out", "")
        return {
            "a": inherit(leaves["a"], weight, (*both, None, ins[0])),
            "b": inherit(leaves["b"], weight, (*both, None, *outs)),
        }

    def tuned(site: Site, leaves: Leaves, weight: Any, key: jax.Array | None) -> Sum:
        pooled = _pooled(site, group)
        small = jax.ShapeDtypeStruct(pooled.shape, weight.dtype)
        _, update = tune_weight(method, pooled, leaves, small, key).parts
        return Sum((weight, _spread(update, site, group)))

    fits = lambda site: site.linear and not site.table  # noqa: E731
    options = {**method.options, "group": group}
    del options["fused"]
    return Method("qalora", start, tuned, fits, fits, options)


def _pooled(site: Site, group: int) -> Site:
    """The site with one input for each group, and its axes in the order both, in, out."""
    both, ins, outs = site.axes("stack", "batch"), site.sizes("in"), site.axes("out", "")
    inputs = math.prod(ins)
    if inputs % group:
        raise ValueError(
            f"group={group} does not divide the {inputs} inputs of {site.path!r} {site.shape}. Use "
            "a size that does, or rules that leave this site out."
        )
    shape = (*(site.shape[i] for i in both), inputs // group, *(site.shape[i] for i in outs))
    roles = (*(site.roles[i] for i in both), "in", *(site.roles[i] for i in outs))
    return dataclasses.replace(site, shape=shape, roles=roles)


def _spread(update: Einsum, site: Site, group: int) -> Structured:
    """The update of a pooled site, the same for each input of a group, with the site's axes."""
    both, ins, outs = site.axes("stack", "batch"), site.axes("in"), site.axes("out", "")
    order = (*both, *ins, *outs)
    layout, (within,) = update.layout.fresh(group)
    axes = list(layout.axes)
    axes[len(both)] = (*axes[len(both)], within)
    whole = dataclasses.replace(update, layout=layout.with_axes(axes))
    apart = whole.view(View("reshape", (tuple(site.shape[axis] for axis in order),)))
    if apart is None:
        raise ValueError(
            f"groups of {group} inputs cross the input axes {site.sizes('in')} of {site.path!r}. "
            "Use a size that divides the last of them."
        )
    laid = apart.view(View("transpose", (tuple(order.index(axis) for axis in range(len(order))),)))
    assert laid is not None
    return laid
