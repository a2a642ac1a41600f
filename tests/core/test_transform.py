"""`Tuned`: its adapter, its errors, and when it traces."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp

PARAMS = {"p": {"w": jnp.cos(jnp.arange(35.0)).reshape(5, 7)}, "q": {"w": jnp.ones((7, 3))}}
X = jnp.sin(jnp.arange(10.0)).reshape(2, 5)


def model(params, x):
    return jnp.tanh(x @ params["p"]["w"]) @ params["q"]["w"]


TUNED = jp.transform(model, jp.lora(2), strict=True)


@pytest.fixture(scope="module")
def fresh():
    return TUNED.init(jax.random.key(0), PARAMS, X)


@pytest.fixture(scope="module")
def adapter(fresh):
    return jax.tree.map(lambda leaf: leaf + 0.3, fresh)


def test_an_adapter_is_a_mapping_and_a_pytree(fresh):
    assert list(fresh) == ["p/w", "q/w"] and len(fresh) == 2 and "p/w" in fresh
    assert fresh["p/w"]["a"].shape == (2, 5) and fresh["p/w"]["b"].shape == (2, 7)
    paths = [jax.tree_util.keystr(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(fresh)]
    assert paths == ["['p/w']['a']", "['p/w']['b']", "['q/w']['a']", "['q/w']['b']"]
    assert [site.path for site in fresh.sites] == list(fresh)
    assert repr(fresh) == "Adapter(2 sites, 44 parameters)"
    again = jax.tree.unflatten(jax.tree.structure(fresh), jax.tree.leaves(fresh))
    assert type(again) is jp.Adapter and jax.tree.structure(again) == jax.tree.structure(fresh)


def test_adapters_average_stack_and_swap(adapter, fresh):
    mean = jax.tree.map(lambda a, b: (a + b) / 2, adapter, fresh)
    np.testing.assert_allclose(mean["p/w"]["a"], fresh["p/w"]["a"] + 0.15, rtol=1e-5, atol=1e-6)
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), adapter, fresh)
    both = jax.vmap(TUNED.apply, in_axes=(0, None, None))(stack, PARAMS, X)
    for got, one in zip(both, (adapter, fresh), strict=True):
        np.testing.assert_allclose(got, TUNED.apply(one, PARAMS, X), rtol=1e-5, atol=1e-5)


def counted():
    """A model that counts how often Python runs it: once a trace."""
    traces = []

    def model_and_count(params, x):
        traces.append(None)
        return model(params, x)

    return jp.transform(model_and_count, jp.lora(2), strict=True), traces


def test_steps_and_other_adapters_do_not_trace_again(adapter):
    tuned, traces = counted()
    optimizer = optax.adam(0.1)

    @jax.jit
    def step(adapter, state, params, x):
        slope = jax.grad(lambda a: tuned.apply(a, params, x).sum())(adapter)
        updates, state = optimizer.update(slope, state, adapter)
        return optax.apply_updates(adapter, updates), state

    start, other = (tuned.init(jax.random.key(seed), PARAMS, X) for seed in (0, 9))
    traces.clear()
    now, state = step(start, optimizer.init(start), PARAMS, X)
    once = len(traces)
    assert once >= 1
    for _ in range(2):
        now, state = step(now, state, PARAMS, X)
    step(other, optimizer.init(other), PARAMS, X)
    step(adapter, optimizer.init(adapter), PARAMS, X)
    assert len(traces) == once


def test_calls_outside_of_jit_trace_once_too(adapter, fresh):
    tuned, traces = counted()
    first = tuned.apply(adapter, PARAMS, X)
    once = len(traces)
    np.testing.assert_array_equal(tuned.apply(adapter, PARAMS, X), first)
    tuned.apply(fresh, PARAMS, 2 * X)
    assert len(traces) == once
    tuned.apply(fresh, PARAMS, X[:1])
    assert len(traces) > once


def test_init_computes_nothing_of_the_model():
    def costly(params, x):
        jax.debug.callback(pytest.fail, "the model was run")
        return x @ params["w"]

    shapes = {"w": jax.ShapeDtypeStruct((5, 7), "float32")}
    x = jax.ShapeDtypeStruct((10**9, 5), "float32")
    adapter = jp.transform(costly, jp.lora(2)).init(jax.random.key(0), shapes, x)
    assert adapter["w"]["a"].shape == (2, 5)


def test_everything_lora_makes_is_trainable(fresh):
    marks = TUNED.trainable(fresh)
    assert jax.tree.structure(marks) == jax.tree.structure(fresh)
    assert jax.tree.leaves(marks) == [True] * 4


def test_what_a_method_fixes_is_not_trainable(fresh):
    fixed = jp.lora(2)._replace(fixed=("a",))
    alone, after = jp.transform(model, fixed), jp.transform(model, jp.chain(jp.lora(2), fixed))
    assert alone.trainable(fresh)["p/w"] == {"a": False, "b": True}
    both = after.init(jax.random.key(0), PARAMS, X)
    assert after.trainable(both)["p/w"] == {
        "0": {"a": True, "b": True},
        "1": {"a": False, "b": True},
    }


def test_a_chain_applies_its_methods_in_order():
    """`full` puts its own value in the weight's place: after it, LoRA adds; before it, nothing."""
    for order, lora_counts in ((("full", "lora"), True), (("lora", "full"), False)):
        methods = {"full": jp.full(), "lora": jp.lora(2)}
        tuned = jp.transform(model, jp.chain(*(methods[name] for name in order)))
        adapter = tuned.init(jax.random.key(0), PARAMS, X)
        lora = str(order.index("lora"))
        adapter["p/w"][lora]["b"] = adapter["p/w"][lora]["b"] + 1
        merged = tuned.merge(adapter, PARAMS)["p"]["w"]
        assert bool((merged != PARAMS["p"]["w"]).any()) is lora_counts


def test_a_method_that_defines_init_and_a_weight_is_complete():
    """A user's own: `W' = W * scale`, with no rule for any product."""
    method = jp.Method(
        name="scaled",
        init=lambda key, site, weight: {"scale": jnp.ones(site.shape[-1])},
        weight=lambda site, leaves, weight, key: weight * leaves["scale"],
        fits=lambda site: site.linear,
        bare=lambda site: site.linear,
    )
    tuned = jp.transform(model, jp.rules(("p/w", method)), strict=True)
    adapter = tuned.init(jax.random.key(0), PARAMS, X)
    adapter["p/w"]["scale"] = 2 * adapter["p/w"]["scale"]
    want = model({"p": {"w": 2 * PARAMS["p"]["w"]}, "q": PARAMS["q"]}, X)
    np.testing.assert_allclose(tuned.apply(adapter, PARAMS, X), want, rtol=1e-6)


def test_an_adapter_of_another_model_is_refused(adapter):
    other = {"p": {"kernel": PARAMS["p"]["w"]}, "q": PARAMS["q"]}
    with pytest.raises(
        ValueError, match="1 are not in params; missing: 'p/w'. Nearest: .*'p/kernel'"
    ):
        TUNED.apply(adapter, other, X)


def test_an_adapter_of_other_shapes_is_refused(adapter):
    other = {"p": {"w": jnp.ones((5, 9))}, "q": {"w": jnp.ones((9, 3))}}
    with pytest.raises(ValueError, match=r"for 'p/w' of shape \(5, 7\), params have \(5, 9\)"):
        TUNED.merge(adapter, other)


def test_an_adapter_of_another_tuning_is_refused(adapter):
    other = jp.transform(model, jp.rules(("q/w", jp.lora(2))))
    with pytest.raises(ValueError, match="has 'p/w', which this tuning leaves alone"):
        other.apply(adapter, PARAMS, X)


@pytest.mark.parametrize("swapped", [{}, None, 3, {"p/w": {"a": 1}}])
def test_what_is_no_adapter_is_refused(swapped):
    with pytest.raises(TypeError, match=r"The call is tuned.apply\(adapter, params, \*inputs\)"):
        TUNED.apply(swapped, PARAMS, X)


def test_new_leaves_are_split_over_devices_like_the_weight():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec("data", "model")
    weight = jax.device_put(jnp.ones((8, 12)), jax.sharding.NamedSharding(mesh, spec))
    tuned = jp.transform(lambda params, x: x @ params["w"], jp.lora(2))
    leaves = tuned.init(jax.random.key(0), {"w": weight}, jnp.ones((2, 8)))["w"]
    assert leaves["a"].sharding.spec == jax.sharding.PartitionSpec(None, "data")
    assert leaves["b"].sharding.spec == jax.sharding.PartitionSpec(None, "model")
    odd = jax.device_put(
        jnp.ones((8, 3)), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    )
    leaves = tuned.init(jax.random.key(0), {"w": odd}, jnp.ones((2, 8)))["w"]
    assert leaves["b"].sharding.is_fully_replicated
