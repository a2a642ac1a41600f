"""Products with quantized weights under JAX's transforms equal those with the unpacked ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxpeft as jp

PARAMS = {"w": jax.random.normal(jax.random.key(0), (3, 64, 64)) / 8}
X = jax.random.normal(jax.random.key(1), (2, 64))


def model(params, x):
    """A scan of rematerialized layers, a branch, and a loop, each around quantized weights."""

    @jax.checkpoint
    def layer(h, w):
        return jnp.tanh(h @ w), None

    w = params["w"]
    h, _ = lax.scan(layer, x, w)
    h = lax.cond(h.sum() > 0, lambda h: h @ w[0], lambda h: h @ w[1].T, h)
    step = lambda i, h: jnp.tanh(h @ w[2]) + h  # noqa: E731
    return lax.fori_loop(0, 2, step, h)


def looped(params, x):
    """As many times as the values say, which has no reverse mode."""
    w = params["w"]
    return lax.while_loop(lambda h: jnp.abs(h).sum() > 1, lambda h: jnp.tanh(h @ w[0]) / 2, x)


@pytest.fixture(scope="module", params=[jp.quant.nf4(), jp.quant.int8()], ids=lambda f: f.name)
def case(request):
    packed = jp.quantize(PARAMS, request.param)
    tuned = jp.transform(model, jp.lora(2), strict=True)
    make = jax.vmap(lambda key: tuned.init(key, packed, X))
    adapters = make(jax.random.split(jax.random.key(2), 3))
    return packed, {"w": packed["w"].materialize()}, tuned, some_values(adapters)


def some_values(adapters):
    return jax.tree.map(lambda a: a + jnp.cos(jnp.arange(a.size)).reshape(a.shape) / 9, adapters)


def equal(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)


def test_many_adapters_with_their_gradients(case):
    packed, dense, tuned, adapters = case

    @jax.jit
    def each(params):
        loss = lambda adapter: jnp.sin(tuned.apply(adapter, params, X)).sum()  # noqa: E731
        return jax.vmap(jax.value_and_grad(loss))(adapters)

    equal(each(packed), each(dense))


def test_a_scan_over_steps_of_training(case):
    packed, dense, tuned, adapters = case
    optimizer, start = optax.adam(1e-2), jax.tree.map(lambda a: a[0], adapters)

    @jax.jit
    def train(params):
        def step(carry, x):
            adapter, state = carry
            loss, grads = jax.value_and_grad(
                lambda adapter: (tuned.apply(adapter, params, x) ** 2).mean()
            )(adapter)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(adapter, updates), state), loss

        xs = jax.random.normal(jax.random.key(3), (4, *X.shape))
        (adapter, _), losses = lax.scan(step, (start, optimizer.init(start)), xs)
        return adapter, losses

    equal(train(packed), train(dense))


def test_a_loop_that_ends_where_the_values_say(case):
    packed, dense, _, _ = case
    run = jax.jit(jp.lift(looped, strict=True))
    equal(run(packed, X), run(dense, X))


def test_forward_mode_and_second_derivatives(case):
    packed, dense, tuned, adapters = case
    adapter, along = (jax.tree.map(lambda a, i=i: a[i], adapters) for i in (0, 1))

    @jax.jit
    def derivatives(params):
        loss = lambda adapter: jnp.sin(tuned.apply(adapter, params, X)).sum()  # noqa: E731
        slope = lambda adapter: jax.jvp(loss, (adapter,), (along,))[1]  # noqa: E731
        value, line = jax.linearize(loss, adapter)
        _, forward_over_reverse = jax.jvp(jax.grad(loss), (adapter,), (along,))
        return value, line(along), slope(adapter), forward_over_reverse, jax.grad(slope)(adapter)

    ours = derivatives(packed)
    equal(ours, derivatives(dense))
    equal(ours[1], ours[2])
    equal(ours[3], ours[4])


@pytest.mark.parametrize(
    "name", ["dots_saveable", "dots_with_no_batch_dims_saveable", "everything_saveable"]
)
def test_policies_of_checkpoint_save_no_unpacked_weight(name, case):
    packed, _, _, adapters = case
    policy, start = getattr(jax.checkpoint_policies, name), jax.tree.map(lambda a: a[0], adapters)

    @functools.partial(jax.checkpoint, policy=policy)
    def layer(h, w):
        return jnp.tanh(h @ w), None

    @functools.partial(jax.checkpoint, policy=policy)
    def model(params, x):
        return jnp.tanh(lax.scan(layer, x, params["w"])[0] @ params["w"][1].T)

    tuned = jp.transform(model, jp.lora(2), strict=True)
    kept = jax.eval_shape(lambda a, p: jax.vjp(lambda a: tuned.apply(a, p, X), a)[1], start, packed)
    floats = [x for x in jax.tree.leaves(kept) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats and all(x.size < 64 * 64 for x in floats)


def test_an_unrolled_model_unpacks_again_in_the_backward_pass():
    """Else one unpacked weight a layer would live until then: the program forbids to share them.

    XLA heeds that on accelerators, not on CPUs.
    """
    params = jp.quantize({f"w{i}": PARAMS["w"][i] for i in range(3)}, jp.quant.nf4())
    model = jp.lift(lambda p, x: jnp.tanh(jnp.tanh(x @ p["w0"]) @ p["w1"]) @ p["w2"], strict=True)
    step = jax.jit(jax.grad(lambda x, p: model(p, x).sum())).lower(X, params).as_text()
    assert barriers(step) == 3


def test_a_layer_of_a_scan_shares_what_it_unpacks_with_its_gradients():
    """The passes are loops of their own there, and a barrier would unpack and copy once more."""
    params = jp.quantize({"w": PARAMS["w"]}, jp.quant.nf4())

    def layers(p, x):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), prevent_cse=False)
        return jax.lax.scan(layer, x, p["w"])[0]

    model = jp.lift(layers, strict=True)
    step = jax.jit(jax.grad(lambda x, p: model(p, x).sum())).lower(X, params).as_text()
    assert "stablehlo.while" in step and barriers(step) == 0


def barriers(program):
    """How many barriers of the program keep codes apart."""
    lines = [line for line in program.splitlines() if "optimization_barrier" in line]
    return sum("tensor<32x64xui8>" in line for line in lines)


def test_an_index_that_a_loop_counts_cuts_an_axis_that_is_packed():
    """Without sites the packed axes may be any. Every slice unpacks the whole weight then."""
    w = jax.random.normal(jax.random.key(0), (64, 2, 64)) / 8

    def looped(params, x):
        layer = lambda h, i: (jnp.tanh(h @ params["w"][:, i]), None)  # noqa: E731
        return lax.scan(layer, x, jnp.arange(2))[0]

    packed = jp.quantize({"w": w}, jp.quant.fp8())
    f = jp.lift(lambda params, x: looped(params, x).sum(), strict=True)
    ours, theirs = (jax.grad(f, 1)(p, X) for p in (packed, {"w": packed["w"].materialize()}))
    equal(ours, theirs)


def groups_as_one_stack(params, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"].reshape(6, 64, 64))[0]


def layers_of_experts(params, x):
    layer = lambda h, w: (jnp.einsum("bd,edf->ebf", jnp.tanh(h), w).sum(0), None)  # noqa: E731
    return lax.scan(layer, x, params["w"].swapaxes(0, 1))[0]


@pytest.mark.parametrize("model", [groups_as_one_stack, layers_of_experts])
def test_a_scan_takes_layers_from_anywhere_among_the_stacks(model):
    packed = jp.quantize({"w": jnp.cos(jnp.arange(24576.0)).reshape(2, 3, 64, 64)}, jp.quant.nf4())
    f = jax.jit(jp.lift(model, strict=True))
    equal(f(packed, X), model({"w": packed["w"].materialize()}, X))


def test_weights_that_become_dense_are_named():
    packed = jp.quantize({"bias": jnp.ones((64, 2))}, jp.rules(("bias", jp.quant.int8())))
    with pytest.raises(jp.MaterializeError, match="'bias' is materialized at `add`"):
        jp.lift(lambda params, x: x + params["bias"], strict=True)(packed, jnp.ones((64, 2)))
