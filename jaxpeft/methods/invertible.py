r"""Invertible adapters: a map of the embeddings, undone in front of the output head.

y1 = x1 + F(x2),  y2 = x2 + G(y1);   its inverse  x2 = y2 - G(y1),  x1 = y1 - F(x2)

x = [x1 | x2],  F(x) = up(f(down(x)));   affine: y1 = x1 * exp(tanh(s)) + t,  [s | t] = F(x2)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.method import SHARED, Leaves, Method
from jaxpeft.core.site import Site
from jaxpeft.core.tap import Here
from jaxpeft.methods import parts
from jaxpeft.methods.maps import Dense

Array = jax.Array


def invertible(
    features: int,
    *,
    reduction: float = 2,
    activation: str = "relu",
    coupling: str = "additive",
    inverse: bool = False,
    shared: str = "invertible",
    init: str = "zero",
    dtype: Any = jnp.float32,
) -> Method:
    """An invertible adapter: `y1 = x1 + F(x2)`, `y2 = x2 + G(y1)`, or with `inverse` back again.

    The leaves are shared by both directions, at "shared:invertible" in the adapter: `f` and `g`,
    each with `down` (m, d_in), `down_bias`, `up` (m, d_out), `up_bias`, where `m = d_in //
    reduction`; with an even width `d`, `2 (m (d + 1) + d / 2)` parameters. A fresh adapter changes
    nothing.

    Args:
        features: `d`, the width of the embeddings.
        reduction: of the widths of `F` and `G`.
        activation: `f`, the name of a function in `jax.nn`.
        coupling: "additive" (NICE), or "affine", where `F` and `G` give scales too (as in Glow).
        inverse: undo it: for the place in front of the output head.
        shared: the name under which the leaves stand; adapters that are trained apart and then
            composed need names of their own.
        init: "zero": `up` starts at zero; "bert": all matrices normal with deviation 0.02.
        dtype: of the leaves.

    Returns:
        A method for boundaries; give rules that name the embeddings' output and the input of the
        output head.

    Raises:
        ValueError: if an option is unknown, or a site has another width.

    Example:
        >>> import jaxpeft as jp
        >>> language = jp.rules(
        ...     ("**/embeddings:out", invertible(768)),
        ...     ("**/transform:out", invertible(768, inverse=True)),
        ...     ("**/output:delta", jp.bottleneck(reduction=2, reads="norm")),
        ... )

    Reference:
        Pfeiffer et al. 2020, arXiv:2005.00052; Dinh et al. 2015, arXiv:1410.8516 (NICE); Kingma and
        Dhariwal 2018, arXiv:1807.03039 (Glow).
    """
    if not isinstance(features, int) or features < 2:
        raise ValueError(f"features={features!r} is not the width of embeddings, such as 768.")
    parts.check_choice("coupling", coupling, ("additive", "affine"))
    parts.check_choice("init", init, ("zero", "bert"))
    f, _ = parts.activation_named(activation)
    form = Coupling(features, reduction, f, coupling == "affine", inverse, shared)

    def start(key: Array, site: Site, weight: Any) -> Leaves:
        del key, weight
        form.check(site)
        return {}

    options = {
        "features": features, "reduction": reduction, "activation": activation,
        "coupling": coupling, "inverse": inverse, "shared": shared,
    }  # fmt: skip
    return Method(
        "invertible",
        start,
        None,
        fits=parts.has_features,
        bare=lambda site: False,
        options=options,
        call=form,
        shared={shared: lambda key: form.leaves(key, init, dtype)},
    )


@dataclasses.dataclass(frozen=True)
class Coupling:
    """Two coupling layers and their inverse."""

    features: int
    reduction: float
    activation: Callable[[Array], Array]
    affine: bool
    inverse: bool
    shared: str

    def __call__(self, site: Site, leaves: Leaves, x: Array, here: Here) -> Array:
        self.check(site)
        own = leaves[SHARED][self.shared]
        a, b = jnp.split(x, [self.features // 2], axis=-1)
        if self.inverse:
            b = self._moved(own["g"], b, a)
            a = self._moved(own["f"], a, b)
        else:
            a = self._moved(own["f"], a, b)
            b = self._moved(own["g"], b, a)
        return jnp.concatenate([a, b], axis=-1)

    def _moved(self, leaves: Leaves, x: Array, other: Array) -> Array:
        """`x` with what `other` gives added (and scaled by), or with that undone."""
        maps = Dense()
        y = maps.apply(leaves, "up", self.activation(maps.apply(leaves, "down", other)))
        if not self.affine:
            return x - y if self.inverse else x + y
        scale, shift = jnp.split(y, 2, axis=-1)
        log = jnp.tanh(scale)
        return (x - shift) * jnp.exp(-log) if self.inverse else x * jnp.exp(log) + shift

    def leaves(self, key: Array, init: str, dtype: Any) -> Leaves:
        first = self.features // 2
        sizes = {"f": (self.features - first, first), "g": (first, self.features - first)}
        return {
            name: Dense(start=init).init(
                jax.random.fold_in(key, i),
                (),
                (wide, max(1, int(wide // self.reduction)), out * (1 + self.affine)),
                dtype,
            )
            for i, (name, (wide, out)) in enumerate(sizes.items())
        }

    def check(self, site: Site) -> None:
        if site.shape[-1] != self.features:
            has = f"{site.path!r}, which has {site.shape[-1]} features"
            raise ValueError(f"invertible({self.features}) at {has}.")
