r"""LoRA: low-rank adaptation.

    W' = W + (alpha / rank) * A B        y = x W + (alpha / rank) * (dropout(x) A) B

`A` takes the axes of `W` that products contract, `B` those that they keep; stack and expert axes
are on both, so that each layer and each expert has its own pair. Both are stored with the rank in
front: the gradient of `A` is then `h^T x`, which is several times faster than `x^T h` on a CPU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.einsum import Einsum
from jaxpeft.core.labels import Layout
from jaxpeft.core.method import Leaves, Method
from jaxpeft.core.sharding import inherit
from jaxpeft.core.site import Site
from jaxpeft.core.structured import Sum
from jaxpeft.methods.inits import kaiming_uniform

Init = Callable[[jax.Array, tuple[int, ...], int, int], jax.Array]


def lora(
    rank: int,
    alpha: float | None = None,
    *,
    dropout: float = 0.0,
    fused: Sequence[int] = (),
    init: Init = kaiming_uniform,
    dtype: Any = jnp.float32,
) -> Method:
    """Low-rank adaptation: `W' = W + (alpha / rank) * A B`.

    Leaf `a` has axes (stack..., rank, in...) and starts from `init`, `b` has (stack..., rank,
    out...) and starts at zero: `rank * (in + out)` parameters a layer. Embedding tables swap the
    starts, as PEFT does. The update is computed as `(x A) B` in the dtype of `x`.

    Args:
        rank: of the update; at most the smaller side of every site.
        alpha: numerator of the scale; `rank` by default, a scale of 1.
        dropout: share of the entries of `x` that the update does not see, when a key is given.
        fused: axes of the weight along which several maps lie in one kernel, such as q, k and v;
            each map gets an `A` and `B` of its own, of this rank.
        init: start of `A`: `kaiming_uniform`, `gaussian`, or a function of that form.
        dtype: of `A` and `B`; float32 also over a bfloat16 base.

    Returns:
        A method. As a bare tuning it goes to every linear map except looked-up tables and the
        output head that the model names.

    Raises:
        ValueError: if `rank` or `dropout` is out of range, here or at a site.

    Example:
        >>> import jaxpeft as jp, jax, jax.numpy as jnp
        >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
        >>> tuned = jp.transform(lambda params, x: x @ params["w"], jp.lora(2, alpha=4))
        >>> adapter = tuned.init(jax.random.key(0), params, x)
        >>> adapter["w"]["a"].shape, adapter["w"]["b"].shape
        ((2, 4), (2, 3))

    Reference:
        Hu et al. 2021, arXiv:2106.09685.
    """
    scale = _checked_alpha(rank, alpha) / _checked_rank(rank)
    options = _options(rank, alpha, dropout, fused)
    return _low_rank(rank, scale, dropout, tuple(fused), init, dtype, options)


def rslora(
    rank: int,
    alpha: float | None = None,
    *,
    dropout: float = 0.0,
    fused: Sequence[int] = (),
    init: Init = kaiming_uniform,
    dtype: Any = jnp.float32,
) -> Method:
    """Rank-stabilized LoRA: `W' = W + (alpha / sqrt(rank)) * A B`; else as `lora`.

    Example:
        >>> rslora(16, alpha=8).options["scale"]
        2.0

    Reference:
        Kalajdzievski 2023, arXiv:2312.03732.
    """
    scale = _checked_alpha(rank, alpha) / math.sqrt(_checked_rank(rank))
    options = {**_options(rank, alpha, dropout, fused), "rslora": True}
    return _low_rank(rank, scale, dropout, tuple(fused), init, dtype, options)


def is_plain(method: Method) -> bool:
    """Whether a method is `lora` or `rslora` as made here, of all layers and nothing else."""
    known = {*_options(1, None, 0.0, ()), "scale", "rslora"}
    return method.name == "lora" and set(method.options) <= known


def _options(
    rank: int, alpha: float | None, dropout: float, fused: Sequence[int]
) -> dict[str, Any]:
    shown = rank if alpha is None else alpha
    return {"rank": rank, "alpha": shown, "dropout": dropout, "fused": list(fused)}


def _low_rank(
    rank: int,
    scale: float,
    dropout: float,
    fused: tuple[int, ...],
    init: Init,
    dtype: Any,
    options: dict[str, Any],
) -> Method:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout={dropout} is not a share. Use 0 <= dropout < 1.")

    def start(key: jax.Array, site: Site, weight: Any) -> Leaves:
        site = unfused(site, fused)
        _check_rank(rank, site)
        a_axes, b_axes = (_with_rank(axes, site, None) for axes in factor_axes(site))
        a_shape, b_shape = (
            tuple(rank if axis is None else site.shape[axis] for axis in axes)
            for axes in (a_axes, b_axes)
        )
        random = init(key, a_shape, math.prod(site.sizes("in")), rank).astype(dtype)
        a, b = random, jnp.zeros(b_shape, dtype)
        if site.table:
            a, b = jnp.zeros(a_shape, dtype), jax.random.normal(key, b_shape, dtype)
        return {"a": inherit(a, weight, a_axes), "b": inherit(b, weight, b_axes)}

    def tuned(site: Site, leaves: Leaves, weight: Any, key: jax.Array | None) -> Sum:
        site = unfused(site, fused)
        rank_axis = len(site.axes("stack", "batch"))
        layout, (r,) = Layout.of(site.shape).fresh(leaves["a"].shape[rank_axis])
        a_labels, b_labels = (_with_rank(axes, site, r) for axes in factor_axes(site))
        keys, key_axes = _layer_keys(key if dropout else None, site)
        update = Einsum(
            factors=(leaves["a"], leaves["b"]),
            owned=(a_labels, b_labels),
            layout=layout,
            dtype=weight.dtype,
            scale=scale,
            key=keys,
            key_owned=key_axes,
            rate=dropout,
        )
        return Sum((weight, update))

    return Method(
        name="lora",
        init=start,
        weight=tuned,
        fits=lambda site: site.linear,
        bare=lambda site: site.linear and not site.table,
        options={**options, "scale": scale},
    )


def unfused(site: Site, fused: Sequence[int]) -> Site:
    """The site with the axes of fused maps shared by `A` and `B`, like those of experts."""
    if not fused:
        return site
    wrong = [axis for axis in fused if not 0 <= axis < len(site.roles) or site.roles[axis] == "in"]
    if wrong:
        raise ValueError(
            f"fused={fused}: axis {wrong[0]} of {site.path!r} is no axis of outputs; its axes are "
            f"{site.roles} of sizes {site.shape}."
        )
    roles = ("batch" if axis in fused else role for axis, role in enumerate(site.roles))
    return dataclasses.replace(site, roles=tuple(roles))


def factor_axes(site: Site) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of `A` and of `B`: what both own comes first. Axes without a role go with `B`."""
    both = site.axes("stack", "batch")
    return (*both, *site.axes("in")), (*both, *site.axes("out", ""))


def _with_rank(axes: tuple[int, ...], site: Site, rank: Any) -> tuple[Any, ...]:
    """The axes of a factor with the rank behind the stack and expert axes."""
    both = len(site.axes("stack", "batch"))
    return (*axes[:both], rank, *axes[both:])


def _layer_keys(key: jax.Array | None, site: Site) -> tuple[jax.Array | None, tuple[int, ...]]:
    """A dropout key for each layer of a stack."""
    axes = site.axes("stack")
    if key is None:
        return None, ()
    return (jax.random.split(key, site.sizes("stack")) if axes else key), axes


def _checked_rank(rank: int) -> int:
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank={rank!r} is not a rank. Use a positive int, such as lora(rank=8).")
    return rank


def _checked_alpha(rank: int, alpha: float | None) -> float:
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha={alpha!r} must be positive. Leave it out for a scale of 1.")
    return float(rank if alpha is None else alpha)


def _check_rank(rank: int, site: Site) -> None:
    sides = math.prod(site.sizes("in")), math.prod(site.sizes("out", ""))
    if rank > min(sides):
        raise ValueError(
            f"rank={rank} exceeds the smaller side of {site.path!r} {sides}. "
            f"Use rank <= {min(sides)}."
        )
