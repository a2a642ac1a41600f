"""(IA)^3 against PEFT's layers, its laws, and that its fast path makes no scaled weight."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import IA3Config, get_peft_model

import jaxpeft as jp
from jaxpeft.methods.ia3 import ia3
from tests.cases import CASES
from tests.cases.hlo import made
from tests.cases.measure import compiled_base, compiled_step, difference, setting, values

NAMED = {
    "Flax linen layers: nn.Conv, 2-D, strided",
    "Flax linen layers: nn.Embed with a tied attend",
    "Flax linen loops and remat: nn.scan of nn.remat",
    "Flax nnx layers: nnx.MultiHeadAttention",
    "Experts: ebd,edf->ebf, one A and B an expert",
}
SOME = [case for case in CASES if case.id in NAMED]


def outputs():
    return jp.rules(("**", ia3()))


def inputs():
    return jp.rules(("**", ia3("in")))


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(5, 7), torch.nn.Linear(7, 4)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def ours(params, x):
    h = jnp.tanh(jp.tap(x @ params["up"] + params["up_bias"], "up:out"))
    return jp.tap(h, "down:in") @ params["down"] + params["down_bias"]


@pytest.fixture(scope="module")
def theirs():
    """PEFT's model, our params of its weights, and the two vectors."""
    config = IA3Config(target_modules=["up", "down"], feedforward_modules=["down"])
    model = get_peft_model(TwoLayers(), config).double()
    state = {n.split(".")[2:][0]: n for n, _ in model.named_parameters() if "base" in n}
    assert sorted(state) == ["down", "up"]
    params, vectors = {}, {}
    for name in ("up", "down"):
        layer = getattr(model.base_model.model, name)
        vector = torch.tensor(numbers(1, *layer.ia3_l["default"].shape), dtype=torch.float64)
        layer.ia3_l["default"].data = vector
        vectors[name] = jnp.asarray(vector.numpy().ravel(), jnp.float32)
        params[name] = jnp.asarray(layer.base_layer.weight.detach().numpy().T, jnp.float32)
        params[name + "_bias"] = jnp.asarray(layer.base_layer.bias.detach().numpy(), jnp.float32)
    return model, params, vectors


def test_at_activations_it_is_peft_s_layer(theirs):
    model, params, vectors = theirs
    x = numbers(2, 3, 5)
    rule = ia3("activations")
    tuned = jp.transform(ours, jp.rules(("up:out", rule), ("down:in", rule)))
    adapter = tuned.init(jax.random.key(0), params, x)
    assert {path: leaves["l"].shape for path, leaves in adapter.items()} == {
        "up:out": (7,),
        "down:in": (7,),
    }
    values = {"up:out": {"l": vectors["up"]}, "down:in": {"l": vectors["down"]}}
    got = tuned.apply(jp.Adapter(values, adapter.sites), params, x)
    want = model(torch.tensor(x, dtype=torch.float64)).detach().numpy()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_at_kernels_it_is_peft_s_layer_but_for_the_bias(theirs):
    model, params, vectors = theirs
    x, plain = numbers(2, 3, 5), {**params, "up_bias": jnp.zeros(7)}
    tuned = jp.transform(ours, jp.rules(("up", ia3()), ("down", ia3("in"))), strict=True)
    adapter = tuned.init(jax.random.key(0), plain, x)
    leaves = {name: {"l": vectors[name]} for name in ("up", "down")}
    adapter = jp.Adapter(leaves, adapter.sites)
    model.base_model.model.up.base_layer.bias.data.zero_()
    want = model(torch.tensor(x, dtype=torch.float64)).detach().numpy()
    np.testing.assert_allclose(tuned.apply(adapter, plain, x), want, rtol=1e-5, atol=1e-5)
    merged = ours(tuned.merge(adapter, plain), x)
    np.testing.assert_allclose(merged, want, rtol=1e-5, atol=1e-5)


PAIRS = [(case, outputs) for case in SOME] + [(case, inputs) for case in SOME[1:3]]


@pytest.mark.parametrize(("case", "tuning"), PAIRS, ids=lambda v: getattr(v, "id", "side"))
def test_the_laws(case, tuning):
    out = values(case, tuning)
    assert difference(out["unchanged"], out["base"]) < 1e-6
    assert difference(out["applied"], out["merged"]) < case.tolerance
    assert difference(out["applied"], out["base"]) > 1e-3
    assert difference(out["gradient"], out["merged gradient"]) < case.tolerance
    for i, name in enumerate(("unchanged", "applied")):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], out["mapped"])
        assert difference(one, out[name]) < case.tolerance


@pytest.mark.parametrize("case", SOME[1:4], ids=lambda case: case.id)
def test_the_compiled_step_makes_no_array_of_a_weight_s_size(case):
    sites = [site for site in setting(case, outputs).shapes.sites if site.linear]
    sizes = {size for s in sites for size in (s.size, math.prod(s.sizes("in", "out")))}
    found = made(compiled_step(case, outputs).as_text(), sizes)
    if found:
        found -= made(compiled_base(case).as_text(), sizes)
    assert not found


def test_the_number_of_parameters_is_that_of_the_outputs_or_inputs():
    x, params = jnp.ones((2, 5)), {"w": jnp.ones((5, 3, 4))}
    for on, shape in (("out", (3, 4)), ("in", (5,))):
        tuned = jp.transform(lambda p, x: jnp.einsum("bd,dnh->bnh", x, p["w"]), ia3(on))
        assert tuned.init(jax.random.key(0), params, x)["w"]["l"].shape == shape


def test_a_convolution_scales_its_channels():
    def conv(params, x):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, params, (1, 1), "SAME", dimension_numbers=dims)

    x, w, scale = numbers(1, 2, 4, 4, 3), numbers(2, 3, 3, 3, 5), numbers(3, 3)
    tuned = jp.transform(conv, ia3("in"), strict=True)
    adapter = tuned.init(jax.random.key(0), w, x)
    adapter = jp.Adapter({"": {"l": jnp.asarray(scale)}}, adapter.sites)
    np.testing.assert_allclose(tuned.apply(adapter, w, x), conv(w, x * scale), 1e-5, 1e-4)
    np.testing.assert_allclose(tuned.merge(adapter, w), w * scale[:, None], 1e-6)


def test_it_scales_what_another_method_has_tuned_and_a_bfloat16_base_stays():
    x, params = jnp.asarray(numbers(1, 3, 6), jnp.bfloat16), {"w": jnp.ones((6, 6), jnp.bfloat16)}
    tuned = jp.transform(lambda p, x: x @ p["w"], jp.chain(jp.lora(2), ia3()), strict=True)
    adapter = tuned.init(jax.random.key(0), params, x)
    moved = jax.tree.map(lambda leaf: leaf + 0.5, adapter)
    y = tuned.apply(moved, params, x)
    assert y.dtype == jnp.bfloat16
    wide = {"w": np.ones((6, 6)) + np.asarray(moved["w"]["0"]["a"]).T @ moved["w"]["0"]["b"]}
    want = np.asarray(x, np.float64) @ (wide["w"] * np.asarray(moved["w"]["1"]["l"]))
    np.testing.assert_allclose(np.asarray(y, np.float64), want, 0.03, 0.1)


@pytest.mark.parametrize("on", ["in", "out"])
def test_it_scales_what_meets_a_quantized_stack_of_layers(on):
    def scanned(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    x, params = numbers(1, 3, 32), {"w": jnp.asarray(numbers(2, 2, 32, 32))}
    params = jp.quant.quantize(params, jp.rules(("**", jp.quant.int8())))
    tuned = jp.transform(scanned, jp.rules(("w", ia3(on))), strict=True)
    adapter = tuned.init(jax.random.key(0), params, x)
    adapter = jax.tree.map(lambda leaf: leaf + 0.3 * numbers(3, *leaf.shape), adapter)
    got, merged = tuned.apply(adapter, params, x), tuned.merge(adapter, params)
    np.testing.assert_allclose(got, scanned(merged, x), rtol=1e-4, atol=1e-4)


def test_sides_are_checked():
    with pytest.raises(ValueError, match='on=\'side\' is none of "out", "in" and "activations"'):
        ia3("side")
