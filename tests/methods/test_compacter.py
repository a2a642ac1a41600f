"""Compacter against the sum of Kronecker products, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.core.tap import Here
from jaxpeft.methods.adapters import compacter, compacter_plus
from jaxpeft.methods.bottleneck import bottleneck
from jaxpeft.methods.phm import phm

D, M, N = 12, 4, 2
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, D))
SITE = jp.Site("mlp:out", (D,), "float64", ("in",), ("call",))


def random(tree):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float64), tree)


def abstract(tuned):
    return jax.eval_shape(lambda: tuned.init(jax.random.key(0), PARAMS, X))


def factors(leaves, name):
    """An array, or the product of its two factors."""
    if name in leaves:
        return np.asarray(leaves[name])
    return np.asarray(leaves[f"{name}_left"]) @ np.asarray(leaves[f"{name}_right"])


def product(x, rule, weight, bias):
    """`x sum_i kron(C_i, W_i) + b`."""
    return x @ sum(np.kron(c, w) for c, w in zip(rule, weight, strict=True)) + bias


def oracle(x, leaves, rules, weights):
    inner = product(x, rules[0], factors(weights, "down"), leaves["down_bias"])
    return x + product(np.maximum(inner, 0), rules[1], factors(weights, "up"), leaves["up_bias"])


FORMS = {
    "compacter": phm(N),
    "rank 2": phm(N, rank=2),
    "whole weights": phm(N, rank=None),
    "factorized rule": phm(N, rule_rank=1),
    "a rule each": phm(N, shared=None),
    "a factorized rule each": phm(N, shared=None, rule_rank=1),
    "shared weights": phm(N, sizes=(D, M)),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_maps_are_sums_of_kronecker_products(name):
    with jax.enable_x64(True):
        form = FORMS[name]
        method = bottleneck(M, phm=form)
        leaves, common = jax.eval_shape(
            lambda key: (
                method.init(key, SITE, None),
                {at: f(key) for at, f in method.shared.items()},
            ),
            jax.random.key(0),
        )
        leaves, common = random(leaves), random(common)
        rules = [
            factors(common["compacter"], "rule") if common else factors(leaves, f"{side}_rule")
            for side in ("down", "up")
        ]
        weights = common["compacter"] if form.sizes else leaves
        given = leaves | ({"shared": common} if common else {})
        y = method.call(SITE, given, jnp.asarray(X), Here())
        np.testing.assert_allclose(y, oracle(X, leaves, rules, weights), rtol=1e-10)


def model(params, x):
    """Two layers of a sublayer in a scan, and one behind."""

    def step(x, w):
        return jnp.tanh(jp.tap(x @ w, "layers/mlp:delta")), None

    x = jax.lax.scan(step, x, params["layers"])[0]
    return jp.tap(x @ params["last"], "last/attn:delta")


PARAMS = {"layers": RNG.normal(size=(2, D, D)) / 3, "last": RNG.normal(size=(D, D)) / 3}


def test_all_layers_and_places_have_one_rule():
    tuned = jp.transform(model, compacter(width=M, phm=phm(N), activation="relu"))
    adapter = abstract(tuned)
    assert sorted(adapter) == ["last/attn:delta", "layers/mlp:delta", "shared:compacter"]
    assert adapter["shared:compacter"]["rule"].shape == (N, N, N)
    # The rule, and rank * (in + out) for each map and its bias.
    count = N**3 + 3 * (2 * (D + M) + D + M)
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter)) == count
    with jax.enable_x64(True):
        adapter = random(adapter)
        rule = [np.asarray(adapter["shared:compacter"]["rule"])] * 2
        x = X
        for i in range(2):
            leaves = jax.tree.map(lambda leaf, i=i: leaf[i], adapter["layers/mlp:delta"])
            x = np.tanh(oracle(x @ PARAMS["layers"][i], leaves, rule, leaves))
        leaves = adapter["last/attn:delta"]
        expected = oracle(x @ PARAMS["last"], leaves, rule, leaves)
        np.testing.assert_allclose(tuned.apply(adapter, PARAMS, X), expected, rtol=1e-8)
        gradient = jax.grad(lambda a: tuned.apply(a, PARAMS, X).sum())(adapter)
        assert np.abs(gradient["shared:compacter"]["rule"]).min() > 0


def test_compacter_plus_goes_to_feed_forward_sublayers_only():
    tuned = jp.transform(model, compacter_plus(width=M, phm=phm(N)))
    assert sorted(abstract(tuned)) == ["layers/mlp:delta", "shared:compacter"]


def test_a_rule_can_be_left_as_it_is():
    for form, where in ((phm(N, learn_rule=False), "shared:compacter"), (None, "last/attn:delta")):
        form = form or phm(N, learn_rule=False, shared=None)
        tuned = jp.transform(model, compacter(width=M, phm=form))
        marks = tuned.trainable(
            jax.eval_shape(lambda t=tuned: t.init(jax.random.key(0), PARAMS, X))
        )
        frozen = {"rule", "down_rule", "up_rule"}
        assert {name: not mark for name, mark in marks[where].items()} == {
            name: name in frozen for name in marks[where]
        }


def test_starts():
    """Rules normal with `spread`, weights Xavier normal in each slice, as AdapterHub has them."""
    method = bottleneck(64, phm=phm(4, spread=0.3, rule_rank=None), init="bert")
    site = jp.Site("a:out", (20, 256), "float32", ("stack", "in"), ("call",))
    leaves = jax.jit(lambda key: method.init(key, site, None))(jax.random.key(0, impl="unsafe_rbg"))
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    assert shapes["down_left"] == (20, 4, 64, 1) and shapes["up_right"] == (20, 4, 1, 64)
    for name in ("down_left", "down_right", "up_left", "up_right"):
        expected = (2 / sum(shapes[name][-2:])) ** 0.5
        np.testing.assert_allclose(np.std(leaves[name]), expected, rtol=0.05)
    rule = method.shared["compacter"](jax.random.key(1, impl="unsafe_rbg"))["rule"]
    np.testing.assert_allclose(np.std(rule), 0.3, rtol=0.25)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: phm(0), "Use a positive int"),
        (lambda: phm(2, shared=None, sizes=(4, 2)), "shared= must name them"),
        (lambda: bottleneck(M, phm=phm(N), init="mam"), "init='mam' is none of 'zero', 'bert'"),
        (lambda: bottleneck(M, phm=phm(5)).init(jax.random.key(0), SITE, None), "does not divide"),
        (
            lambda: bottleneck(M, phm=phm(N, sizes=(8, 4))).init(jax.random.key(0), SITE, None),
            "are shared, but a site has",
        ),
    ],
)
def test_what_cannot_be_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()
