"""Compositions of adapters against AdapterHub's formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.methods.adapters import houlsby, pfeiffer
from jaxpeft.methods.bottleneck import bottleneck
from jaxpeft.methods.compose import average, batch_split, split
from jaxpeft.methods.join import join_adapters
from jaxpeft.methods.phm import phm

D, M, ROWS, TIME = 6, 3, 4, 5
RNG = np.random.default_rng(0)
PARAMS = {
    "w": RNG.normal(size=(D, D)),
    "scale": 1 + 0.3 * RNG.normal(size=D),
    "bias": 0.3 * RNG.normal(size=D),
}
X = RNG.normal(size=(ROWS, TIME, D))


def norm(params, u):
    u = u - u.mean(-1, keepdims=True)
    return params["scale"] * u / jnp.sqrt((u**2).mean(-1, keepdims=True) + 1e-5) + params["bias"]


def post_norm(params, x):
    h = x @ params["w"]
    sources = {f"norm_{part}": params[part] for part in ("scale", "bias")}
    sources |= {"stream": x, "sum": x + h, "norm": norm(params, x + h), "norm_eps": jnp.array(1e-5)}
    h = jp.tap(h, "layer/mlp:delta", **sources)
    return norm(params, x + h)


def plain(params, x):
    return jp.tap(x @ params["w"], "w:out", input=x)


def random(tuned, seed=1, params=PARAMS):
    shapes = jax.eval_shape(lambda: tuned.init(jax.random.key(0), params, X))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2), shapes)


def adapted(leaves, x, z):
    """`x + up(relu(down(z)))` in float64."""
    leaves = {name: np.asarray(leaf, np.float64) for name, leaf in leaves.items()}
    inner = np.maximum(z @ leaves["down"].T + leaves["down_bias"], 0)
    return x + inner @ leaves["up"] + leaves["up_bias"]


def at(method):
    tuning = jp.rules(("w:out", method)) if isinstance(method, jp.Method) else method
    return jp.transform(plain, tuning)


def chain(*methods):
    return jp.chain(*(jp.rules(("w:out", method)) for method in methods))


def test_a_chain_is_adapterhub_s_stack():
    """The second adapter reads the norm of what the first one left."""
    tuned = jp.transform(post_norm, jp.chain(pfeiffer(width=M), pfeiffer(width=M)))
    adapter = random(tuned)
    leaves = adapter["layer/mlp:delta"]
    layer_norm = lambda u: np.asarray(norm(PARAMS, u), np.float64)  # noqa: E731
    h = X @ PARAMS["w"]
    first = adapted(leaves["0"], h, layer_norm(h + X))
    second = adapted(leaves["1"], first, layer_norm(first + X))
    expected = layer_norm(second + X)
    np.testing.assert_allclose(tuned.apply(adapter, PARAMS, X), expected, rtol=1e-3, atol=1e-4)


def test_split_is_along_the_sequence():
    tuned = at(split(bottleneck(M), None, bottleneck(M, reads="input"), at=(2, 3)))
    adapter = random(tuned)
    leaves, h = adapter["w:out"], X @ PARAMS["w"]
    assert sorted(leaves) == ["0", "2"]
    expected = np.concatenate(
        [
            adapted(leaves["0"], h[:, :2], h[:, :2]),
            h[:, 2:3],
            adapted(leaves["2"], h[:, 3:], X[:, 3:]),
        ],
        axis=1,
    )
    np.testing.assert_allclose(tuned.apply(adapter, PARAMS, X), expected, rtol=1e-4, atol=1e-5)
    short = tuned.apply(adapter, PARAMS, X[:, :1])
    np.testing.assert_allclose(short, expected[:, :1], rtol=1e-4, atol=1e-5)


def test_batch_split_is_along_the_batch():
    tuned = at(
        batch_split(bottleneck(M), None, jp.chain(bottleneck(M), bottleneck(2)), sizes=(1, 2, 1))
    )
    adapter = random(tuned)
    leaves, h = adapter["w:out"], X @ PARAMS["w"]
    last = adapted(leaves["2"]["0"], h[3:], h[3:])
    expected = [adapted(leaves["0"], h[:1], h[:1]), h[1:3], adapted(leaves["2"]["1"], last, last)]
    y = jax.jit(tuned.apply)(adapter, PARAMS, X)
    np.testing.assert_allclose(y, np.concatenate(expected), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="'w:out' has 3 rows"):
        tuned.apply(adapter, PARAMS, X[:3])


@pytest.mark.parametrize("weights", [None, (0.7, -0.2)])
def test_average_is_of_what_the_adapters_do(weights):
    tuned = at(average(bottleneck(M), bottleneck(M), weights=weights))
    adapter = random(tuned)
    h = X @ PARAMS["w"]
    one, two = (adapted(adapter["w:out"][n], h, h) - h for n in ("0", "1"))
    a, b = weights or (0.5, 0.5)
    y = tuned.apply(adapter, PARAMS, X)
    np.testing.assert_allclose(y, h + a * one + b * two, rtol=1e-4, atol=1e-5)


def test_several_adapters_at_once_by_vmap():
    """AdapterHub's `Parallel`: the same batch through each of several adapters."""
    tuned = at(bottleneck(M))
    adapters = [random(tuned, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    together = jax.vmap(tuned.apply, in_axes=(0, None, None))(stacked, PARAMS, X)
    for one, y in zip(adapters, together, strict=True):
        np.testing.assert_allclose(y, tuned.apply(one, PARAMS, X), rtol=1e-5, atol=1e-5)


def test_parts_have_dropout_of_their_own():
    half = bottleneck(M, dropout=0.5, residual={})
    tuned = at(split(half, half, at=3))
    leaves = random(at(half))["w:out"]
    adapter = jp.Adapter({"w:out": {"0": leaves, "1": leaves}}, random(tuned).sites)
    y = tuned.apply(adapter, PARAMS, jnp.ones((1, 6, D)), dropout_key=jax.random.key(0))
    first, second = np.split(np.asarray(y) == 0, 2, axis=1)
    assert first.any() and not first.all() and not np.array_equal(first, second)


@pytest.mark.parametrize("compose", [chain, lambda *m: split(*m, at=2), average])
def test_adapters_trained_apart_are_joined(compose):
    methods = bottleneck(M), houlsby(width=2)
    parts = [random(at(m), seed) for seed, m in enumerate(methods)]
    tuned = at(compose(*methods))
    joined = join_adapters(random(tuned, 5), parts)
    assert joined["w:out"] == {"0": parts[0]["w:out"], "1": parts[1]["w:out"]}
    tuned.apply(joined, PARAMS, X)
    with pytest.raises(ValueError, match="adapter 0 does not fit its part at 'w:out'"):
        join_adapters(joined, parts[::-1])
    elsewhere = jp.Adapter({"v:out": parts[0]["w:out"]}, ())
    with pytest.raises(ValueError, match="only the adapter has 'v:out'"):
        join_adapters(joined, [elsewhere])


def test_shared_leaves_are_joined_by_name():
    methods = [bottleneck(2, phm=phm(2, shared=name)) for name in ("english", "german")]
    parts = [random(at(m), seed) for seed, m in enumerate(methods)]
    tuned = at(chain(*methods))
    joined = join_adapters(random(tuned), parts)
    for part, name in zip(parts, ("english", "german"), strict=True):
        assert joined[f"shared:{name}"] is part[f"shared:{name}"]
    with pytest.raises(ValueError, match="two adapters have leaves of their own at 'shared:engl"):
        same = at(chain(methods[0], methods[0]))
        join_adapters(random(same), [parts[0], parts[0]])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: split(bottleneck(2), at=2), ValueError, "0 increasing positions"),
        (lambda: split(*[bottleneck(2)] * 3, at=(3, 2)), ValueError, "2 increasing positions"),
        (lambda: batch_split(bottleneck(2), sizes=(1, 1)), ValueError, "one for each"),
        (lambda: average(bottleneck(2), weights=(1, 1)), ValueError, "one for each"),
        (lambda: average(jp.lora(2)), TypeError, "not of 'lora'"),
        (lambda: average(jp.rules(("a", bottleneck(2)))), TypeError, "not of Rules"),
    ],
)
def test_what_cannot_be_is_said(make, error, message):
    with pytest.raises(error, match=message):
        make()
