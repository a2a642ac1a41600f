"""QALoRA against its formula, PEFT's, and the law that it merges without touching a code."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import lax
from peft.tuners.lora.variants import QALoraLinearVariant

import jaxpeft as jp
from jaxpeft.quant.formats import Quantized, check, to_compressed_tensors, to_gptq

X = jax.random.normal(jax.random.key(7), (5, 64))
INTEGERS = [
    jp.quant.int4(16),
    jp.quant.int4(32, symmetric=False, scale="bfloat16"),
    jp.quant.int8(16),
    jp.quant.int8(8, symmetric=False),
]


def model(params, x):
    x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
    return x @ params["out"]


def moved(adapter):
    noise = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.2 * noise.standard_normal(x.shape).astype("f"), adapter)


def base():
    first, second = jax.random.split(jax.random.key(0))
    layers = jax.random.normal(first, (3, 64, 64)) / 8
    # A block without any scale must take an update in too.
    return {"layers": layers.at[1, :32, 5].set(0), "out": jax.random.normal(second, (64, 8)) / 8}


@pytest.fixture(scope="module")
def made():
    tuned = jp.transform(model, jp.qalora(2, alpha=3, group=32), strict=True)
    fresh = tuned.init(jax.random.key(1), base(), X)
    return tuned, fresh, moved(fresh)


def update(adapter, name, group):
    a, b = (np.asarray(adapter[name][leaf], np.float64) for leaf in "ab")
    return np.repeat(1.5 * np.swapaxes(a, -1, -2) @ b, group, axis=-2)


def test_the_weight_is_the_formula_and_a_fresh_adapter_changes_nothing(made):
    tuned, fresh, adapter = made
    params = base()
    assert {k: v.shape for k, v in fresh["layers"].items()} == {"a": (3, 2, 2), "b": (3, 2, 64)}
    np.testing.assert_array_equal(tuned.apply(fresh, params, X), model(params, X))
    merged = tuned.merge(adapter, params)
    for name, w in params.items():
        np.testing.assert_allclose(merged[name], w + update(adapter, name, 32), atol=1e-6)
    np.testing.assert_allclose(
        tuned.apply(adapter, params, X), model(merged, X), rtol=1e-4, atol=1e-4
    )


def test_products_equal_those_of_peft(made):
    tuned, _, adapter = made
    group, inputs, rank = 32, 64, 2
    a, b = (np.array(adapter["out"][leaf]) for leaf in "ab")
    lora_a = torch.nn.Linear(inputs // group, rank, bias=False)
    lora_b = torch.nn.Linear(rank, 8, bias=False)
    lora_a.weight.data = torch.tensor(a * group**2 / inputs)
    lora_b.weight.data = torch.tensor(b.T.copy())
    module = types.SimpleNamespace(
        lora_A={"own": lora_a}, lora_B={"own": lora_b}, scaling={"own": 1.5}, training=False,
        lora_dropout={"own": torch.nn.Identity()}, qalora_group_size={"own": group},
        in_features=inputs,
    )  # fmt: skip
    zero = torch.zeros(5, 8)
    theirs = QALoraLinearVariant.forward(module, "own", torch.tensor(np.array(X)), zero)
    one = jp.transform(lambda w, x: x @ w["out"], jp.qalora(2, alpha=3, group=32), strict=True)
    leaves = jp.Adapter({"out": adapter["out"]}, [s for s in adapter.sites if s.path == "out"])
    ours = one.apply(leaves, {"out": jnp.zeros((64, 8))}, X)
    np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fmt", INTEGERS, ids=str)
def test_it_merges_into_zero_points_alone(fmt, made):
    tuned, _, adapter = made
    packed = jp.quantize(base(), fmt)
    merged, errors = jp.quant.merge(tuned, adapter, packed)
    for name, before in packed.items():
        after = merged[name]
        check(after.packed, after.format, after.packed_shape)
        assert after.format.zero == "float32" and not after.format.symmetric
        old, new = np.asarray(before.packed["codes"]), np.asarray(after.packed["codes"])
        if old.dtype == np.int8:  # the same values, counted from 0
            old = (old.astype(int) + 128).astype(np.uint8)
        np.testing.assert_array_equal(old, new)
        kept = np.asarray(before.packed["scale"] != 0)
        assert (np.asarray(after.packed["scale"])[kept] == before.packed["scale"][kept]).all()
        exact = before.materialize() + update(adapter, name, 32)
        np.testing.assert_allclose(after.materialize(), exact, atol=1e-6)
        assert errors[name].max_relative < 1e-6
    np.testing.assert_allclose(
        jp.lift(model)(merged, X), tuned.apply(adapter, packed, X), rtol=1e-4, atol=1e-4
    )


def test_it_is_rounded_where_zero_points_cannot_take_it(made):
    tuned, _, adapter = made
    coarse = jp.quantize(base(), jp.quant.int4(64))
    for packed, rules in [
        (coarse, None),  # blocks of 64 inputs have two groups
        (jp.quantize(base(), jp.quant.nf4()), None),
        (jp.quantize(base(), jp.quant.int4(32)), jp.quant.int4(32)),  # asked for as it was
    ]:
        merged, errors = jp.quant.merge(tuned, adapter, packed, rules)
        assert merged["out"].format == packed["out"].format
        assert errors["out"].max_relative > 1e-3


def test_files_of_integers_refuse_zero_points_between_codes(made):
    tuned, _, adapter = made
    for fmt, write in [(jp.quant.int4(32), to_gptq), (jp.quant.int8(32), to_compressed_tensors)]:
        out = jp.quant.merge(tuned, adapter, jp.quantize(base(), fmt)).params["out"]
        with pytest.raises(ValueError, match="zero points between codes"):
            write(Quantized(out.packed, out.format, out.packed_shape))


def test_heads_are_inputs_in_order_and_groups_must_fit_them():
    module = nn.MultiHeadDotProductAttention(4, qkv_features=64)
    x = jax.random.normal(jax.random.key(0), (2, 3, 64))
    variables = module.init(jax.random.key(1), x)
    tuned = jp.transform(module, jp.rules(("**/out/kernel", jp.qalora(2, group=32))), strict=True)
    adapter = moved(tuned.init(jax.random.key(0), variables, x))
    merged = tuned.merge(adapter, variables)
    np.testing.assert_allclose(
        module.apply(merged, x), tuned.apply(adapter, variables, x), rtol=1e-4, atol=1e-5
    )
    kernel = merged["params"]["out"]["kernel"] - variables["params"]["out"]["kernel"]
    flat = np.asarray(kernel).reshape(2, 32, 64)
    np.testing.assert_allclose(flat, flat[:, :1].repeat(32, 1), atol=1e-6)
    heads = jp.transform(lambda p, x: jnp.einsum("bhd,hdo->bo", x, p["w"]), jp.qalora(1, group=16))
    with pytest.raises(ValueError, match="cross the input axes"):
        heads.init(jax.random.key(0), {"w": jnp.ones((4, 12, 8))}, jnp.ones((2, 4, 12)))


def test_wrong_groups_are_named():
    with pytest.raises(ValueError, match="group=0 is no size"):
        jp.qalora(2, group=0)
    with pytest.raises(ValueError, match=r"group=24 does not divide the 64 inputs of 'layers'"):
        jp.transform(model, jp.qalora(2, group=24)).init(jax.random.key(0), base(), X)
