"""ReFT against its formulas in float64, and its orthonormal rows against torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxpeft as jp
from jaxpeft.methods.reft import direft, loreft, noreft
from jaxpeft.methods.reft_form import orthonormal

D, R, LAYERS, ROWS, TIME = 6, 2, 3, 3, 7
RNG = np.random.default_rng(0)
W = RNG.normal(size=(LAYERS, D, D)) / 2
X = RNG.normal(size=(ROWS, TIME, D))
MASK = np.array([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]], bool)
SPANS = [(0, 7), (2, 7), (0, 4)]
METHODS = {"loreft": loreft, "noreft": noreft, "direft": direft}


def scanned(w, x, remat=False):
    def block(x, w):
        return jp.tap(jnp.tanh(x @ w), "layers:out"), None

    return jax.lax.scan(jax.checkpoint(block) if remat else block, x, w)[0]


def looped(w, x):
    for i in range(LAYERS):
        x = jp.tap(jnp.tanh(x @ w[i]), f"layers/{i}/block:out")
    return x


def random(tuned, w=W, x=X, seed=1):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: tuned.init(jax.random.key(0), w, x))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), shapes)


def edited(name, unit, h, activation):
    """`h'` of one hidden state by the formula in its paper; Gram-Schmidt makes R of LoReFT."""
    r = np.asarray(unit["rotation"], np.float64)
    if name == "loreft":
        rows = []
        for row in r:
            row = row - sum((row @ other) * other for other in rows)
            rows.append(row / np.linalg.norm(row))
        r = np.stack(rows)
        np.testing.assert_allclose(r @ r.T, np.eye(R), atol=1e-12)
    source = activation(np.asarray(unit["source"]) @ h + np.asarray(unit["bias"]))
    return h + r.T @ (source - (0 if name == "direft" else r @ h))


def oracle(name, leaves, first, last, tied, spans=SPANS, activation=lambda x: x):
    x = X
    for layer, w in enumerate(W):
        h = np.tanh(x @ w)
        x = h.copy()
        for row, (start, stop) in enumerate(spans):
            positions = {p: "first" for p in range(start, min(start + first, stop))}
            positions |= {p: "last" for p in range(max(stop - last, start), stop)}
            for p, end in positions.items():
                unit = leaves["first" if tied else end]
                unit = {n: leaf[layer] for n, leaf in unit.items()}
                x[row, p] = edited(name, unit, h[row, p], activation)
    return x


CASES = [
    (loreft, dict(first=3, last=0)),
    (loreft, dict(first=2, last=3)),
    (noreft, dict(first=2, last=2, tied=True)),
    (direft, dict(first=0, last=2)),
    (direft, dict(first=5, last=5, activation="relu")),
]


@pytest.mark.parametrize(("method", "options"), CASES)
def test_positions_and_formulas(method, options):
    with jax.enable_x64(True):
        name = method.__name__
        tuned = jp.transform(scanned, method(R, **options))
        adapter = random(tuned)
        leaves = adapter["layers:out"]
        relu = {"activation": lambda x: np.maximum(x, 0)} if "activation" in options else {}
        ends = options["first"], options["last"], options.get("tied", False)
        apply = jax.jit(tuned.apply)
        y = apply(adapter, W, X, token_mask=MASK)
        real = MASK[..., None]
        np.testing.assert_allclose(
            np.where(real, y, 0), np.where(real, oracle(name, leaves, *ends, **relu), 0), atol=1e-10
        )
        whole = oracle(name, leaves, *ends, spans=[(0, TIME)] * ROWS, **relu)
        np.testing.assert_allclose(apply(adapter, W, X), whole, atol=1e-10)


def test_every_position_may_be_edited_and_none():
    with jax.enable_x64(True):
        tuned = jp.transform(scanned, loreft(R, first=None))
        adapter = random(tuned)
        expected = oracle("loreft", adapter["layers:out"], TIME, 0, False, [(0, TIME)] * ROWS)
        np.testing.assert_allclose(tuned.apply(adapter, W, X), expected, atol=1e-10)
        none = tuned.apply(adapter, W, X, token_mask=np.zeros((ROWS, TIME), bool))
        np.testing.assert_allclose(none, tuned.fn(W, X), atol=1e-12)


def test_gradients_are_the_same_scanned_looped_and_remat():
    with jax.enable_x64(True):
        made = {
            "scan": jp.transform(scanned, loreft(R)),
            "remat": jp.transform(lambda w, x: scanned(w, x, True), loreft(R)),
            "loop": jp.transform(looped, jp.rules(("**/block:out", loreft(R)))),
        }
        adapter = random(made["scan"])
        apart = jp.Adapter(
            {
                f"layers/{i}/block:out": jax.tree.map(lambda leaf, i=i: leaf[i], adapter)[
                    "layers:out"
                ]
                for i in range(LAYERS)
            },
            random(made["loop"]).sites,
        )
        gradients = {
            name: jax.jit(jax.grad(lambda a, t=t: t.apply(a, W, X).sum()))(
                apart if name == "loop" else adapter
            )
            for name, t in made.items()
        }
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients["loop"].values())
        for other in (gradients["remat"]["layers:out"], stacked):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10),
                gradients["scan"]["layers:out"],
                other,
            )
        assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(gradients["scan"]))


@pytest.mark.parametrize("name", METHODS)
def test_a_fresh_adapter_changes_nothing(name):
    tuned = jp.transform(scanned, METHODS[name](R, first=2, last=2, dropout=0.1))
    adapter = jax.jit(tuned.init)(jax.random.key(0), W, X)
    assert adapter["layers:out"]["last"]["source"].shape == (LAYERS, R, D)
    count = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    assert count == 2 * LAYERS * R * (2 * D + 1)
    np.testing.assert_allclose(tuned.apply(adapter, W, X), tuned.fn(W, X), atol=1e-6)


def test_orthonormal_rows_of_a_file_stay_as_they_are():
    """torch's orthogonal parametrization makes R; given as `rotation` it is used as it is."""
    layer = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(D, R, bias=False))
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(0.3 * torch.randn(R, D).triu(1))
    rows = layer.weight.detach().numpy()
    np.testing.assert_allclose(rows @ rows.T, np.eye(R), atol=1e-6)
    np.testing.assert_allclose(orthonormal(jnp.asarray(rows)), rows, atol=1e-6)
    low = orthonormal(jnp.asarray(rows, jnp.bfloat16))
    np.testing.assert_allclose(low @ low.T, np.eye(R), atol=1e-6)


def test_training_keeps_the_rows_orthonormal():
    rotation = jnp.asarray(RNG.normal(size=(LAYERS, R, D)))
    gradient = jax.jit(jax.grad(lambda r: (orthonormal(r) ** 3).sum()))
    for _ in range(20):
        rotation = rotation - 0.3 * gradient(rotation)
    rows = np.asarray(orthonormal(rotation))
    np.testing.assert_allclose(rows @ rows.swapaxes(-1, -2), [np.eye(R)] * LAYERS, atol=1e-5)


def test_dropout_is_of_the_edited_positions():
    tuned = jp.transform(scanned, loreft(R, first=2, dropout=0.5))
    adapter = random(tuned)
    y, z = (
        np.asarray(tuned.apply(adapter, W[:, :, :], X, dropout_key=key))
        for key in (jax.random.key(1), None)
    )
    np.testing.assert_array_equal(y[:, 2:], z[:, 2:])
    assert 0.2 < (y[:, :2] == 0).mean() < 0.8


def test_bfloat16_stays():
    tuned = jp.transform(scanned, loreft(R))
    adapter = random(tuned)
    w, x = jnp.asarray(W, jnp.bfloat16), jnp.asarray(X, jnp.bfloat16)
    y = tuned.apply(adapter, w, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32), tuned.apply(adapter, W, X), atol=0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: loreft(0), "Use a positive int"),
        (lambda: loreft(2, first=-1), "no numbers of positions"),
        (lambda: loreft(2, first=0), "positions of one end or of both"),
        (lambda: loreft(2, first=None, last=1), "positions of one end or of both"),
        (lambda: loreft(2, dropout=1.0), "not a share"),
        (lambda: loreft(2, init="ones"), "none of 'zero', 'uniform'"),
        (lambda: random(jp.transform(scanned, loreft(D + 1))), "rank=7 exceeds the width"),
    ],
)
def test_what_cannot_be_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_mask_of_other_tokens_is_refused():
    tuned = jp.transform(scanned, loreft(R))
    with pytest.raises(ValueError, match="token_mask has 4 positions, but 'layers:out' has 7"):
        tuned.apply(random(tuned), W, X, token_mask=MASK[:, :4])
