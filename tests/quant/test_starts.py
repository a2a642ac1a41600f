"""PiSSA and LoftQ against their formulas in float64, peft, and the laws that they promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from peft.utils.loftq_utils import _low_rank_decomposition

import jaxpeft as jp
from jaxpeft.core.structured import dense
from jaxpeft.quant.formats import dequantize, quantize

X = jax.random.normal(jax.random.key(7), (2, 6, 6, 64))
NF4 = jp.quant.nf4(double=False)
SHAPES = {
    "layers": (3, 64, 64),
    "experts": (2, 64, 64),
    "conv": (3, 3, 64, 8),
    "heads": (64, 4, 16),
    "fused": (2, 64, 64),
}


def model(params, x):
    x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
    x = jnp.einsum("ebi,eio->ebo", x.reshape(2, -1, 64), params["experts"]).reshape(x.shape)
    x = x + jnp.einsum("bhwi,nio->nbhwo", x, params["fused"]).sum(0)
    x = x + jnp.einsum("bhwi,inm->bhwnm", x, params["heads"]).reshape(x.shape)
    shape = lax.conv_dimension_numbers(x.shape, SHAPES["conv"], ("NHWC", "HWIO", "NHWC"))
    return lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=shape)


def weights():
    """Matrices with a few strong directions, as trained ones have."""
    random = np.random.default_rng(0)

    def weight(shape):
        u, s, vt = np.linalg.svd(random.standard_normal(shape), full_matrices=False)
        return jnp.asarray(u * (0.8 ** np.arange(s.shape[-1]))[None, :] @ vt, jnp.float32)

    return {name: weight(shape) for name, shape in SHAPES.items()}


TUNING = jp.rules(("fused", jp.lora(4, alpha=6, fused=(0,))), ("**", jp.lora(4, alpha=6)))
TUNED = jp.transform(model, TUNING, strict=True)


@pytest.fixture(scope="module")
def made():
    params = weights()
    return params, TUNED.init(jax.random.key(0), params, X)


def matrices(name, w):
    """`(..., in, out)`, a matrix for each map."""
    return np.asarray(w, np.float64).reshape(
        {"conv": (576, 8), "heads": (64, 64)}.get(name, w.shape)
    )


def cut(matrix, rank=4):
    """The best approximation of this rank, in float64."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def distance(name, adapter, params, exact):
    """`|W - Q - s A B|` of the whole weight."""
    one = jp.Adapter({name: adapter[name]}, [s for s in adapter.sites if s.path == name])
    tuning = jp.transform(model, TUNING)
    return float(jnp.linalg.norm(tuning.merge(one, {name: params[name]})[name] - exact[name]))


def test_pissa_takes_the_principal_part_of_every_kind_of_weight(made):
    params, fresh = made
    rest, adapter = jp.pissa(TUNED, fresh, params)
    assert jax.tree.map(jnp.shape, adapter) == jax.tree.map(jnp.shape, fresh)
    for name, w in params.items():
        exact = matrices(name, w)
        np.testing.assert_allclose(matrices(name, rest[name]), exact - cut(exact), atol=1e-5)
    np.testing.assert_allclose(
        TUNED.apply(adapter, rest, X), model(params, X), rtol=1e-3, atol=1e-4
    )
    for leaves in adapter.values():  # the two factors share the singular values
        norms = jnp.linalg.norm(leaves["a"]), jnp.linalg.norm(leaves["b"])
        np.testing.assert_allclose(*norms, rtol=1e-4)


def test_pissa_equals_that_of_peft():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(16, 12, bias=False))
    params = {"w": jnp.asarray(module[0].weight.detach().numpy().T)}
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights="pissa")
    layer = peft.get_peft_model(module, config).base_model.model[0]
    tuned = jp.transform(lambda p, x: x @ p["w"], jp.lora(3, alpha=6))
    rest, adapter = jp.pissa(
        tuned, tuned.init(jax.random.key(0), params, jnp.ones((1, 16))), params
    )
    theirs = layer.base_layer.weight.detach().numpy().T
    np.testing.assert_allclose(rest["w"], theirs, atol=1e-6)
    a, b = (getattr(layer, f"lora_{x}")["default"].weight.detach().numpy() for x in "AB")
    signs = np.sign((np.asarray(adapter["w"]["a"]) * a).sum(1))
    np.testing.assert_allclose(adapter["w"]["a"], a * signs[:, None], atol=1e-5)
    np.testing.assert_allclose(adapter["w"]["b"], b.T * signs[:, None], atol=1e-5)


@pytest.mark.parametrize("start", [jp.pissa, jp.loftq])
def test_a_packed_base_is_closer_than_plain_packing_and_no_farther_with_iterations(start, made):
    names = ("layers", "conv")
    tuned = jp.transform(model, jp.rules(("{layers,conv}", jp.lora(4, alpha=6))))
    params, rules = made[0], jp.rules(("{layers,conv}", NF4))
    fresh = tuned.init(jax.random.key(0), params, X)
    plain = jp.quantize(params, rules, sites=fresh.sites)
    errors = [{name: distance(name, fresh, plain, params) for name in names}]
    for iterations in (1, 2, 5):
        packed, adapter = start(tuned, fresh, params, rules, iterations=iterations)
        assert all(packed[name].format == NF4 for name in names)
        assert packed["heads"] is params["heads"]
        errors.append({name: distance(name, adapter, packed, params) for name in names})
    for name in names:
        plainly, one, two, five = (error[name] for error in errors)
        assert five <= two * (1 + 1e-6) and two <= one * (1 + 1e-6) and one < 0.97 * plainly
    assert sum(errors[3].values()) < 0.99 * sum(errors[1].values())


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_is_the_alternation_of_peft(iterations):
    """PEFT's own loop wants an accelerator: its decomposition, and packing, in its loop."""
    w = np.random.default_rng(0).standard_normal((64, 32)).astype("f")
    tuned = jp.transform(lambda p, x: x @ p["w"], jp.lora(4, alpha=8))
    fresh = tuned.init(jax.random.key(0), {"w": w}, jnp.ones((1, 64)))
    packed, adapter = jp.loftq(tuned, fresh, {"w": jnp.asarray(w)}, NF4, iterations=iterations)
    best, update = (np.inf, None, None), np.zeros_like(w)
    for _ in range(iterations):
        codes = quantize(w - update, NF4)
        base = np.asarray(dequantize(codes, NF4, w.shape))
        found = _low_rank_decomposition(torch.tensor(w - base).T, 4)
        update = (found["L"] @ found["R"]).numpy().T
        off = np.linalg.norm(w - base - update)
        best = min(best, (off, base, update), key=lambda pair: pair[0])
    assert best[2] is update  # so that the last of PEFT's is the closest here
    np.testing.assert_allclose(packed["w"].materialize(), best[1], rtol=1e-5)
    ours = 2.0 * np.asarray(adapter["w"]["a"]).T @ np.asarray(adapter["w"]["b"])
    np.testing.assert_allclose(ours, update, atol=1e-5)


def test_a_quantized_base_keeps_its_format_and_one_layer_is_dense_at_a_time(made):
    params, fresh = made
    only = {"layers": params["layers"]}
    tuned = jp.transform(
        lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p["layers"])[0], jp.lora(4)
    )
    fresh = tuned.init(jax.random.key(0), only, X)
    packed = jp.quantize(only, NF4, dtype=jnp.bfloat16)
    program = jax.make_jaxpr(functools.partial(jp.pissa, tuned))(fresh, packed)
    assert "f32[64,64]" in str(program) and "f32[3,64,64]" not in str(program)
    rest, adapter = jp.pissa(tuned, fresh, packed)
    assert rest["layers"].format == NF4 and rest["layers"].dtype == jnp.bfloat16
    assert adapter["layers"]["a"].dtype == jnp.float32 and bool(adapter["layers"]["b"].any())


def test_a_bfloat16_base_stays_bfloat16_and_others_are_packed_as_they_are(made):
    params = {"w": jnp.asarray(weights()["heads"].reshape(64, 64), jnp.bfloat16)}
    params |= {"alone": params["w"]}
    tuned = jp.transform(
        lambda p, x: x @ p["w"] + x @ p["alone"], jp.rules(("w", jp.lora(4, dtype=jnp.bfloat16)))
    )
    fresh = tuned.init(jax.random.key(0), params, X)
    rest, adapter = jp.pissa(tuned, fresh, params)
    assert rest["w"].dtype == adapter["w"]["a"].dtype == jnp.bfloat16
    assert rest["alone"] is params["alone"]
    off = tuned.merge(adapter, rest)["w"].astype("float32") - params["w"].astype("float32")
    assert jnp.linalg.norm(off) < 2**-8 * jnp.linalg.norm(params["w"].astype("float32"))
    packed, _ = jp.loftq(tuned, fresh, params, NF4)
    again = jp.quantize(params, NF4)
    for name, codes in again["alone"].packed.items():
        np.testing.assert_array_equal(packed["alone"].packed[name], codes)


def test_random_subspaces_find_the_same_triplets(made):
    matrix = np.asarray(made[0]["layers"])
    u, s, vt = jp.quant.randomized_svd()(jnp.asarray(matrix), 4)
    np.testing.assert_allclose((u * s[..., None, :]) @ vt, cut(matrix), atol=1e-5)


def test_the_difference_is_lora_on_the_original_base(made):
    params, _ = made
    for make in (jp.lora, jp.rslora):
        tuning = jp.rules(("fused", make(4, alpha=6, fused=(0,))), ("layers", make(4, alpha=6)))
        tuned = jp.transform(model, tuning, strict=True)
        rest, start = jp.pissa(tuned, tuned.init(jax.random.key(0), params, X), params)
        trained = jax.tree.map(
            lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), start
        )
        plain, double = jp.hf.difference(tuned, trained, start)
        assert double["layers"]["a"].shape == (3, 8, 64)
        both = tuned.merge(trained, rest), plain.merge(double, params)
        for ours, theirs in zip(*map(jax.tree.leaves, both), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_wrong_calls_are_named(made):
    params, fresh = made
    with pytest.raises(ValueError, match="iterations=0"):
        jp.pissa(TUNED, fresh, params, iterations=0)
    packed = jp.quantize(params, NF4, sites=fresh.sites)
    with pytest.raises(ValueError, match="loses nothing"):
        jp.loftq(TUNED, fresh, packed, NF4)
    with pytest.raises(ValueError, match="rules match no site of lora"):
        jp.loftq(TUNED, fresh, params, None)
    with pytest.raises(ValueError, match="matched none of the 5"):
        jp.pissa(TUNED, fresh, params, jp.rules(("other", NF4)))
    scaled = jp.transform(model, jp.rules(("layers", jp.ia3())))
    with pytest.raises(ValueError, match=r"no site has lora\(\)"):
        jp.pissa(scaled, scaled.init(jax.random.key(0), params, X), params)
    twice = jp.transform(
        model, jp.chain(jp.rules(("layers", jp.lora(2))), jp.rules(("layers", jp.ia3())))
    )
    with pytest.raises(ValueError, match=r"'layers' has lora\+ia3"):
        jp.pissa(twice, twice.init(jax.random.key(0), params, X), params)
    some = jp.transform(model, jp.layers(jp.rules(("layers", jp.lora(2))), slice(1, None)))
    upper = some.init(jax.random.key(0), params, X)
    with pytest.raises(ValueError, match="'layers' has lora.*all layers"):
        jp.pissa(some, upper, params)
    with pytest.raises(ValueError, match="'layers' has lora.*all layers"):
        jp.hf.difference(some, upper, upper)
    with pytest.raises(ValueError, match="different sites"):
        jp.hf.difference(TUNED, fresh, twice.init(jax.random.key(0), params, X))


def test_on_an_explicit_mesh_all_lies_as_the_base_does():
    tuned = jp.transform(lambda p, x: x @ p["w"][0] + x @ p["w"][1], jp.lora(2))
    whole, x = {"w": weights()["experts"]}, jnp.ones((2, 64))
    fresh = jax.tree.map(lambda a: a + 0.1, tuned.init(jax.random.key(0), whole, x))
    groups = jp.transform(tuned.fn, jp.qalora(2, group=32))
    pooled = jax.tree.map(lambda a: a + 0.1, groups.init(jax.random.key(0), whole, x))
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    spec = P(None, "data", "model")

    def made(params):
        packed, adapter = jp.loftq(tuned, fresh, params, NF4)
        merged = jp.quant.merge(tuned, adapter, packed).params
        integers = jp.quantize(params, jp.quant.int4(32))
        return packed, merged, jp.quant.merge(groups, pooled, integers).params

    expected = made(whole)
    with jax.set_mesh(mesh):
        found = made({"w": jax.device_put(whole["w"], NamedSharding(mesh, spec))})
    for ours, one in zip(found, expected, strict=True):
        assert ours["w"].sharding.spec == spec
        np.testing.assert_allclose(dense(ours["w"]), dense(one["w"]), atol=1e-5)
