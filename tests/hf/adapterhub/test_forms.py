"""The library's options for residuals and LayerNorms, in one formula and in the other."""

import itertools

import numpy as np
import pytest

from jaxpeft.hf.adapterhub.forms import FLAGS, flags_of, form_of
from jaxpeft.hf.adapterhub.options import Bottleneck

COMBINATIONS = [
    dict(zip(FLAGS, values, strict=True)) for values in itertools.product(*FLAGS.values())
]


def normed(x):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5)


def adapter(z):
    return np.tanh(2 * z[::-1])


def as_the_library(flags, h, x, post_norm):
    """`pre_forward`, `forward` and `post_forward` of its modules; None where they fail."""
    norm = normed if post_norm else lambda value: value
    z, residual = h, h if flags["residual_before_ln"] is True else None
    if flags["is_parallel"]:
        z, residual, added = x, x, h
    else:
        added = None
        if flags["original_ln_before"]:
            z = h + x
            if flags["residual_before_ln"] == "post_add" and post_norm:
                residual = z
            z = norm(z)
        if not flags["residual_before_ln"]:
            residual = z
        if residual is None:
            return None
    out = adapter(z) + (added if flags["is_parallel"] else residual)
    return norm(out + x) if flags["original_ln_after"] else out


def as_here(form, h, x, post_norm):
    """The model's own sum around the method."""
    norm = normed if post_norm else lambda value: value
    there = {"x": h, "stream": x, "sum": h + x, "norm": normed(h + x)}
    if form.side == "norm":
        there = {"x": norm(h + x), "input": h + x}
    value = adapter(there[form.reads]) + sum(w * there[n] for n, w in form.residual.items())
    return value if form.side == "norm" else norm(value + x)


@pytest.mark.parametrize("post_norm", [True, False])
@pytest.mark.parametrize("flags", COMBINATIONS, ids=lambda f: "-".join(map(str, f.values())))
def test_a_form_computes_what_the_library_does(flags, post_norm):
    h, x = np.random.default_rng(0).normal(size=(2, 8))
    form = form_of(Bottleneck(False, True, 16, "relu", **flags), post_norm)
    wanted = as_the_library(flags, h, x, post_norm)
    if wanted is None:
        assert form is None
    elif form is None:  # what leaves the model's own residual out
        assert not flags["original_ln_after"]
    else:
        np.testing.assert_allclose(as_here(form, h, x, post_norm), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [True, False])
@pytest.mark.parametrize("post_norm", [True, False])
def test_options_are_found_for_every_form(post_norm, channels):
    for flags in COMBINATIONS:
        form = form_of(Bottleneck(False, True, 16, "relu", **flags), post_norm)
        if form is not None:
            found = flags_of(form, post_norm, channels)
            again = form_of(Bottleneck(False, True, 16, "relu", **found), post_norm)
            assert again[:2] == form[:2]
            h, x = np.random.default_rng(1).normal(size=(2, 8))
            np.testing.assert_allclose(
                as_here(again, h, x, post_norm), as_here(form, h, x, post_norm), atol=1e-12
            )
