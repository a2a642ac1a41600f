"""A state that a method's sites hand on, through every kind of program that may hold them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpeft as jp
from jaxpeft.core.method import Needs

LAYERS, D = 3, 4
W = np.random.default_rng(0).standard_normal((LAYERS, D, D)).astype(np.float32) / 2
X = np.random.default_rng(1).standard_normal((2, D)).astype(np.float32)


def counter():
    """The state begins at `2 x`; a layer adds `a s` to its output `y`, and hands on `s + y`."""

    def call(site, leaves, x, here):
        if site.path == "start":
            return x, {"sum": 2 * x}
        s = here.state("sum", site.path)
        return x + leaves["a"] * s, {"sum": s + x}

    return jp.Method(
        "counter",
        lambda key, site, weight: {} if site.path == "start" else {"a": jnp.ones(site.shape[:-1])},
        None,
        fits=lambda site: site.boundary,
        bare=lambda site: site.boundary,
        call=call,
        needs=Needs(states=("sum",)),
    )


def begun(x):
    return jp.tap(jnp.sin(x), "start")


def layer(x, w):
    return jp.tap(jnp.tanh(x @ w), "layer")


def looped(params, x):
    x = begun(x)
    for i, w in enumerate(params):
        x = jp.tap(jnp.tanh(x @ w), f"layer_{i}")
    return x


def scanned(params, x):
    return lax.scan(lambda x, w: (layer(x, w), None), begun(x), params)[0]


def remat(params, x):
    step = jax.checkpoint(lambda x, w: (layer(x, w), None))
    return lax.scan(step, begun(x), params)[0]


def jitted(params, x):
    whole = jax.jit(lambda x: lax.scan(lambda x, w: (layer(x, w), None), begun(x), params)[0])
    return jax.checkpoint(whole)(x)


def branched(params, x):
    def step(x, w):
        return lax.cond(w.sum() < 1e9, layer, lambda x, w: x, x, w), None

    return lax.scan(step, begun(x), params)[0]


def often(params, x):
    """Samples of a batch one after the other, each with a state of its own."""
    return lax.map(lambda row: scanned(params, row[None])[0], x)


def oracle(a, x):
    x = np.sin(np.asarray(x, np.float64))
    s = 2 * x
    for scale, w in zip(a, W, strict=True):
        y = np.tanh(x @ w)
        x, s = y + scale * s, s + y
    return x


A = np.array([0.3, -0.2, 0.5])


@pytest.mark.parametrize("model", [looped, scanned, remat, jitted, branched])
def test_it_passes_from_site_to_site(model):
    tuned = jp.transform(model, counter())
    adapter = jax.eval_shape(tuned.init, jax.random.key(0), jnp.asarray(W), X)
    if model is looped:
        leaves = {f"layer_{i}": {"a": jnp.array(a, jnp.float32)} for i, a in enumerate(A)}
    else:
        leaves = {"layer": {"a": jnp.asarray(A, jnp.float32)}}
    adapter = jp.Adapter({"start": {}, **leaves}, adapter.sites)

    def loss(adapter):
        y = tuned.apply(adapter, jnp.asarray(W), X)
        return y.sum(), y

    grads, y = jax.jit(jax.grad(loss, has_aux=True))(adapter)
    np.testing.assert_allclose(y, oracle(A, X), rtol=1e-5, atol=1e-6)
    slope = np.array([(oracle(A + e, X) - oracle(A - e, X)).sum() / 2e-4 for e in 1e-4 * np.eye(3)])
    got = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])
    np.testing.assert_allclose(got, slope, rtol=1e-3, atol=1e-4)


def test_a_loop_around_the_beginning_begins_anew():
    tuned = jp.transform(often, counter())
    adapter = jax.eval_shape(tuned.init, jax.random.key(0), jnp.asarray(W), X)
    # To the engine the loop over rows is a stack too.
    leaves = {"start": {}, "layer": {"a": jnp.tile(jnp.asarray(A, jnp.float32), (2, 1))}}
    y = tuned.apply(jp.Adapter(leaves, adapter.sites), jnp.asarray(W), X)
    np.testing.assert_allclose(y, oracle(A, X), rtol=1e-5, atol=1e-6)


def test_a_while_loop_carries_it():
    def model(params, x):
        step = lambda c: (c[0] + 1, layer(c[1], params[0]))  # noqa: E731
        return lax.while_loop(lambda c: c[0] < LAYERS, step, (0, begun(x)))[1]

    def body(i, both):
        x, s = both
        y = jnp.tanh(x @ W[0])
        return y + 0.3 * s, s + y

    tuned = jp.transform(model, counter())
    sites = jax.eval_shape(tuned.init, jax.random.key(0), jnp.asarray(W), X).sites
    adapter = jp.Adapter({"start": {}, "layer": {"a": jnp.array(0.3)}}, sites)
    start = jnp.sin(jnp.asarray(X))
    expected = lax.fori_loop(0, LAYERS, body, (start, 2 * start))[0]
    np.testing.assert_allclose(tuned.apply(adapter, jnp.asarray(W), X), expected, rtol=1e-5)


def test_in_some_layers_and_after_other_methods():
    some = jp.chain(
        jp.rules(("layer", jp.ia3("activations"))),
        jp.rules(("start", counter())),
        jp.layers(jp.rules(("layer", counter())), [0, 2]),
    )
    tuned = jp.transform(scanned, some)
    adapter = jax.eval_shape(tuned.init, jax.random.key(0), jnp.asarray(W), X)
    leaves = {
        "start": {"1": {}},
        "layer": {"0": {"l": jnp.ones((LAYERS, D))}, "2": {"a": jnp.asarray(A[[0, 2]], "f")}},
    }
    assert jax.tree.structure(dict(adapter)) == jax.tree.structure(leaves)
    y = tuned.apply(jp.Adapter(leaves, adapter.sites), jnp.asarray(W), X)
    x = np.sin(np.asarray(X, np.float64))
    s = 2 * x
    for i, w in enumerate(W):
        out = np.tanh(x @ w)
        x, s = (out, s) if i == 1 else (out + A[i] * s, s + out)
    np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-6)


def test_what_has_not_begun_is_told():
    tuned = jp.transform(scanned, jp.rules(("layer", counter())))
    adapter = tuned.init(jax.random.key(0), jnp.asarray(W), X)
    with pytest.raises(ValueError, match="'layer' takes up 'sum', which no site in front of it"):
        tuned.apply(adapter, jnp.asarray(W), X)
    with pytest.raises(TypeError, match="hand on no state, not of 'counter'"):
        jp.average(counter())
