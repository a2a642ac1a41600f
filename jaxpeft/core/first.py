"""Where a program reads the first position of a sequence, which encoders pool."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core as jex
from jax.extend import source_info_util

from jaxpeft.core.frame import frame
from jaxpeft.core.lift import trace
from jaxpeft.core.virtual import Front, tokens_of


def warn_of_first(
    fn: Callable[..., Any],
    params: Any,
    inputs: Mapping[str, Any],
    fronts: Sequence[Front],
    call: Any,
) -> None:
    """Warns if `fn(params, *args, **kwargs)`, `call` being the two, reads the first token's row.

    With placeholders in front that is the row of a placeholder, which means nothing. (A prompt's
    rows mean something, and are read in `peft` too.)
    """
    empty = [f for f in fronts if f.virtual.rows is None and f.virtual.place != "back"]
    tokens = tokens_of(inputs, fronts) if empty else None
    if tokens is None or tokens.shape[-1] < 2:
        return
    weights, outer = frame(params)
    arrays, inner = frame(call)
    jaxpr, _, _ = trace(fn, outer, inner, weights, arrays)
    line = next(first_rows(jaxpr, tokens.shape[-1]), None)
    if line is not None:
        warnings.warn(
            f"the model reads the first position of its sequence ({line}), where this prefix has a "
            'placeholder. Use place="back", with which the first token stays the first.',
            stacklevel=4,
        )


def first_rows(jaxpr: Any, length: int) -> Iterator[str]:
    """The lines that take the first of `length` rows of activations `(..., length, features)`."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "slice" and _is_first(eqn, length):
            yield source_info_util.summarize(eqn.source_info)
        for program in jex.jaxprs_in_params(eqn.params):
            yield from first_rows(program, length)


def _is_first(eqn: Any, length: int) -> bool:
    x, starts, ends = eqn.invars[0].aval, eqn.params["start_indices"], eqn.params["limit_indices"]
    if x.ndim < 3 or x.shape[-2] != length or not jnp.issubdtype(x.dtype, jnp.floating):
        return False
    wanted = (*x.shape[:-2], 1, x.shape[-1])
    return not any(starts) and tuple(ends) == wanted
