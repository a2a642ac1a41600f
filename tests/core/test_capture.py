"""Activations at call boundaries are handed out of loops, remat and jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpeft as jp
from jaxpeft.core.capture import capture

W = jax.random.normal(jax.random.key(0), (3, 4, 4))
X = jax.random.normal(jax.random.key(1), (2, 4))


def layer(x, w):
    return jp.tap(jnp.tanh(jp.tap(x, "layer:in") @ w), "layer:out"), None


def scanned(w, x):
    return lax.scan(layer, x, w)[0].sum()


def remat(w, x):
    return jax.jit(lambda w, x: lax.scan(jax.checkpoint(layer), x, w)[0].sum())(w, x)


@pytest.mark.parametrize("fn", [scanned, remat])
def test_values_are_stacked_over_layers(fn):
    found = jax.jit(capture(fn, "layer:{in,out}"))(W, X)
    x = X
    for i, w in enumerate(W):
        np.testing.assert_allclose(found["layer:in"][i], x, rtol=1e-6)
        x = jnp.tanh(x @ w)
        np.testing.assert_allclose(found["layer:out"][i], x, rtol=1e-5)


def test_only_what_matches_is_given_and_gradients_pass():
    def loss(w):
        (found,) = capture(scanned, "**:out")(w, X).values()
        return found[-1].sum()

    np.testing.assert_allclose(
        jax.grad(loss)(W), jax.grad(lambda w: scanned(w, X))(W), rtol=1e-5, atol=1e-6
    )


def test_what_cannot_be_handed_out_is_an_error():
    def looped(w, x):
        return lax.while_loop(lambda x: x.sum() < 0, lambda x: layer(x, w[0])[0], x)

    with pytest.raises(ValueError, match="'layer:in' is inside of a loop or a branch"):
        capture(looped, "layer:in")(W, X)
    with pytest.raises(ValueError, match="matched none of the 2 boundaries. Nearest: 'layer:in'"):
        capture(scanned, "layers:in")(W, X)
