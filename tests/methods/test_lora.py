"""LoRA against its formula in float64, its dtypes, starts and dropout."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpeft as jp

ALL = "**"


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def matmul(params, x):
    return x @ params["w"]


def random_adapter(adapter):
    leaves, tree = jax.tree.flatten(adapter)
    return tree.unflatten([jnp.asarray(numbers(i, *x.shape)) for i, x in enumerate(leaves)])


@pytest.mark.parametrize(
    ("method", "scale"),
    [
        (jp.lora(2), 1.0),
        (jp.lora(2, alpha=3), 1.5),
        (jp.lora(4, alpha=1), 0.25),
        (jp.rslora(2), math.sqrt(2)),
        (jp.rslora(4, alpha=3), 1.5),
    ],
)
def test_the_formula(method, scale):
    params, x = {"w": numbers(1, 5, 7)}, numbers(2, 3, 5)
    tuned = jp.transform(matmul, method)
    adapter = random_adapter(tuned.init(jax.random.key(0), params, x))
    a, b = (np.asarray(adapter["w"][name], np.float64) for name in "ab")
    want = x.astype(np.float64) @ (params["w"] + scale * a.T @ b)
    np.testing.assert_allclose(tuned.apply(adapter, params, x), want, rtol=1e-5, atol=1e-5)


def test_a_starts_uniform_within_one_over_root_fan_in_and_b_at_zero():
    tuned = jp.transform(matmul, jp.lora(50))
    leaves = tuned.init(jax.random.key(0), {"w": jnp.ones((100, 200))}, jnp.ones((3, 100)))["w"]
    a = np.asarray(leaves["a"])
    assert 0.099 < np.abs(a).max() <= 0.1 and abs(a.mean()) < 0.003
    assert abs(a.std() - 0.1 / math.sqrt(3)) < 0.002  # of a uniform distribution
    assert not leaves["b"].any()


def test_gaussian_starts_with_deviation_one_over_rank():
    tuned = jp.transform(matmul, jp.lora(50, init=jp.gaussian))
    leaves = tuned.init(jax.random.key(0), {"w": jnp.ones((100, 200))}, jnp.ones((3, 100)))["w"]
    assert abs(float(leaves["a"].std()) - 1 / 50) < 0.001


def test_an_embedding_starts_with_a_at_zero():
    tuned = jp.transform(lambda params, ids: params["w"][ids], jp.rules((ALL, jp.lora(2))))
    leaves = tuned.init(jax.random.key(0), {"w": jnp.ones((11, 7))}, jnp.array([1]))["w"]
    assert not leaves["a"].any() and leaves["b"].all()


def test_a_bare_lora_leaves_tables_and_the_named_head_alone():
    def model(params, ids):
        return params["embed"][ids] @ params["mid"] @ params["embed"].T

    params = {"embed": jnp.ones((11, 7)), "mid": jnp.ones((7, 7))}
    adapter = jp.transform(model, jp.lora(2)).init(jax.random.key(0), params, jnp.array([1]))
    assert list(adapter) == ["mid"]


def test_keys_give_each_site_its_own_start():
    def model(params, x):
        return x @ params["p"] @ params["q"]

    params = {"p": jnp.ones((5, 5)), "q": jnp.ones((5, 5))}
    init = jp.transform(model, jp.lora(2)).init
    one, same = (init(jax.random.key(0), params, jnp.ones((1, 5))) for _ in range(2))
    other = init(jax.random.key(1), params, jnp.ones((1, 5)))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), one, same))
    assert not (one["p"]["a"] == one["q"]["a"]).any()
    assert not (one["p"]["a"] == other["p"]["a"]).any()


def test_a_bfloat16_base_stays_bfloat16_under_a_float32_adapter():
    params = {"w": jnp.asarray(numbers(1, 5, 7), jnp.bfloat16)}
    x = jnp.asarray(numbers(2, 3, 5), jnp.bfloat16)
    tuned = jp.transform(matmul, jp.lora(2))
    adapter = tuned.init(jax.random.key(0), params, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {jnp.dtype("float32")}
    assert tuned.apply(adapter, params, x).dtype == jnp.bfloat16
    assert tuned.merge(adapter, params)["w"].dtype == jnp.bfloat16
    assert jp.lora(2, dtype=jnp.bfloat16).init(
        jax.random.key(0), adapter.sites[0], params["w"]
    )["a"].dtype == jnp.bfloat16  # fmt: skip


def test_merging_into_bfloat16_errs_by_half_a_unit_in_the_last_place():
    params, x = {"w": jnp.asarray(numbers(1, 50, 70), jnp.bfloat16)}, jnp.ones((1, 50))
    tuned = jp.transform(matmul, jp.lora(2, alpha=3))
    adapter = random_adapter(tuned.init(jax.random.key(0), params, x))
    a, b = (np.asarray(adapter["w"][name], np.float64) for name in "ab")
    exact = np.asarray(params["w"], np.float64) + 1.5 * a.T @ b
    error = np.abs(np.asarray(tuned.merge(adapter, params)["w"], np.float64) - exact)
    # bfloat16 has 8 bits: half of 2**-7. And float32's own error of sums that nearly cancel.
    assert (error <= 2.0**-8 * np.abs(exact) + 1e-6).all()
    assert error.max() > 2.0**-10 * np.abs(exact).max()


@pytest.mark.parametrize("rank", [0, -1, 2.0, "8"])
def test_ranks_are_positive_ints(rank):
    with pytest.raises(ValueError, match="is not a rank. Use a positive int"):
        jp.lora(rank)


@pytest.mark.parametrize("options", [{"alpha": 0}, {"alpha": -1.0}])
def test_alpha_is_positive(options):
    with pytest.raises(ValueError, match="must be positive"):
        jp.lora(2, **options)


@pytest.mark.parametrize("dropout", [1.0, -0.1, 3])
def test_dropout_is_a_share(dropout):
    with pytest.raises(ValueError, match="is not a share. Use 0 <= dropout < 1"):
        jp.lora(2, dropout=dropout)


def test_a_rank_above_the_smaller_side_names_the_site_and_the_limit():
    with pytest.raises(ValueError, match=r"rank=6 exceeds .* 'w' \(5, 7\). Use rank <= 5"):
        jp.transform(matmul, jp.lora(6)).init(
            jax.random.key(0), {"w": jnp.ones((5, 7))}, jnp.ones((1, 5))
        )


# Dropout is seen directly through W = 0 and A = B = 1 (the identity): then y = dropout(x).


def dropout_of(x, key, *, rate=0.4, fn=matmul, shape=(), paths=("w",)):
    size = x.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(size), (*shape, size, size))
    params = {path: jnp.zeros_like(eye) for path in paths}
    tuned = jp.transform(fn, jp.lora(size, dropout=rate), strict=True)
    adapter = tuned.init(jax.random.key(0), params, x)
    adapter = jax.tree.map(lambda leaf: eye, adapter)
    return np.asarray(tuned.apply(adapter, params, x, dropout_key=key))


X = jnp.asarray(1 + np.abs(numbers(3, 40, 8)))


def test_no_key_means_no_dropout():
    np.testing.assert_allclose(dropout_of(X, None), X, rtol=1e-6)


def test_entries_are_dropped_at_the_rate_and_the_rest_scaled_up():
    y = dropout_of(X, jax.random.key(1))
    kept = y != 0
    np.testing.assert_allclose(y[kept], np.asarray(X / 0.6)[kept], rtol=1e-6)
    assert abs(kept.mean() - 0.6) < 4 * math.sqrt(0.24 / X.size)


def test_a_key_says_which_entries_are_dropped():
    first, again, other = (dropout_of(X, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert ((first == 0) != (other == 0)).mean() > 0.3


def test_raw_and_typed_keys_are_the_same_key():
    raw = jnp.asarray(jax.random.key_data(jax.random.key(1)))
    np.testing.assert_array_equal(dropout_of(X, raw), dropout_of(X, jax.random.key(1)))


def test_sites_drop_different_entries():
    def both(params, x):
        return jnp.stack([x @ params["p"], x @ params["q"]])

    p, q = dropout_of(X, jax.random.key(1), fn=both, paths=("p", "q"))
    assert ((p == 0) != (q == 0)).mean() > 0.3


def test_layers_drop_different_entries_the_same_in_a_scan_as_in_a_loop():
    def scanned(params, x):
        return lax.scan(jax.checkpoint(lambda _, w: (None, x @ w)), None, params["w"])[1]

    def indexed(params, x):
        return lax.scan(lambda _, i: (None, x @ params["w"][i]), None, jnp.arange(3))[1]

    def looped(params, x):
        return jnp.stack([x @ params["w"][i] for i in range(3)])

    first, *rest = (
        dropout_of(X, jax.random.key(1), fn=fn, shape=(3,)) for fn in (looped, scanned, indexed)
    )
    for other in rest:
        np.testing.assert_array_equal(other == 0, first == 0)
    assert ((first[0] == 0) != (first[1] == 0)).mean() > 0.3


def test_remat_recomputes_the_same_mask_for_the_gradient():
    params, x = {"w": jnp.asarray(numbers(1, 8, 8))}, X
    tuned = jp.transform(matmul, jp.lora(2, dropout=0.4))
    adapter = random_adapter(tuned.init(jax.random.key(0), params, x))

    def loss(adapter):
        return jnp.sin(tuned.apply(adapter, params, x, dropout_key=jax.random.key(1))).sum()

    plain, remat = jax.grad(loss)(adapter), jax.grad(jax.checkpoint(loss))(adapter)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, remat)


def test_merge_knows_no_dropout():
    params, x = {"w": jnp.asarray(numbers(1, 8, 7))}, X
    with_, without = (jp.transform(matmul, jp.lora(2, dropout=rate)) for rate in (0.4, 0.0))
    adapter = random_adapter(with_.init(jax.random.key(0), params, x))
    np.testing.assert_array_equal(
        with_.merge(adapter, params)["w"], without.merge(adapter, params)["w"]
    )


def test_fused_maps_get_an_a_and_b_of_their_own_when_asked():
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    w = jax.random.normal(jax.random.key(1), (3, 2, 6, 4))

    def model(params, x):
        return jnp.einsum("btd,sndh->sbtnh", x, params["w"])

    tuned = jp.transform(model, jp.lora(2, alpha=3, fused=(0,)), strict=True)
    adapter = tuned.init(jax.random.key(2), {"w": w}, x)
    shapes = {name: leaf.shape for name, leaf in adapter["w"].items()}
    assert shapes == {"a": (3, 2, 6), "b": (3, 2, 2, 4)}
    b = jax.random.normal(jax.random.key(3), (3, 2, 2, 4))
    adapter = jp.Adapter({"w": {"a": adapter["w"]["a"], "b": b}}, adapter.sites)
    a64, b64, w64 = (np.asarray(v, np.float64) for v in (adapter["w"]["a"], b, w))
    apart = [w64[s] + 1.5 * np.einsum("rd,rnh->ndh", a64[s], b64[s]) for s in range(3)]
    expected = np.einsum("btd,sndh->sbtnh", np.asarray(x, np.float64), np.stack(apart))
    np.testing.assert_allclose(tuned.apply(adapter, {"w": w}, x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        tuned.merge(adapter, {"w": w})["w"], np.stack(apart), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="axis 2 of 'w' is no axis of outputs"):
        jp.transform(model, jp.lora(2, fused=(2,))).init(jax.random.key(2), {"w": w}, x)
