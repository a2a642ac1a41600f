"""Invertible adapters: NICE written out in float64, and what inverses promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.methods.invertible import invertible

D, ROWS = 7, 4
RNG = np.random.default_rng(0)
TABLE, HEAD = RNG.normal(size=(9, D)), RNG.normal(size=(D, 9))
TOKENS = RNG.integers(0, 9, (ROWS, 3))


def model(params, tokens):
    x = jp.tap(params[0][tokens], "embeddings:out")
    return jp.tap(x, "head:in") @ params[1]


def tuning(**options):
    return jp.rules(
        ("embeddings:out", invertible(D, **options)),
        ("head:in", invertible(D, inverse=True, **options)),
    )


def random(tuned):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: tuned.init(jax.random.key(0), (TABLE, HEAD), TOKENS))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), shapes)


def nice(leaves, x):
    """AdapterHub's forward: `F` of the second part onto the first, then `G` of that."""
    leaves = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), leaves)

    def net(leaf, x):
        inner = np.maximum(x @ leaf["down"].T + leaf["down_bias"], 0)
        return inner @ leaf["up"] + leaf["up_bias"]

    first, second = x[..., :3], x[..., 3:]
    first = first + net(leaves["f"], second)
    return np.concatenate([first, second + net(leaves["g"], first)], axis=-1)


def test_nice_is_the_formula_and_its_leaves_are_few():
    tuned = jp.transform(model, jp.rules(("embeddings:out", invertible(D))))
    adapter = random(tuned)
    assert sorted(adapter) == ["embeddings:out", "shared:invertible"]
    leaves = adapter["shared:invertible"]
    shapes = {f"{n}/{k}": v.shape for n, part in leaves.items() for k, v in part.items()}
    assert shapes["f/down"] == (2, 4) and shapes["f/up"] == (2, 3)
    assert shapes["g/down"] == (1, 3) and shapes["g/up"] == (1, 4)
    y = tuned.apply(adapter, (TABLE, HEAD), TOKENS)
    np.testing.assert_allclose(y, nice(leaves, TABLE[TOKENS]) @ HEAD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_the_inverse_undoes_it_with_the_same_leaves(coupling):
    tuned = jp.transform(model, tuning(coupling=coupling))
    adapter = random(tuned)
    params = TABLE, HEAD
    assert sorted(adapter) == ["embeddings:out", "head:in", "shared:invertible"]
    base = TABLE[TOKENS] @ HEAD
    np.testing.assert_allclose(tuned.apply(adapter, params, TOKENS), base, rtol=1e-3, atol=1e-3)
    half = jp.transform(model, jp.rules(("embeddings:out", invertible(D, coupling=coupling))))
    one = jp.Adapter({n: adapter[n] for n in random(half)}, random(half).sites)
    assert np.abs(half.apply(one, params, TOKENS) - base).max() > 1
    if coupling == "affine":
        # Scales stay between 1/e and e.
        x = half.apply(one, (TABLE, np.eye(D)), TOKENS)
        y = half.apply(one, (TABLE + 1e-3 * np.eye(9, D), np.eye(D)), TOKENS)
        assert np.isfinite(x).all() and np.isfinite(y).all()


def test_a_fresh_adapter_changes_no_bit():
    tuned = jp.transform(model, tuning())
    adapter = jax.jit(tuned.init)(jax.random.key(0), (TABLE, HEAD), TOKENS)
    params = jax.tree.map(jnp.asarray, (TABLE, HEAD))
    np.testing.assert_array_equal(
        jax.jit(tuned.apply)(adapter, params, TOKENS), jax.jit(tuned.fn)(params, TOKENS)
    )


def test_gradients_of_both_places_add_up():
    """Where something happens between the two, the leaves they share train."""

    def between(params, tokens):
        x = jp.tap(params[0][tokens], "embeddings:out")
        return jp.tap(jnp.tanh(x), "head:in") @ params[1]

    tuned = jp.transform(between, tuning())
    adapter = random(tuned)
    with jax.enable_x64(True):
        adapter = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), adapter)

        def loss(adapter):
            return (tuned.apply(adapter, (TABLE, HEAD), TOKENS) ** 2).sum()

        gradient = jax.grad(loss)(adapter)["shared:invertible"]["g"]["up_bias"]
        assert gradient.shape == (4,) and np.abs(gradient).min() > 0
        for i in range(2):
            step = np.zeros(4)
            step[i] = 1e-5

            def moved(sign, step=step):
                leaves = dict(adapter["shared:invertible"])
                leaves["g"] = leaves["g"] | {"up_bias": leaves["g"]["up_bias"] + sign * step}
                return jp.Adapter(dict(adapter) | {"shared:invertible": leaves}, adapter.sites)

            difference = (loss(moved(1)) - loss(moved(-1))) / 2e-5
            np.testing.assert_allclose(gradient[i], difference, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: invertible(1), "is not the width of embeddings"),
        (lambda: invertible(8, coupling="glow"), "none of 'additive', 'affine'"),
        (lambda: invertible(8, init="mam"), "none of 'zero', 'bert'"),
        (
            lambda: random(jp.transform(model, jp.rules(("head:in", invertible(8))))),
            "at 'head:in', which has 7 features",
        ),
    ],
)
def test_what_cannot_be_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()
