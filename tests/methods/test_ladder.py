"""Ladder side-tuning: its formula in float64, and a backward pass that the model is no part of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpeft as jp
from jaxpeft.methods.ladder import ladder
from tests.methods.decoding import IDS, decoder, filled

LAYERS, D, WIDTH, HIDDEN = 3, 6, 4, 5
W = np.random.default_rng(0).standard_normal((LAYERS, D, D)).astype(np.float32) / 2
X = np.random.default_rng(1).standard_normal((2, 4, D)).astype(np.float32)
RULE = ladder(WIDTH, LAYERS, hidden=HIDDEN, reads="layers*:out")


@jax.custom_vjp
def only_forward(x, w):
    return jnp.tanh(x @ w)


def _refuse(*_):
    raise AssertionError("the backward pass has entered the model")


only_forward.defvjp(lambda x, w: (only_forward(x, w), None), _refuse)


def scanned(params, x):
    def step(x, w):
        return jp.tap(only_forward(x, w), "layers:out"), None

    x, _ = lax.scan(jax.checkpoint(step), x, params["layers"])
    return jnp.sin(jp.tap(x, "norm:in"))


def unrolled(params, x):
    for i in range(LAYERS):
        x = jp.tap(only_forward(x, params["layers"][i]), f"layers_{i}:out")
    return jnp.sin(jp.tap(x, "norm:in"))


def formula(leaves, x):
    """In float64; gelu in the form with tanh."""
    leaves = {name: np.asarray(leaf, np.float64) for name, leaf in leaves.items()}
    x, s = np.asarray(x, np.float64), 0.0
    for i in range(LAYERS):
        x = np.tanh(x @ np.asarray(W[i], np.float64))
        mix = 1 / (1 + np.exp(-leaves["mix"][i] / 0.1))
        u = mix * s + (1 - mix) * (x @ leaves["down"][i])
        norm = (u - u.mean(-1, keepdims=True)) / np.sqrt(u.var(-1, keepdims=True) + 1e-5)
        z = norm @ leaves["first"][i]
        z = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
        s = u + z @ leaves["second"][i]
    return np.sin(x + s @ leaves["up"])


@pytest.mark.parametrize("model", [scanned, unrolled])
def test_the_formula_and_no_derivative_of_the_model(model):
    params = {"layers": jnp.asarray(W)}
    tuned = jp.transform(model, jp.rules(("norm:in", RULE)))
    noise = filled(jax.eval_shape(tuned.init, jax.random.key(0), params, X))

    def loss(adapter):
        y = tuned.apply(adapter, params, X)
        return y.sum(), y

    @jax.jit
    def program(noise):
        fresh = tuned.init(jax.random.key(0), params, X)
        adapter = jax.tree.map(lambda x, n: x + 0.3 * n, fresh, noise)
        return adapter, tuned.apply(fresh, params, X), jax.grad(loss, has_aux=True)(adapter)

    adapter, still, (grads, y) = program(noise)
    plain = formula(adapter["norm:in"] | {"up": np.zeros((WIDTH, D))}, X)
    np.testing.assert_allclose(still, plain, 1e-5, 1e-6)
    leaves = dict(adapter["norm:in"])
    np.testing.assert_allclose(y, formula(leaves, X), rtol=1e-4, atol=1e-5)
    for name, leaf in grads["norm:in"].items():
        step = np.cos(np.arange(leaf.size)).reshape(leaf.shape) * 1e-5
        ends = (formula(leaves | {name: np.asarray(leaves[name], np.float64) + s}, X).sum()
                for s in (step, -step))  # fmt: skip
        slope = (next(ends) - next(ends)) / 2e-5
        assert float((leaf * step / 1e-5).sum()) == pytest.approx(slope, rel=1e-3, abs=1e-4)


HEADS = 2


def attending(leaves, x, heads, seen):
    """Attention in torch's own."""
    torch = pytest.importorskip("torch")
    q, k, v = (
        torch.tensor(x @ leaves[n]).unflatten(-1, (heads, -1)).transpose(-3, -2)
        for n in ("query", "key", "value")
    )
    mask = torch.tensor(np.broadcast_to(seen, (x.shape[0], heads, *seen.shape[-2:])))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.transpose(-3, -2).flatten(-2).numpy() @ leaves["output"]


def blocks(leaves, x, seen):
    """The ladder with attention, in float64."""
    leaves = {name: np.asarray(leaf, np.float64) for name, leaf in leaves.items()}
    norm = lambda u: (u - u.mean(-1, keepdims=True)) / np.sqrt(u.var(-1, keepdims=True) + 1e-5)  # noqa: E731
    x, s = np.asarray(x, np.float64), 0.0
    for i in range(LAYERS):
        one = {name: leaf[i] for name, leaf in leaves.items() if name != "up"}
        x = np.tanh(x @ np.asarray(W[i], np.float64))
        mix = 1 / (1 + np.exp(-one["mix"] / 0.1))
        u = mix * s + (1 - mix) * (x @ one["down"])
        u = u + attending(one, norm(u), HEADS, seen)
        z = norm(u) @ one["first"]
        z = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
        s = u + z @ one["second"]
    return np.sin(x + s @ leaves["up"])


KEEP = np.array([[True, True, True, False], [False, True, True, True]])


@pytest.mark.parametrize("causal", [True, False])
def test_side_layers_attend_to_what_is_no_padding(causal):
    """And the backward pass does not enter the model."""

    def model(params, x, attention_mask=None):
        return scanned(params, x)

    rule = ladder(WIDTH, LAYERS, heads=HEADS, causal=causal, hidden=HIDDEN)
    tuned, params = jp.transform(model, jp.rules(("norm:in", rule))), {"layers": jnp.asarray(W)}
    fresh = jax.eval_shape(tuned.init, jax.random.key(0), params, X, KEEP)
    size = sum(leaf.size for leaf in jax.tree.leaves(fresh))
    assert size == LAYERS * (1 + WIDTH * (D + 2 * HIDDEN)) + WIDTH * D + 4 * LAYERS * WIDTH**2
    adapter = filled(fresh)

    @jax.jit
    def program(adapter):
        slope = jax.grad(lambda a: tuned.apply(a, params, X, KEEP).sum())(adapter)
        without = tuned.apply(adapter, params, X)
        return tuned.apply(adapter, params, X, attention_mask=KEEP), without, slope

    y, without, slope = program(adapter)
    lower = np.tril(np.ones((4, 4), bool)) if causal else np.ones((4, 4), bool)
    # A padding token in front sees nothing, and is nobody's concern.
    expected = blocks(adapter["norm:in"], X, lower & KEEP[:, None, None, :])
    np.testing.assert_allclose(y[KEEP], expected[KEEP], atol=5e-4)
    expected = blocks(adapter["norm:in"], X, lower[None, None])
    np.testing.assert_allclose(without, expected, atol=5e-4)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(slope))


def test_attention_is_refused_parts_of_sequences_and_odd_masks():
    (model, params), ids = decoder(), IDS
    tuned = jp.transform(model, jp.rules(("norm:in", ladder(4, 2, heads=2))))
    adapter = filled(jax.eval_shape(tuned.init, jax.random.key(0), params, ids))
    with pytest.raises(ValueError, match="`ladder` attends to whole sequences"):
        tuned.apply(adapter, params, ids, cache=model.init_cache(2, 3))
    with pytest.raises(ValueError, match=r"'mask' of shape \(3,\) is no mask of tokens"):
        tuned.apply(adapter, params, ids, mask=np.ones(3, bool))
    with pytest.raises(ValueError, match="heads=3 do not divide width=4"):
        ladder(4, 2, heads=3)
    # Prompts lengthen the mask.
    both = jp.chain(jp.rules(("norm:in", ladder(4, 2, heads=2))), jp.prompt_tuning(2))
    tuned = jp.transform(model, both)
    adapter = filled(jax.eval_shape(tuned.init, jax.random.key(0), params, ids))
    one = tuned.apply(adapter, params, ids, mask=np.ones_like(ids, bool))
    np.testing.assert_allclose(one, tuned.apply(adapter, params, ids), rtol=1e-5, atol=1e-6)


def test_the_check_can_fail():
    """A bottleneck behind the first layer has the others behind it in the backward pass."""
    params = {"layers": jnp.asarray(W)}
    tuned = jp.transform(unrolled, jp.rules(("layers_0:out", jp.bottleneck(2))))
    adapter = filled(jax.eval_shape(tuned.init, jax.random.key(0), params, X))
    with pytest.raises(AssertionError, match="the backward pass has entered the model"):
        jax.grad(lambda a: tuned.apply(a, params, X).sum())(adapter)


def test_beside_other_methods_the_ladder_stops_gradients():
    """The model's output less the plain one is the ladder's: lora has no part in it."""

    def model(params, x):
        x = jp.tap(jnp.tanh(x @ params["w"]), "layers:out")
        return jp.tap(x, "norm:in") - x

    params = {"w": jnp.asarray(W[0])}
    rule = ladder(WIDTH, 1, hidden=HIDDEN, reads="layers:out")
    tuned = jp.transform(model, jp.rules(("norm:in", rule), ("w", jp.lora(2))))
    adapter = filled(jax.eval_shape(tuned.init, jax.random.key(0), params, X))
    half = {**adapter["norm:in"], "mix": jnp.zeros(1)}
    adapter = jp.Adapter({**adapter, "norm:in": half}, adapter.sites)
    grads = jax.jit(jax.grad(lambda a: jnp.square(tuned.apply(a, params, X)).sum()))(adapter)
    assert all(jnp.abs(leaf).max() > 1e-3 for leaf in grads["norm:in"].values() if leaf.ndim > 1)
    # Of lora's there is the rounding of a sum less itself.
    assert all(jnp.abs(leaf).max() < 1e-5 for leaf in grads["w"].values())


def products(jaxpr):
    """The products in a program, those of programs inside included."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name == "dot_general"
        count += sum(products(program) for program in jax.extend.core.jaxprs_in_params(eqn.params))
    return count


def test_on_a_decoder_the_gradient_has_the_products_of_the_forward_pass_and_its_own():
    (model, params), ids = decoder(), IDS
    tuned = jp.transform(model, jp.rules(("norm:in", ladder(2, 2))))
    adapter = jax.eval_shape(tuned.init, jax.random.key(0), params, ids)

    def loss(adapter):
        return jnp.sin(tuned.apply(adapter, params, ids)).sum()

    forward = products(jax.make_jaxpr(model.apply)(params, ids))
    both = products(jax.make_jaxpr(jax.grad(loss))(adapter))
    # A ladder has 3 products a layer and 1 at its end; backward 5 and 2 (no derivative of what it
    # reads), and the head of the model, which stands behind it, 1.
    assert both <= forward + 3 + 1 + 5 + 2 + 1


def test_arguments_and_the_number_of_layers_are_checked():
    (model, params), ids = decoder(), IDS
    tuned = jp.transform(model, jp.rules(("norm:in", ladder(2, layers=4))))
    adapter = filled(jax.eval_shape(tuned.init, jax.random.key(0), params, ids))
    with pytest.raises(ValueError, match=r"reads 2 outputs: layers:out. Use ladder\(2, layers=2\)"):
        tuned.apply(adapter, params, ids)
    size = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    assert size == 4 * (1 + 2 * (8 + 2 * 8)) + 2 * 8
    for arguments in ((0, 2), (2, 0), (2, 1.5)):
        with pytest.raises(ValueError, match="is out of range"):
            ladder(*arguments)
