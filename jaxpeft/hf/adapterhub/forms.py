"""What a bottleneck adapter of AdapterHub reads and is added to, in the terms of `bottleneck`.

With h a sublayer's result, x the residual stream, u = h + x, and A the adapter's own network, the
library computes in a post-norm model

    sequential  z = LN(u) or h;  o = A(z) + r,  r = h, u or z;  out = LN(o + x), or o
    parallel    o = A(x) + h;                                  out = LN(o + x)

and the same without LN in a pre-norm one. Here a method at ":delta" puts something in the place of
h, to which the model adds x (and applies LN); one at the LayerNorm's ":out" works on LN(u).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxpeft.hf.adapterhub.options import Bottleneck

Weights = dict[str, float]

# The library's options that the form depends on, the usual values first.
FLAGS: dict[str, tuple[Any, ...]] = {
    "is_parallel": (False, True),
    "original_ln_after": (True, False),
    "original_ln_before": (True, False),
    "residual_before_ln": (True, False, "post_add"),
}


class Form(NamedTuple):
    """A place and what an adapter reads and is added to there.

    Attributes:
        side: "delta" of the sublayer, or "norm" for the output of the LayerNorm behind it.
        reads: the name of an activation.
        residual: names of activations and their weights.
    """

    side: str
    reads: str
    residual: Weights


def form_of(part: Bottleneck, post_norm: bool) -> Form | None:
    """The form of a configuration, None if no method here has it.

    Args:
        part: the configuration.
        post_norm: whether the model has its LayerNorms behind the sublayers.

    Example:
        >>> part = Bottleneck(False, True, 16, "relu", original_ln_before=True)
        >>> form_of(part, post_norm=True)
        Form(side='delta', reads='norm', residual={'x': 1.0})
    """
    if part.is_parallel:
        return Form("delta", "stream", {"x": 1.0}) if part.original_ln_after else None
    before, residual = part.original_ln_before, part.residual_before_ln
    if residual == "post_add" and not (before and post_norm):
        return None
    z = ("norm" if post_norm else "sum") if before else "x"
    r = {True: "x", False: z, "post_add": "sum"}[residual]
    if part.original_ln_after:
        return Form("delta", z, {r: 1.0})
    if post_norm:
        known = {"norm": "x", "sum": "input"}
        return Form("norm", "x", {known[r]: 1.0}) if z == "norm" and r in known else None
    return Form("delta", z, {"x": 1.0} if r == "sum" else {r: 1.0, "stream": -1.0})


def flags_of(form: Form, post_norm: bool, channels: bool) -> dict[str, Any] | None:
    """Options of the library with this form, None if there are none.

    Several may have it. The usual ones are chosen: those of AdapterPlus for an adapter that scales
    channels, as it does.
    """
    for values in itertools.product(*FLAGS.values()):
        flags = dict(zip(FLAGS, values, strict=True))
        if channels:
            flags["original_ln_after"] = not flags["original_ln_after"]
        if _unusual(flags):
            continue
        found = form_of(Bottleneck(False, True, 16, "relu", **flags), post_norm)
        if found and _same(found, form):
            return flags
    return None


def _unusual(flags: Mapping[str, Any]) -> bool:
    """Options that the library passes over in a form, but for the values that it writes there."""
    if flags["is_parallel"]:
        return flags["original_ln_before"] or flags["residual_before_ln"] is not True
    return not flags["original_ln_before"] and flags["residual_before_ln"] is not True


def _same(one: Form, other: Form) -> bool:
    sums = [_expanded(form.residual) for form in (one, other)]
    return one[:2] == other[:2] and sums[0] == sums[1]


def _expanded(weights: Weights) -> Weights:
    """With the sum of the stream and x in terms of these two."""
    found: Weights = {}
    for name, weight in weights.items():
        for term in ("stream", "x") if name == "sum" else (name,):
            found[term] = found.get(term, 0.0) + weight
    return {name: weight for name, weight in found.items() if weight}
