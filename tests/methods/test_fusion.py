"""AdapterFusion against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.methods.adapters import houlsby, parallel_adapter, pfeiffer
from jaxpeft.methods.compose import average
from jaxpeft.methods.fusion import fuse
from jaxpeft.methods.join import fusion_penalty, join_adapters

D, M, LAYERS = 6, 3, 2
RNG = np.random.default_rng(0)
W = RNG.normal(size=(LAYERS, D, D)) / 2
X = RNG.normal(size=(2, 4, D))


def model(w, x):
    """Layers with their norms in front, without the norms."""

    def layer(x, w):
        h = x @ w
        return jnp.tanh(x + jp.tap(h, "layers/mlp:delta", stream=x, sum=x + h)), None

    return jax.lax.scan(layer, x, w)[0]


def shapes(tuned):
    return jax.eval_shape(lambda: tuned.init(jax.random.key(0), W, X))


def random(tuned, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), shapes(tuned))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def fused(leaves, z, query, rest, before=False):
    """One layer's sublayer: AdapterHub's section on fusion, its `residual_before` as `before`."""
    updates = [
        np.maximum(z @ a["down"].T + a["down_bias"], 0) @ a["up"] + a["up_bias"]
        for a in (leaves["0"], leaves["1"])
    ]
    u = np.stack(updates, axis=-2) + (rest[..., None, :] if before else 0)
    q = query @ leaves["query"] + leaves["query_bias"] if "query" in leaves else query
    k = u @ leaves["key"] + leaves["key_bias"] if "key" in leaves else u
    v = u @ leaves["value"] if "value" in leaves else u
    attention = softmax((q[..., None, :] * k).sum(-1))
    return (attention[..., None] * v).sum(-2) + (0 if before else rest)


def expected(leaves, read="sum", query=None, before=False):
    x = X
    for layer, w in enumerate(W):
        own = jax.tree.map(lambda leaf, layer=layer: np.asarray(leaf[layer], np.float64), leaves)
        h = x @ w
        z = {"sum": x + h, "stream": x, "x": h}[read]
        x = np.tanh(x + fused(own, z, h if query == "x" else z, h, before))
    return x


TWO = pfeiffer(width=M), pfeiffer(width=2)
CASES = {
    "dynamic": (fuse(*TWO), {}),
    "static": (fuse(*TWO, maps=("query", "key")), {}),
    "no maps": (fuse(*TWO, maps=()), {}),
    "query_before_ln": (fuse(*TWO, query="x"), {"query": "x"}),
    "residual_before": (fuse(*TWO, of="result"), {"before": True}),
    "parallel": (
        fuse(*[parallel_adapter(width=M, scale=1.0)] * 2),
        {"read": "stream"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_forms_are_adapterhub_s(name):
    with jax.enable_x64(True):
        method, how = CASES[name]
        tuned = jp.transform(model, method)
        adapter = random(tuned)
        # Softmax is made in float32.
        y = jax.jit(tuned.apply)(adapter, W, X)
        np.testing.assert_allclose(y, expected(adapter["layers/mlp:delta"], **how), atol=2e-5)


def test_temperature_divides_the_scores():
    with jax.enable_x64(True):
        tuned = jp.transform(model, fuse(*TWO, temperature=4.0))
        adapter = random(tuned)
        leaves = adapter["layers/mlp:delta"]
        colder = leaves | {n: leaves[n] / 4 for n in ("query", "query_bias")}
        y = tuned.apply(adapter, W, X)
        np.testing.assert_allclose(y, expected(colder), atol=2e-5)


def test_a_fresh_fusion():
    """Its value is nearly the identity; of fresh adapters it makes nothing."""
    tuned = jp.transform(model, fuse(*TWO))
    adapter = jax.jit(tuned.init)(jax.random.key(0), W, X)
    leaves = adapter["layers/mlp:delta"]
    near = np.full((D, D), 1e-6) + (1 - 1e-6) * np.eye(D)
    np.testing.assert_allclose(leaves["value"], [near] * LAYERS, rtol=1e-6)
    count = sum(leaf.size for name, leaf in leaves.items() if name not in ("0", "1"))
    assert count == LAYERS * (3 * D * D + 2 * D)
    np.testing.assert_array_equal(
        jax.jit(tuned.apply)(adapter, W, X), jax.jit(jp.transform(model, fuse(*TWO)).fn)(W, X)
    )


def test_only_the_fusion_trains():
    tuned = jp.transform(model, fuse(houlsby(width=M, gate="token", scale="learned"), *TWO))
    marks = tuned.trainable(shapes(tuned))["layers/mlp:delta"]
    assert not any(jax.tree.leaves([marks["0"], marks["1"], marks["2"]]))
    assert all(mark for name, mark in marks.items() if not name.isdigit())


def test_adapters_trained_apart_are_fused():
    """With queries and keys of zero a fusion averages its adapters."""
    apart = [random(jp.transform(model, m), seed) for seed, m in enumerate(TWO)]
    tuned = jp.transform(model, fuse(*TWO))
    fresh = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes(tuned))
    fresh["layers/mlp:delta"]["value"] = jnp.broadcast_to(jnp.eye(D), (LAYERS, D, D))
    adapter = join_adapters(fresh, apart)
    y = tuned.apply(adapter, W, X)
    averaged = jp.transform(model, average(*TWO))
    joined = join_adapters(shapes(averaged), apart)
    np.testing.assert_allclose(y, averaged.apply(joined, W, X), rtol=1e-4, atol=1e-5)


def test_the_penalty_is_the_distance_to_the_identity():
    tuned = jp.transform(model, fuse(*TWO))
    adapter = random(tuned)
    values = np.asarray(adapter["layers/mlp:delta"]["value"], np.float64)
    penalty = 0.01 * ((np.eye(D) - values) ** 2).sum()
    np.testing.assert_allclose(fusion_penalty(adapter), penalty, rtol=1e-5)
    alone = random(jp.transform(model, TWO[0]))
    assert fusion_penalty(alone) == 0
    gradient = jax.grad(fusion_penalty)(adapter)["layers/mlp:delta"]
    np.testing.assert_allclose(gradient["value"], 0.02 * (values - np.eye(D)), rtol=1e-4, atol=1e-6)
    chained = jp.Adapter({"a:out": {"0": {"0": {}, "value": jnp.zeros((D, D))}, "1": {}}}, ())
    np.testing.assert_allclose(fusion_penalty(chained, 1.0), D)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fuse(), ValueError, "give adapters"),
        (lambda: fuse(*TWO, maps=("values",)), ValueError, "maps among"),
        (lambda: fuse(*TWO, of="sum"), ValueError, "'update' or 'result'"),
        (lambda: fuse(*TWO, temperature=0), ValueError, "must be positive"),
        (lambda: fuse(*TWO, dropout=1.5), ValueError, "not a share"),
        (lambda: fuse(jp.lora(2)), TypeError, "made of bottleneck adapters, not of 'lora'"),
    ],
)
def test_what_cannot_be_is_said(make, error, message):
    with pytest.raises(error, match=message):
        make()
