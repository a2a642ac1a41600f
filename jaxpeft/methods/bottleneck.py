r"""Bottleneck adapters: a small two-layer network behind, beside or inside a module.

x' = r + g * s * up(f(down(z))),   down: d -> m,  up: m -> d
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.method import Leaves, Method
from jaxpeft.core.site import Site
from jaxpeft.methods import parts
from jaxpeft.methods.bottleneck_form import Bottleneck
from jaxpeft.methods.maps import STARTS, Dense
from jaxpeft.methods.phm import Phm
from jaxpeft.methods.phm_maps import phm_maps


def bottleneck(
    width: int | None = None,
    *,
    reduction: float | None = None,
    activation: str | Callable[[jax.Array], jax.Array] = "relu",
    reads: str | Sequence[str] = "x",
    residual: str | Mapping[str, float] = "x",
    scale: float | str = 1.0,
    gate: str | None = None,
    norm_in: bool = False,
    norm_out: str | None = None,
    bias: bool = True,
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    phm: Phm | Mapping[str, Any] | None = None,
    init: str = "zero",
    dtype: Any = jnp.float32,
) -> Method:
    """A bottleneck adapter: `x' = r + g * s * up(f(down(z)))`, by default `x + up(f(down(x)))`.

    Leaves: `down` (stack..., m, d), `down_bias` (stack..., m), `up` (stack..., m, d), `up_bias`
    (stack..., d): `m * (2 d + 1) + d` parameters a layer. A fresh adapter changes nothing, unless
    `init` or a residual other than `x` says so. It works at call boundaries, "**/mlp:out" or
    "**/attn:in", where `x` is the value there; activations that it may read besides are `input`
    at a module's output, and at the ":delta" of the own models, where `x` is what a sublayer adds
    to the stream, `stream`, `sum` (stream + x) and, in post-norm models, `norm` (LayerNorm(sum)).

    Args:
        width: `m` of the bottleneck; or give
        reduction: `d / m`, AdapterHub's reduction factor.
        activation: `f`, a function or the name of one in `jax.nn`, or "gelu_exact" (`jax.nn.gelu`
            is the tanh form). Files keep the name: with a function of your own load with `tuning=`.
        reads: `z`: the name of an activation, or several, of which the first that is there is read.
        residual: `r`: the name of an activation, "read" for `z`, or a dict of names and weights.
        scale: `s`: a number, or "learned": leaf `scale` (stack...), "channel": (stack..., d).
        gate: `g = sigmoid(z . w + b)`, leaves `gate` (stack..., d) and `gate_bias` (stack...):
            "token": one for each position; "sequence": their mean over the second last axis, later
            positions and padding too, so not for causal models that generate.
        norm_in: a LayerNorm of its own on `z`, leaves `norm_in_scale` and `norm_in_bias`.
        norm_out: the same behind: "update": on what is added to `r`, "result": on the sum.
        bias: whether the two maps have biases.
        dropout: share of the update's entries that are dropped, when a key is given.
        stochastic_depth: share of the rows (sequences) that go without update, when a key is given.
        phm: parameterized hypercomplex products in place of the two matrices; see `jaxpeft.phm`.
        init: "zero": `down` normal with standard deviation 0.02, `up` zero; AdapterHub's "bert",
            both normal; "mam", `down` as torch's linear layers, `up` zero; "houlsby", both
            truncated normal with 0.01.
        dtype: of the leaves; products are computed in the dtype of `x`.

    Returns:
        A method. As a bare tuning it goes to every sublayer of the models of this library.

    Raises:
        ValueError: if an option is out of range or unknown, or `z` is not there at a site.

    Example:
        >>> import jaxpeft as jp
        >>> tuning = jp.rules(("**/{attention,mlp}:out", jp.bottleneck(48)))
        >>> scaled_parallel = jp.bottleneck(reduction=2, reads=("stream", "input"), scale="learned")

    Reference:
        Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00052; He et al.
        2021, arXiv:2110.04366 (parallel, scaled); Mao et al. 2021, arXiv:2110.07577 (gated).
    """
    _check_size(width, reduction)
    parts.check_share(dropout=dropout, stochastic_depth=stochastic_depth)
    parts.check_choice("scale", scale, ("learned", "channel")) if isinstance(scale, str) else None
    parts.check_choice("gate", gate, (None, "token", "sequence"))
    parts.check_choice("norm_out", norm_out, (None, "update", "result"))
    parts.check_choice("init", init, tuple(STARTS) if phm is None else ("zero", "bert"))

    f, name = parts.activation_named(activation)
    reading = (reads,) if isinstance(reads, str) else tuple(reads)
    weights = {residual: 1.0} if isinstance(residual, str) else dict(residual)
    maps = Dense(bias, init) if phm is None else phm_maps(phm, bias, init)
    form = Bottleneck(
        maps, f, reading, tuple(weights.items()), scale if isinstance(scale, str) else float(scale),
        gate, norm_in, norm_out, dropout, stochastic_depth,
    )  # fmt: skip

    def start(key: jax.Array, site: Site, weight: Any) -> Leaves:
        del weight
        return form.init(key, site, width, reduction, dtype)

    options = {
        "width": width, "reduction": reduction, "activation": name,
        "reads": reads if isinstance(reads, str) else list(reads),
        "residual": residual if isinstance(residual, str) else weights,
        "scale": scale, "gate": gate, "norm_in": norm_in, "norm_out": norm_out, "bias": bias,
        "dropout": dropout, "stochastic_depth": stochastic_depth,
        "phm": None if isinstance(maps, Dense) else maps.options(),
    }  # fmt: skip
    return Method(
        "bottleneck",
        start,
        None,
        fits=parts.has_features,
        bare=lambda site: site.side == "delta",
        options=options,
        fixed=maps.fixed,
        call=form,
        shared=maps.shared,
    )


def _check_size(width: Any, reduction: Any) -> None:
    if (width is None) == (reduction is None):
        raise ValueError("a bottleneck has a width or a reduction: bottleneck(48), reduction=16.")
    if width is not None and (not isinstance(width, int) or width < 1):
        raise ValueError(f"width={width!r} is not a width. Use a positive int: bottleneck(48).")
    if reduction is not None and not reduction > 0:
        raise ValueError(f"reduction={reduction!r} must be positive: bottleneck(reduction=16).")
