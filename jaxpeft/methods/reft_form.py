"""What `loreft`, `noreft` and `direft` compute, and at which positions."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.method import Leaves, Method, Needs
from jaxpeft.core.rules import compile_pattern
from jaxpeft.core.site import Site
from jaxpeft.core.tap import Here
from jaxpeft.methods import parts
from jaxpeft.methods.maps import uniform

Array = jax.Array

MASK = "token_mask"
_BLOCKS = compile_pattern("**/{layers,layer,block}:out")


@dataclasses.dataclass(frozen=True)
class Reft:
    """`h' = h + (f(h W^T + b) - h R^T) R` at the first and last positions of sequences."""

    orthonormal: bool
    subtract: bool
    first: int | None
    last: int
    tied: bool
    activation: str
    dropout: float

    def __call__(self, site: Site, leaves: Leaves, x: Array, here: Here) -> Array:
        y = x
        chosen = _chosen(site, self.first, self.last, x, here.inputs.get(MASK))
        for i, (end, there) in enumerate(chosen.items()):
            unit = leaves["first" if self.tied else end]
            edited = parts.dropped(self.edit(unit, x), self.dropout, parts.folded(here.key, i))
            y = jnp.where(there[..., None], edited, y)
        return y

    def edit(self, unit: Leaves, h: Array) -> Array:
        """`h'` at every position, by the leaves of one end."""
        basis = self.basis(unit["rotation"]).astype(h.dtype)
        f, _ = parts.activation_named(self.activation)
        source = f(h @ unit["source"].astype(h.dtype).T + unit["bias"].astype(h.dtype))
        return h + (source - h @ basis.T if self.subtract else source) @ basis

    def basis(self, rotation: Array) -> Array:
        """R, `(..., r, d)`."""
        return orthonormal(rotation) if self.orthonormal else rotation

    def unit(self, key: Array, shape: tuple[int, ...], init: str, dtype: Any) -> Leaves:
        """Fresh leaves of one end; `shape` is that of `W`."""
        keys = jax.random.split(key, 3)
        width = shape[-1]
        rotation = uniform(keys[0], shape, width)
        rotation = orthonormal(rotation) if self.orthonormal else rotation
        if init == "zero":
            source = rotation if self.subtract else jnp.zeros(shape)
            bias = jnp.zeros(shape[:-1])
        else:
            source, bias = uniform(keys[1], shape, width), uniform(keys[2], shape[:-1], width)
        leaves = {"rotation": rotation, "source": source, "bias": bias}
        return {name: leaf.astype(dtype) for name, leaf in leaves.items()}


def reft(name: str, form: Reft, rank: int, init: str, dtype: Any) -> Method:
    _check(form, rank, init)
    ends = [end for end, there in (("first", form.first != 0), ("last", form.last > 0)) if there]
    ends = ["first"] if form.tied else ends

    def start(key: Array, site: Site, weight: Any) -> Leaves:
        del weight
        *stack, features = site.shape
        if rank > features:
            raise ValueError(f"rank={rank} exceeds the width of {site.path!r}, {features}.")
        return {
            end: form.unit(jax.random.fold_in(key, i), (*stack, rank, features), init, dtype)
            for i, end in enumerate(ends)
        }

    options = {
        "rank": rank, "first": form.first, "last": form.last, "tied": form.tied,
        "activation": form.activation, "dropout": form.dropout,
    }  # fmt: skip
    return Method(
        name,
        start,
        None,
        fits=parts.has_features,
        bare=lambda site: site.boundary and _BLOCKS(site.path, site),
        options=options,
        call=form,
        needs=Needs(inputs=(MASK,)),
    )


def orthonormal(rows: Array) -> Array:
    """The orthonormal rows `(..., r, d)` that Gram-Schmidt makes of some, by a QR decomposition."""
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    q, r = jnp.linalg.qr(jnp.swapaxes(rows, -1, -2).astype(wide))
    signs = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0).astype(wide)
    return jnp.swapaxes(q * signs[..., None, :], -1, -2)


def _chosen(
    site: Site, first: int | None, last: int, x: Array, mask: Array | None
) -> dict[str, Array]:
    """Which positions are edited by each end, `bool` that broadcasts to `x.shape[:-1]`."""
    length = x.shape[-2]
    if mask is None:
        mask = jnp.ones(length, bool)
    elif mask.shape[-1] != length:
        raise ValueError(
            f"{MASK} has {mask.shape[-1]} positions, but {site.path!r} has {length}. "
            "Give the mask of the tokens that are there, or name other boundaries in the rules."
        )
    real = jnp.asarray(mask, bool)
    count = jnp.cumsum(real, axis=-1)
    chosen = {"first": real if first is None else real & (count <= first)}
    if last:
        chosen["last"] = real & (count > count[..., -1:] - last)
    return chosen if first != 0 else {"last": chosen["last"]}


def _check(form: Reft, rank: Any, init: str) -> None:
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank={rank!r} is not a rank. Use a positive int, such as 4.")
    if form.last < 0 or (form.first is not None and form.first < 0):
        raise ValueError(f"first={form.first}, last={form.last} are no numbers of positions.")
    if (form.first is None and form.last) or (form.first == 0 and not form.last):
        raise ValueError(
            f"first={form.first}, last={form.last}: positions of one end or of both are edited, "
            "first=3, last=3; or all of them, first=None, last=0."
        )
    parts.check_share(dropout=form.dropout)
    parts.activation_named(form.activation)
    parts.check_choice("init", init, ("zero", "uniform"))
