"""Invertible adapters: both couplings written out in float64, and what inverses promise."""

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


def coupled(leaves, x, affine):
    """`F` of the second part onto the first, then `G` of that: NICE as in AdapterHub, or affine."""
    leaves = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), leaves)

    def moved(leaf, x, other):
        inner = np.maximum(other @ leaf["down"].T + leaf["down_bias"], 0)
        y, width = inner @ leaf["up"] + leaf["up_bias"], x.shape[-1]
        return x * np.exp(np.tanh(y[..., :width])) + y[..., width:] if affine else x + y

    first, second = x[..., :3], x[..., 3:]
    first = moved(leaves["f"], first, second)
    return np.concatenate([first, moved(leaves["g"], second, first)], axis=-1)


@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_each_coupling_is_its_formula_and_its_leaves_are_few(coupling):
    tuned = jp.transform(model, jp.rules(("embeddings:out", invertible(D, coupling=coupling))))
    adapter, affine = random(tuned), coupling == "affine"
    assert sorted(adapter) == ["embeddings:out", "shared:invertible"]
    leaves = adapter["shared:invertible"]
    shapes = {f"{n}/{k}": v.shape for n, part in leaves.items() for k, v in part.items()}
    assert shapes["f/down"] == (2, 4) and shapes["f/up"] == (2, 3 * (1 + affine))
    assert shapes["g/down"] == (1, 3) and shapes["g/up"] == (1, 4 * (1 + affine))
    y = tuned.apply(adapter, (TABLE, HEAD), TOKENS)
    wanted = coupled(leaves, TABLE[TOKENS], affine) @ HEAD
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_a_fresh_adapter_changes_no_bit(coupling):
    tuned = jp.transform(model, tuning(coupling=coupling))
    adapter = jax.jit(tuned.init)(jax.random.key(0), (TABLE, HEAD), TOKENS)
    params = jax.tree.map(jnp.asarray, (TABLE, HEAD))
    np.testing.assert_array_equal(
        jax.jit(tuned.apply)(adapter, params, TOKENS), jax.jit(tuned.fn)(params, TOKENS)
    )


@pytest.mark.parametrize("coupling", ["additive", "affine"])
def test_gradients_of_both_places_add_up(coupling):
    """Where something happens between the two, the leaves they share train."""

    def between(params, tokens):
        x = jp.tap(params[0][tokens], "embeddings:out")
        return jp.tap(jnp.tanh(x), "head:in") @ params[1]

    tuned = jp.transform(between, tuning(coupling=coupling))
    adapter = random(tuned)
    with jax.enable_x64(True):
        adapter = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), adapter)

        def loss(adapter):
            return (tuned.apply(adapter, (TABLE, HEAD), TOKENS) ** 2).sum()

        gradient = jax.grad(loss)(adapter)["shared:invertible"]["g"]["up_bias"]
        assert len(gradient) == (8 if coupling == "affine" else 4) and np.abs(gradient).min() > 0
        for i in range(2):
            step = np.zeros(len(gradient))
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
