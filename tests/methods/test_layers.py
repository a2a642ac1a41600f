"""A tuning in some layers of a stack: by hand, on unrolled layers, and with layers dropped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpeft as jp
from tests.methods.decoding import IDS, decoder, filled

LAYERS, D = 4, 6
KEPT = (1, 3)
W = filled(jax.ShapeDtypeStruct((LAYERS, D, D), "float32"))
X = np.random.default_rng(1).standard_normal((2, D)).astype(np.float32)


def scanned(params, x):
    def step(x, w):
        return jnp.tanh(jp.tap(x @ w, "w:out")), None

    return lax.scan(jax.checkpoint(step), x, params["w"])[0]


def second(params, x):
    """The layers lie on the second axis of the weight."""
    return scanned({"w": jnp.moveaxis(params["w"], 1, 0)}, x)


def unrolled(params, x):
    for i in range(LAYERS):
        x = jnp.tanh(jp.tap(x @ params[f"w{i}"], f"w{i}:out"))
    return x


def half():
    """A method that is neither a sum nor a scale, and so dense."""
    kept = lambda site: [-1 if role == "stack" else 1 for role in site.roles]  # noqa: E731
    return jp.Method(
        "half",
        lambda key, site, weight: {"h": jnp.ones(site.sizes("stack"))},
        lambda site, leaves, weight, key: weight * leaves["h"].reshape(kept(site)),
        fits=lambda site: site.linear,
        bare=lambda site: site.linear,
    )


METHODS = {
    "lora": ("w", jp.lora(2, alpha=4)),
    "ia3": ("w", jp.ia3()),
    "full": ("w", jp.full()),
    "half": ("w", half()),
    "chain": ("w", jp.ia3(), jp.lora(2)),
    "bottleneck": ("w:out", jp.bottleneck(2)),
    "phm": ("w:out", jp.compacter(width=2, phm=jp.phm(2, shared="rule"))),
    "split": ("w:out", jp.split(jp.bottleneck(2), None, at=1)),
    "average": ("w:out", jp.average(jp.bottleneck(2), jp.ia3("activations"))),
}


def tuning(methods, at):
    return jp.chain(*(jp.rules((at, method)) for method in methods))


def apart(adapter, site, model):
    """The leaves of the kept layers at the sites of the unrolled model."""
    path, *side = site.split(":")
    found = {k: v for k, v in adapter.items() if k.startswith("shared:")}

    def layer(keys, leaf, j):
        second_axis = model is second and keys[-1].key == "value"
        return leaf[:, j] if second_axis else leaf[j]

    for j, i in enumerate(KEPT):
        name = ":".join([f"{path}{i}", *side])
        leaves = adapter[site]
        found[name] = jax.tree_util.tree_map_with_path(lambda k, x, j=j: layer(k, x, j), leaves)
    return found


PAIRS = [
    (name, model)
    for name, (site, *_) in METHODS.items()
    for model in (scanned, second)
    if model is scanned or ":" not in site
]


@pytest.mark.parametrize(("name", "model"), PAIRS)
def test_it_is_the_method_in_those_layers_of_the_unrolled_model(name, model):
    site, *methods = METHODS[name]
    some = {f"w{i}": W[i] for i in range(LAYERS)}
    params = {"w": jnp.moveaxis(W, 0, 1) if model is second else W}
    path, *side = site.split(":")
    few = jp.transform(model, jp.layers(tuning(methods, site), KEPT))
    one = jp.transform(unrolled, tuning(methods, ":".join([path + "{1,3}", *side])))
    fresh = jax.jit(few.init)(jax.random.key(0), params, X)
    noise = np.random.default_rng(0)
    adapter = jax.tree.map(lambda x: x + 0.3 * noise.standard_normal(x.shape).astype("f"), fresh)
    shapes = jax.eval_shape(one.init, jax.random.key(0), some, X)
    same = jp.Adapter(apart(adapter, site, model), shapes.sites)
    assert jax.tree.map(jnp.shape, dict(same)) == jax.tree.map(jnp.shape, dict(shapes))
    # Without the first two layers, of the selection the last is left.
    last = jp.Adapter(
        {k: v for k, v in same.items() if "1" not in k},
        [s for s in shapes.sites if "1" not in s.path],
    )

    def loss(tuned, params):
        return lambda adapter: (jnp.sin(y := tuned.apply(adapter, params, X)).sum(), y)

    @jax.jit
    def program(fresh, adapter, same, last):
        return (
            (model(params, X), few.apply(fresh, params, X)),
            jax.grad(loss(few, params), has_aux=True)(adapter),
            jax.grad(loss(one, some), has_aux=True)(same),
            few.apply(adapter, params, X, drop_layers=jnp.array(2)),
            one.apply(last, some, X),
            model(params if side else few.merge(adapter, params), X),
        )

    plain, (grads, y), (wanted, want), dropped, left, merged = program(fresh, adapter, same, last)
    np.testing.assert_allclose(*plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    assert np.abs(y - plain[0]).max() > 1e-3
    for path, leaves in apart(grads, site, model).items():
        for a, b in zip(*map(jax.tree.leaves, (leaves, wanted[path])), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dropped, left, rtol=1e-5, atol=1e-6)
    if not side:
        np.testing.assert_allclose(merged, want, rtol=1e-5, atol=1e-6)


def test_a_slice_negative_numbers_and_bare_methods():
    (model, params), shapes = decoder(), {}
    for select in (slice(1, None), [-1], (1,)):
        tuned = jp.transform(model, jp.layers(jp.chain(jp.lora(2), jp.houlsby(width=2)), select))
        shapes[str(select)] = jax.eval_shape(tuned.init, jax.random.key(0), params, IDS)
    one, *others = map(jax.tree.leaves, shapes.values())
    assert [leaf.shape for leaf in one] == [leaf.shape for leaf in others[0]]
    assert {leaf.shape[0] for leaf in one} == {1}
    # The embedding and the head are no stacks.
    assert all(path.startswith("layers/") for path in shapes["[-1]"])
    whole = jp.transform(model, jp.chain(jp.lora(2), jp.houlsby(width=2)))
    whole = dict(jax.eval_shape(whole.init, jax.random.key(0), params, IDS))
    whole = jax.tree.leaves({k: v for k, v in whole.items() if k.startswith("layers/")})
    assert 2 * sum(leaf.size for leaf in one) == sum(leaf.size for leaf in whole)


def test_packed_weights_stay_packed():
    params = {"w": jnp.tile(W, (1, 8, 8))}
    packed = jp.quantize(params, jp.quant.int8())
    tuned = jp.transform(scanned, jp.layers(jp.lora(2), KEPT), strict=True)
    x = np.tile(X, (1, 8))
    adapter = filled(jax.jit(tuned.init)(jax.random.key(0), packed, x))
    merged = tuned.merge(adapter, packed)
    got, want = jax.jit(lambda: (tuned.apply(adapter, packed, x), scanned(merged, x)))()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_bad_selections_are_told():
    params = {"w": W, "v": W[0]}
    model = lambda p, x: scanned(p, x) @ p["v"]  # noqa: E731
    for select in ([4], [-5], slice(4, None), []):
        tuned = jp.transform(model, jp.layers(jp.lora(2), select))
        with pytest.raises(ValueError, match=r"'w' is a stack of 4 layers, 0 to 3"):
            tuned.init(jax.random.key(0), params, X)
    tuned = jp.transform(model, jp.layers(jp.rules(("v", jp.lora(2))), [0]))
    with pytest.raises(ValueError, match="`lora` cannot work there: they are no stack of layers"):
        tuned.init(jax.random.key(0), params, X)
    for wrong in ("0:2", [0.5], 3):
        with pytest.raises(TypeError, match=r"slice\(6, None\)"):
            jp.layers(jp.lora(2), wrong)
    with pytest.raises(ValueError, match="`prefix_tuning` must be in all layers"):
        jp.layers(jp.prefix_tuning(2), [0])
    with pytest.raises(ValueError, match=r"`lora` is in layers '2::' already.*once"):
        jp.layers(jp.layers(jp.lora(2), slice(2, None)), [3])
    with pytest.raises(TypeError, match="a tuning is a method"):
        jp.layers("lora", [0])
