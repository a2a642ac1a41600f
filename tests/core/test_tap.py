"""Call boundaries: a bottleneck adapter on plain, looped, scanned and remat'd models."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxpeft as jp

LAYERS, WIDTH = 3, 4
X = jax.random.normal(jax.random.key(0), (5, WIDTH))
W = jax.random.normal(jax.random.key(1), (LAYERS, WIDTH, WIDTH)) / 2
TUNING = jp.rules(("**/dense:out", jp.bottleneck(3, activation=jnp.tanh)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(WIDTH, name="dense", use_bias=False)(x)), None


class Scanned(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        layers = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        return layers(name="layers")(x, None)[0]


class Looped(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(LAYERS):
            x, _ = Block(name=f"layers_{i}")(x, None)
        return x


class NnxBlock(nnx.Module):
    def __init__(self, kernel):
        self.dense = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=nnx.Rngs(0))
        self.dense.kernel = nnx.Param(kernel)

    def __call__(self, x):
        return jnp.tanh(self.dense(x))


class NnxLooped(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([NnxBlock(w) for w in W])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class NnxScanned(nnx.Module):
    def __init__(self, remat):
        self.layers = nnx.vmap(NnxBlock)(W)
        self.remat = remat

    def __call__(self, x):
        step = nnx.remat(lambda x, layer: layer(x)) if self.remat else lambda x, layer: layer(x)
        return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def function(params, x):
    for i in range(LAYERS):
        x = jnp.tanh(jp.tap(x @ params[i], f"layers_{i}/dense:out"))
    return x


STACKED = {"params": {"layers": {"dense": {"kernel": W}}}}
APART = {"params": {f"layers_{i}": {"dense": {"kernel": W[i]}} for i in range(LAYERS)}}
MODELS = {
    "linen scan": (Scanned(), STACKED),
    "linen scan remat": (Scanned(remat=True), STACKED),
    "linen loop": (Looped(), APART),
    "nnx loop": (NnxLooped(), nnx.state(NnxLooped())),
    "nnx scan": (NnxScanned(False), nnx.state(NnxScanned(False))),
    "nnx scan remat": (NnxScanned(True), nnx.state(NnxScanned(True))),
    "function": (function, list(W)),
}


def random_leaves(layer):
    """The leaves of one layer's adapter."""
    key = jax.random.key(10 + layer)
    shapes = {"down": (3, WIDTH), "down_bias": (3,), "up": (3, WIDTH), "up_bias": (WIDTH,)}
    keys = jax.random.split(key, len(shapes))
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


LEAVES = [random_leaves(i) for i in range(LAYERS)]


def oracle(leaves, x):
    """h + up(f(down(h))) behind each product, written out in float64."""
    x = np.asarray(x, np.float64)
    for w, leaf in zip(W, leaves, strict=True):
        wide = {name: np.asarray(value, np.float64) for name, value in leaf.items()}
        h = x @ np.asarray(w, np.float64)
        inner = np.tanh(h @ wide["down"].T + wide["down_bias"])
        x = np.tanh(h + inner @ wide["up"] + wide["up_bias"])
    return x


def filled(adapter):
    """The adapter with the layers' leaves: stacked at one path, or one path a layer."""
    if len(adapter) == 1:
        values = {next(iter(adapter)): jax.tree.map(lambda *layers: jnp.stack(layers), *LEAVES)}
    else:
        values = dict(zip(sorted(adapter), LEAVES, strict=True))
    return jp.Adapter(values, adapter.sites)


@pytest.fixture(scope="module", params=MODELS)
def tuned_model(request):
    model, params = MODELS[request.param]
    tuned = jp.transform(model, TUNING)
    return tuned, params, tuned.init(jax.random.key(2), params, X)


def test_a_fresh_adapter_changes_nothing(tuned_model):
    tuned, params, fresh = tuned_model
    expected = jax.jit(tuned.fn)(params, X)
    np.testing.assert_allclose(jax.jit(tuned.apply)(fresh, params, X), expected, rtol=1e-6)


def test_every_form_of_the_model_equals_the_formula(tuned_model):
    tuned, params, fresh = tuned_model
    y = tuned.apply(filled(fresh), params, X)
    np.testing.assert_allclose(y, oracle(LEAVES, X), rtol=2e-5, atol=1e-5)


def test_gradients_reach_every_layer(tuned_model):
    tuned, params, fresh = tuned_model

    def through_formula(leaves):
        x = X
        for w, leaf in zip(W, leaves, strict=True):
            h = x @ w
            inner = jnp.tanh(h @ leaf["down"].T + leaf["down_bias"])
            x = jnp.tanh(h + inner @ leaf["up"] + leaf["up_bias"])
        return x.sum()

    grads = jax.grad(lambda a: tuned.apply(a, params, X).sum())(filled(fresh))
    layers = jax.grad(through_formula)(LEAVES)
    expected = jp.Adapter(
        {next(iter(grads)): jax.tree.map(lambda *g: jnp.stack(g), *layers)}
        if len(grads) == 1
        else dict(zip(sorted(grads), layers, strict=True)),
        grads.sites,
    )
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_merging_says_why_it_cannot_be(tuned_model):
    tuned, params, fresh = tuned_model
    with pytest.raises(ValueError, match="works on activations.* cannot be merged"):
        tuned.merge(fresh, params)


def test_lora_and_an_adapter_at_a_boundary_work_together():
    tuning = jp.rules(("**/kernel", jp.lora(2)), ("**/dense:out", jp.bottleneck(3)))
    tuned = jp.transform(Scanned(), tuning, strict=True)
    adapter = tuned.init(jax.random.key(0), STACKED, X)
    assert sorted(adapter) == ["layers/dense:out", "params/layers/dense/kernel"]
    expected = jax.jit(tuned.fn)(STACKED, X)
    np.testing.assert_allclose(jax.jit(tuned.apply)(adapter, STACKED, X), expected, rtol=1e-6)


def test_dropout_differs_by_layer_and_is_the_same_for_the_same_key():
    tuned = jp.transform(Scanned(), jp.rules(("**/dense:out", jp.bottleneck(3, dropout=0.5))))
    adapter = filled(tuned.init(jax.random.key(0), STACKED, X))
    one, again, other = (
        tuned.apply(adapter, STACKED, X, dropout_key=jax.random.key(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(np.asarray(one - other)).max() > 1e-3
    assert np.abs(np.asarray(one - tuned.apply(adapter, STACKED, X))).max() > 1e-3


def test_a_boundary_inside_a_custom_vjp_is_refused():
    @jax.custom_vjp
    def opaque(x):
        return jp.tap(x, "inner:out")

    opaque.defvjp(lambda x: (opaque(x), None), lambda _, g: (g,))
    tuned = jp.transform(lambda p, x: opaque(x @ p), jp.rules(("inner:out", jp.bottleneck(2))))
    adapter = tuned.init(jax.random.key(0), W[0], X)
    with pytest.raises(ValueError, match="'inner:out', which is inside `custom_vjp_call`"):
        tuned.apply(adapter, W[0], X)


def test_a_boundary_that_a_call_never_reaches_is_an_error():
    def model(params, x, tapped):
        return jp.tap(x @ params, "w:out") if tapped else x @ params

    tuned = jp.transform(model, jp.rules(("w:out", jp.bottleneck(2))))
    adapter = tuned.init(jax.random.key(0), W[0], X, True)
    with pytest.raises(ValueError, match="never reaches"):
        tuned.apply(adapter, W[0], X, False)


def test_a_tap_is_the_identity_under_every_transform():
    def f(x):
        return jnp.sin(jp.tap(x, "x")).sum()

    def g(x):
        return jnp.sin(x).sum()

    for transformed in (
        jax.grad,
        lambda f: jax.vmap(jax.grad(f), in_axes=1, out_axes=1),
        lambda f: lambda x: jax.jvp(f, (x,), (x,))[1],
        lambda f: jax.grad(jax.checkpoint(f)),
        lambda f: lambda x: lax.map(f, x),
        jax.jit,
    ):
        np.testing.assert_allclose(transformed(f)(X), transformed(g)(X), rtol=1e-6)
