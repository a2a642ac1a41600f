"""Attentions in Flax modules: marks named by the module, in loops, scans, remat and decoding."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpeft.core.attention import mark_attention
from jaxpeft.flax.doors import as_function
from jaxpeft.flax.mark import Marks, Point
from tests.core.test_attention import KEYS, attend, changed, check, marks

B, T, N, H, D, L, ROWS = 2, 5, 2, 3, 6, 2, 2
X = jax.random.normal(KEYS[0], (B, T, D))
NEW = jax.random.normal(KEYS[6], (2, L, ROWS, N, H))
MASK = np.tril(np.ones((T, T), bool))
KINDS = ("query", "key", "value", "context")
SHAPES = {kind: (B, T, N, H) for kind in KINDS}


def tapped(model):
    return as_function(model, Marks())


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        attn = nn.MultiHeadDotProductAttention(N, qkv_features=N * H, name="attn")
        return x + attn(x, mask=MASK[None, None]), None


class Looped(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(L):
            x, _ = Block(name=f"layers_{i}")(x, None)
        return x


class Scanned(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": L}
        return nn.scan(block, **axes)(name="layers")(x, None)[0]


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(N, D, N * H, decode=False, rngs=rngs)

    def __call__(self, x):
        return x + self.attn(x, mask=MASK[None, None])


class NnxScanned(nnx.Module):
    def __init__(self, remat):
        self.layers = nnx.vmap(NnxBlock)(nnx.Rngs(0).split(L))
        self.remat = remat

    def __call__(self, x):
        step = nnx.remat(lambda x, layer: layer(x)) if self.remat else lambda x, layer: layer(x)
        return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def layer_params(params, i):
    """Arrays of one layer by name, from a stack or from a loop, biases not zero."""
    layers = params.get("layers")
    layer = params[f"layers_{i}"] if layers is None else jax.tree.map(lambda w: w[i], layers)
    return {name: {k: np.float64(w) for k, w in p.items()} for name, p in layer["attn"].items()}


def stack(x, params, rows=None):
    """The model in float64."""
    x = np.float64(x)
    for i in range(L):
        p = layer_params(params, i)
        q, k, v = (
            np.einsum("btd,dnh->btnh", x, p[n]["kernel"]) + p[n]["bias"]
            for n in ("query", "key", "value")
        )
        new = None if rows is None else (rows[0, i], rows[1, i])
        h = attend(q, k, v, mask=MASK, scale=H**-0.5, rows=new)
        x = x + np.einsum("btnh,nhd->btd", h, p["out"]["kernel"]) + p["out"]["bias"]
    return x


def noisy(params):
    """Params with biases that are not zero."""
    return jax.tree.map(lambda w: w + 0.1 if jnp.issubdtype(w.dtype, jnp.floating) else w, params)


def test_looped_linen_layers():
    model = Looped()
    params = noisy(model.init(jax.random.key(0), X))
    fn, names = tapped(model), [f"layers_{i}/attn" for i in range(L)]
    found = marks(mark_attention(fn), params, X)
    assert found == {f"{name}:{kind}": shape for name in names for kind, shape in SHAPES.items()}
    taps = {
        f"{n}:{kind}": NEW[j, i] for i, n in enumerate(names) for j, kind in enumerate(KINDS[1:3])
    }
    plain = params["params"]
    check(fn, params, (X,), taps, stack(X, plain), stack(X, plain, NEW))


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_linen_layers(remat):
    model = Scanned(remat)
    params = noisy(model.init(jax.random.key(0), X))
    fn, plain = tapped(model), params["params"]
    assert marks(mark_attention(fn), params, X) == {
        f"layers/attn:{kind}": shape for kind, shape in SHAPES.items()
    }
    taps = {"layers/attn:key": NEW[0], "layers/attn:value": NEW[1]}
    check(fn, params, (X,), taps, stack(X, plain), stack(X, plain, NEW))


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_nnx_layers(remat):
    model = NnxScanned(remat)
    params = noisy(nnx.state(model))
    fn, plain = tapped(model), nnx.to_pure_dict(params)
    assert marks(mark_attention(fn), params, X) == {
        f"layers/attn:{kind}": shape for kind, shape in SHAPES.items()
    }
    taps = {"layers/attn:key": NEW[0], "layers/attn:value": NEW[1]}
    check(fn, params, (X,), taps, stack(X, plain), stack(X, plain, NEW))


def test_decoding_marks_the_whole_cache():
    model = nn.MultiHeadDotProductAttention(N, qkv_features=N * H, decode=True)
    variables = model.init(jax.random.key(0), X)
    for t in range(3):
        _, cache = model.apply(variables, X[:, t : t + 1], mutable=["cache"])
        variables = variables | cache
    fn = mark_attention(tapped(model))
    found = marks(fn, variables, X[:, 3:4], mutable=["cache"])
    assert found == {f":{k}": (B, 1 if k in ("query", "context") else T, N, H) for k in KINDS}
    rows = NEW[:, 0]
    out, cache = changed(
        fn, variables, X[:, 3:4], taps={":key": rows[0], ":value": rows[1]}, mutable=["cache"]
    )
    p = jax.tree.map(np.float64, variables["params"])
    q, k, v = (np.einsum("btd,dnh->btnh", X, p[n]["kernel"]) for n in ("query", "key", "value"))
    h = attend(q[:, 3:4], k, v, mask=np.arange(T) < 4, scale=H**-0.5, rows=rows)
    np.testing.assert_allclose(out, np.einsum("btnh,nhd->btd", h, p["out"]["kernel"]), 2e-5, 2e-5)
    kept = cache["cache"]["cached_key"]
    np.testing.assert_allclose(kept[:, :4], k[:, :4], 2e-5, 2e-5)


def plain(x, y):
    return nn.dot_product_attention(*(z[:, :, None] for z in (x, y, y)))[:, :, 0]


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(D, name="dense")(x)
        return plain(plain(x, x), x)


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        twice = Twice(name="twice")
        return plain(twice(twice(x)), x)


def test_attentions_of_one_call_are_counted():
    model = Shared()
    names = list(marks(mark_attention(tapped(model)), model.init(KEYS[0], X), X))
    assert [name for name in names if "key" in name] == ["twice:key", "twice:key_1", ":key"]


class Prepared(nnx.Module):
    def __init__(self):
        self.key = Point()

    def __call__(self, x):
        return plain(x, self.key(x))


def test_a_module_with_marks_of_its_own_is_left_alone():
    model = Prepared()
    program = jax.make_jaxpr(mark_attention(tapped(model)))(nnx.state(model), X)
    assert str(program).count(":key") == 1 and ":value" not in str(program)


def test_context_has_the_query_as_a_source():
    model = Looped()
    program = jax.make_jaxpr(mark_attention(tapped(model)))(model.init(KEYS[0], X), X)
    assert str(program).count("sources=('query',)") == L


def test_equal_functions_are_marked_as_one():
    model = NnxScanned(False)
    first, second = (mark_attention(tapped(model)) for _ in range(2))
    assert first == second and hash(first) == hash(second)
