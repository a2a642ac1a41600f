"""Merging into packed weights: what is stored, how far it is from the sum, and what is dense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpeft as jp
from jaxpeft.quant.formats import dequantize

X = jnp.ones((2, 64))


def model(params, x):
    x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
    return x @ params["out"] + x @ params["plain"] + x @ params["alone"]


@pytest.fixture(scope="module")
def made():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"layers": (3, 64, 64), "out": (64, 32), "plain": (64, 32), "alone": (64, 32)}
    dense = {
        name: jax.random.normal(key, shape) / 8
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    packed = jp.quantize(dense, jp.rules(("{layers,out,alone}", jp.quant.nf4())))
    tuned = jp.transform(model, jp.rules(("{layers,out,plain}", jp.lora(2, alpha=4))), strict=True)
    adapter = tuned.init(jax.random.key(1), packed, X)
    noise = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + 0.1 * noise.standard_normal(x.shape).astype("f"), adapter)
    return tuned, moved, packed


def exact(adapter, packed, name):
    """`W + s A B` in float64."""
    a, b = (np.asarray(adapter[name][leaf], np.float64) for leaf in "ab")
    base = packed[name]
    dense = base if isinstance(base, jax.Array) else base.materialize()
    return np.asarray(dense, np.float64) + 2.0 * np.swapaxes(a, -1, -2) @ b


FORMATS = [None, jp.quant.int4(32, symmetric=False), jp.quant.int8()]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_errors_are_those_of_the_stored_weights_against_the_exact_sum(fmt, made):
    tuned, adapter, packed = made
    rules = fmt and jp.rules(("{layers,out,alone}", fmt))
    merged, errors = jp.quant.merge(tuned, adapter, packed, rules)
    assert errors.keys() == ({"layers", "out"} if fmt is None else {"layers", "out", "alone"})
    for name in ("layers", "out"):
        stored, wanted = merged[name], exact(adapter, packed, name)
        assert stored.format == (fmt or packed[name].format) and stored.shape == wanted.shape
        off = np.abs(np.asarray(stored.materialize(), np.float64) - wanted)
        np.testing.assert_allclose(errors[name].rms, np.sqrt((off**2).mean()), rtol=1e-4)
        worst = (off.max((-1, -2)) / np.abs(wanted).max((-1, -2))).max()
        np.testing.assert_allclose(errors[name].max_relative, worst, rtol=1e-4)
        added = wanted - np.asarray(packed[name].materialize(), np.float64)
        np.testing.assert_allclose(errors[name].update, np.sqrt((added**2).mean()), rtol=1e-4)
        # At most half a step between neighbours: nf4's are up to 0.304 of a block's largest apart.
        assert off.max() <= np.abs(wanted).max() * (0.304 / 2 + 0.01)
    np.testing.assert_allclose(merged["plain"], exact(adapter, packed, "plain"), atol=1e-6)


def test_a_weight_without_adapter_keeps_its_bits(made):
    tuned, adapter, packed = made
    merged, _ = jp.quant.merge(tuned, adapter, packed)
    assert merged["alone"] is packed["alone"]


def test_a_bare_format_takes_dense_matrices_as_quantize_does(made):
    tuned, adapter, packed = made
    merged, errors = jp.quant.merge(tuned, adapter, packed, jp.quant.int8())
    assert set(errors) == set(packed)
    again = jp.quantize(tuned.merge(adapter, packed), jp.quant.int8())
    for name in packed:
        for part, array in again[name].packed.items():
            near = dict(rtol=0, atol=1) if part == "codes" else dict(rtol=1e-5)
            np.testing.assert_allclose(merged[name].packed[part], array, **near)


def test_one_layer_is_dense_at_a_time(made):
    tuned, adapter, packed = made
    program = jax.make_jaxpr(lambda a, p: jp.quant.merge(tuned, a, p))(adapter, packed)
    assert "f32[64,64]" in str(program) and "f32[3,64,64]" not in str(program)
    assert "f32[3,64,64]" in str(jax.make_jaxpr(tuned.merge)(adapter, packed))


def test_a_bfloat16_weight_is_summed_from_its_codes_and_rounded_once(made):
    tuned, adapter, packed = made
    small = packed | {"out": jp.quantize({"w": packed["out"].materialize()}, jp.quant.nf4(),
                                         dtype=jnp.bfloat16)["w"]}  # fmt: skip
    codes = small["out"]
    wide = dequantize(codes.packed, codes.format, codes.packed_shape)
    wanted = exact(adapter, small | {"out": wide}, "out")
    merged = tuned.merge(adapter, small)["out"]
    assert merged.dtype == jnp.bfloat16
    assert (np.abs(np.asarray(merged, np.float64) - wanted) <= 2**-8 * np.abs(wanted) + 1e-6).all()


def test_what_cannot_be_packed_is_named(made):
    tuned, adapter, packed = made
    with pytest.raises(ValueError, match=r"'out' of shape \(64, 32\).*blocks of 128"):
        jp.quant.merge(tuned, adapter, packed, jp.rules(("out", jp.quant.nf4(128))))
    with pytest.raises(ValueError, match="matched none of the 4"):
        jp.quant.merge(tuned, adapter, packed, jp.rules(("in", jp.quant.nf4())))
    with pytest.raises(ValueError, match="fits none of the 4 weights"):
        jp.quant.merge(tuned, adapter, packed, jp.quant.nf4(4096))
    broken = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), adapter)
    with pytest.raises(ValueError, match="'layers'.* not finite"):
        jp.quant.merge(tuned, broken, packed, jp.rules(("layers", jp.quant.nf4())))
    with pytest.raises(ValueError, match="no stochastic rounding"):
        jp.quant.merge(tuned, adapter, packed, key=jax.random.key(0))


def test_stochastic_rounding_is_right_on_average_and_differs_by_weight():
    w = jnp.linspace(-1, 1, 64 * 8).reshape(64, 8)
    fmt = jp.quant.int8(32)
    count = 400

    def once(key):
        packed = jp.quantize({"a": w, "b": w}, fmt, key=key)
        return packed["a"].materialize(), packed["b"].materialize()

    first, second = jax.jit(jax.vmap(once))(jax.random.split(jax.random.key(0), count))
    assert (first[0] != second[0]).any() and (first[0] != first[1]).any()
    step = 1 / 127
    # The mean of `count` roundings is off by a standard error of at most half a step over the root.
    inside = jnp.abs(w) < jnp.max(jnp.abs(w).reshape(2, 32, 8), axis=1).repeat(32, 0) - step
    off = jnp.where(inside, jnp.abs(first.mean(0) - w), 0)
    assert off.max() < 5 * 0.5 * step / count**0.5
    with pytest.raises(ValueError, match="no stochastic rounding"):
        jp.quantize({"a": w}, jp.quant.nf4(), key=jax.random.key(0))


def test_sums_are_of_whole_float32_products_on_every_backend(made):
    """By default accelerators round the factors first; the programs say not to."""
    tuned, adapter, packed = made
    merge = jax.make_jaxpr(tuned.merge)(adapter, packed)
    svd = jax.make_jaxpr(lambda w: jp.quant.randomized_svd()(w, 2))(jnp.ones((64, 64)))
    for program in (merge, svd):
        text = str(program)
        assert text.count("dot_general[") == text.count("Precision.HIGHEST, Precision.HIGHEST") > 0
