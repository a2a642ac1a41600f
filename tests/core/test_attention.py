"""Attentions of models that nobody prepared: marks by name and shape, and what they can change.

The oracle is attention written out in float64 NumPy with the first rows of its keys and values
replaced. A model's marks are right if overwriting these rows at the marks gives the same.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxpeft.core.attention import mark_attention
from jaxpeft.core.lift import call
from jaxpeft.core.report import refuse
from jaxpeft.core.tap import Tap, boundaries

B, T, K, G, H, D, ROWS = 2, 5, 2, 3, 4, 6, 2
N = K * G
KEYS = jax.random.split(jax.random.key(0), 8)
X = jax.random.normal(KEYS[0], (B, T, D))
WQ, WO = jax.random.normal(KEYS[1], (D, N, H)), jax.random.normal(KEYS[2], (N, H, D))
WK, WV = jax.random.normal(KEYS[3], (2, D, N, H))
BIAS, SINK = jax.random.normal(KEYS[4], (N, T, T)), jax.random.normal(KEYS[5], (N,))
NEW = jax.random.normal(KEYS[6], (2, ROWS, N, H))
CAUSAL = np.tril(np.ones((T, T), bool))


def overwrite(site, rows, x, here):
    return x.at[..., : rows.shape[-3], :, :].set(rows)


def changed(fn, params, *args, taps, **kwargs):
    """`fn` where the first rows at each mark are replaced by those given for its name."""
    taps = {n: Tap(r, call=overwrite, stack=jnp.ndim(r) - 3) for n, r in taps.items()}
    return call(fn, params, args, kwargs, refuse, taps)


def marks(fn, *args, **kwargs):
    program = jax.make_jaxpr(lambda *args: fn(*args, **kwargs))(*args)
    sides = [(mark.name.rpartition(":")[2], mark) for mark in boundaries(program)]
    return {mark.name: mark.shape for side, mark in sides if side not in ("in", "out")}


def attend(q, k, v, *, bias=0.0, mask=True, cap=None, sink=None, scale=1.0, rows=None):
    """Attention in float64: q (B, T, N, H), k and v (B, S, K, H), `rows` replace k's and v's."""
    q, k, v = (np.array(x, np.float64) for x in (q, k, v))
    for x, new in zip((k, v), () if rows is None else rows, strict=False):
        x[:, : new.shape[0]] = new
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = scale * np.einsum("btnh,bsnh->bnts", q, k)
    scores = cap * np.tanh(scores / cap) if cap else scores
    scores = np.where(mask, scores + np.asarray(bias, np.float64), -np.inf)
    weights = np.exp(scores)
    total = weights.sum(-1, keepdims=True)
    total = total if sink is None else total + np.exp(np.float64(sink))[:, None, None]
    return np.einsum("bnts,bsnh->btnh", weights / total, v)


def check(model, params, args, taps, expected, new):
    """The marked model is the plain one, and rows overwritten at its marks are in `new`."""
    plain, fn = jax.jit(model)(params, *args), mark_attention(model)
    np.testing.assert_allclose(jax.jit(fn)(params, *args), plain, 0, 1e-6)
    np.testing.assert_allclose(plain, expected, 2e-5, 2e-5)
    np.testing.assert_allclose(changed(fn, params, *args, taps=taps), new, 2e-5, 2e-5)


# --- written by hand: each takes q (B, T, N, H), k, v (B, S, heads, H) and returns (B, T, N, H) ---

softmax = jax.nn.softmax


def heads_third(q, k, v):
    weights = softmax(jnp.einsum("btnh,bsnh->bnts", q, k))
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def heads_second(q, k, v):
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return (softmax(q @ k.swapaxes(2, 3)) @ v).swapaxes(1, 2)


def keys_first(q, k, v):
    weights = softmax(jnp.einsum("bsnh,btnh->bnst", k, q), axis=2)
    return jnp.einsum("bsnh,bnst->btnh", v, weights)


def one_example(q, k, v):
    def single(q, k, v):
        return jnp.einsum("nts,snh->tnh", softmax(jnp.einsum("tnh,snh->nts", q, k)), v)

    return jax.vmap(single)(q, k, v)


def one_head(q, k, v):
    single = jax.vmap(lambda q, k, v: softmax(q @ k.T) @ v, 1, 1)
    return jax.vmap(single)(q, k, v)


def grouped(q, k, v):
    q = q.reshape(*q.shape[:2], k.shape[2], -1, H)
    weights = softmax(jnp.einsum("btkgh,bskh->bkgts", q, k))
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(B, -1, N, H)


def grouped_second(q, k, v):
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    q = q.reshape(B, K, G, T, H)
    weights = softmax(jnp.einsum("bkgth,bksh->bkgts", q, k))
    return jnp.einsum("bkgts,bksh->btkgh", weights, v).reshape(B, T, N, H)


def library(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, scale=1.0, is_causal=True)


def merged_heads(q, k, v):
    scores = jnp.einsum("btkgh,bskh->bkgts", q.reshape(B, T, K, G, H), k).reshape(B, N, T, T)
    return jnp.einsum("bnts,bsnh->btnh", softmax(scores), jnp.repeat(v, G, 2))


def by_logsumexp(q, k, v):
    scores = jnp.einsum("btnh,bsnh->bnts", q, k)
    weights = jnp.exp(scores - jax.nn.logsumexp(scores, -1, keepdims=True))
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def biased(q, k, v):
    scores = 3 * jnp.tanh(jnp.einsum("btnh,bsnh->bnts", q, k) / 3) + BIAS
    weights = softmax(jnp.where(CAUSAL, scores, -1e30).astype(jnp.float32))
    return jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v)


def with_sink(q, k, v):
    scores = jnp.einsum("btnh,bsnh->bnts", q, k)
    sink = jnp.broadcast_to(SINK[:, None, None], (B, N, T, 1))
    weights = softmax(jnp.concatenate([scores, sink], -1))[..., :-1]
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def no_key_heads(q, k, v):
    weights = softmax(jnp.einsum("btnh,bsh->bnts", q, k[:, :, 0]))
    return jnp.einsum("bnts,bsh->btnh", weights, v[:, :, 0])


def one_step(q, k, v):
    weights = softmax(jnp.einsum("bnh,bsnh->bns", q[:, 0], k))
    return jnp.einsum("bns,bsnh->bnh", weights, v)[:, None]


def in_jits(q, k, v):
    scores = jax.jit(lambda q, k: jnp.einsum("btnh,bsnh->bnts", q, k))(q, k)
    weights = jax.jit(softmax)(scores)
    return jax.jit(lambda w, v: jnp.einsum("bnts,bsnh->btnh", w, v))(weights, v)


def in_checkpoint(q, k, v):
    return jax.checkpoint(jax.jit(heads_third))(q, k, v)


def in_cond(q, k, v):
    return lax.cond(
        q[0, 0, 0, 0] > -1e9, heads_third, lambda q, k, v: heads_second(q, k, v) + 1, q, k, v
    )


def in_while(q, k, v):
    def body(carry):
        return carry[0] + 1, carry[2], heads_third(q, k, v)

    return lax.while_loop(lambda carry: carry[0] < 1, body, (0, q * 0, q * 0))[2]


MANY = [
    (heads_third, {}),
    (heads_second, {}),
    (keys_first, {}),
    (one_example, {}),
    (one_head, {}),
    (by_logsumexp, {}),
    (biased, {"bias": BIAS, "mask": CAUSAL, "cap": 3.0}),
    (with_sink, {"sink": SINK}),
    (in_jits, {}),
    (in_checkpoint, {}),
    (in_cond, {}),
    (in_while, {}),
]
FEW = [(grouped, {}), (grouped_second, {}), (merged_heads, {}), (library, {"mask": CAUSAL})]
LAYOUTS = [(f, N, o) for f, o in MANY] + [(f, K, o) for f, o in FEW] + [(no_key_heads, 1, {})]


def project(w, x, heads):
    return jnp.einsum("btd,dnh->btnh", x, w)[:, :, :heads]


@pytest.mark.parametrize(
    "attention, heads, options", LAYOUTS, ids=lambda v: getattr(v, "__name__", "")
)
def test_rows_at_the_marks_are_rows_of_the_attention(attention, heads, options):
    def plain(params, x):
        q, k, v = (project(w, x, n) for w, n in zip(params, (N, heads, heads), strict=True))
        return attention(q, k, v)

    params = WQ / 4, WK / 4, WV
    q, k, v = (project(w, X, n) for w, n in zip(params, (N, heads, heads), strict=True))
    values = N if attention is merged_heads else heads
    assert marks(mark_attention(plain), params, X) == {
        ":query": (B, T, N, H),
        ":key": (B, T, heads, H),
        ":value": (B, T, values, H),
        ":context": (B, T, N, H),
    }
    rows = NEW[0, :, :heads], NEW[1, :, :heads]
    taps = {":key": rows[0], ":value": jnp.repeat(rows[1], values // heads, 1)}
    new = attend(q, k, v, rows=rows, **options)
    check(plain, params, (X,), taps, attend(q, k, v, **options), new)


def test_one_token_that_is_decoded_has_a_time_axis():
    fn = mark_attention(lambda params, q, k, v: one_step(q, k, v))
    q, k, v = (project(w, X, N) for w in (WQ / 4, WK / 4, WV))
    assert marks(fn, (), q[:, -1:], k, v)[":query"] == marks(fn, (), q, k, v)[":context"]
    assert marks(fn, (), q, k, v)[":query"] == (B, 1, N, H)
    out = changed(fn, (), q, k, v, taps={":key": NEW[0], ":value": NEW[1]})
    np.testing.assert_allclose(out, attend(q[:, :1], k, v, rows=NEW), 2e-5, 2e-5)


def test_one_token_alone_is_no_special_case():
    for attention, heads in ((heads_third, N), (heads_second, N), (grouped, K)):
        q, k, v = (
            X[:1, :1, None, :H] * jnp.ones((B, 1, N, 1)),
            NEW[:, :1, :heads],
            NEW[:, 1:, :heads],
        )
        fn = mark_attention(lambda params, q, k, v, f=attention: f(q, k, v))
        new = NEW[1, :1, :heads]
        out = changed(fn, (), q, k, v, taps={":value": new})
        np.testing.assert_allclose(out[0, 0], jnp.repeat(new[0], N // heads, 0), 1e-6)
        assert set(marks(fn, (), q, k, v)) == {
            f":{k}" for k in ("query", "key", "value", "context")
        }


# --- what is no softmax attention over activations ---


def linear(params, q, k, v):
    return jnp.einsum("btnh,bsnh,bsnd->btnd", jnp.exp(q), jnp.exp(k), v)


def sigmoid(params, q, k, v):
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.sigmoid(jnp.einsum("btnh,bsnh->bnts", q, k)), v)


def state_space(params, q, k, v):
    decay = jnp.exp(jnp.cumsum(v[..., 0], 1))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * decay.swapaxes(1, 2)[:, :, None]
    return jnp.einsum("bnts,bsnh->btnh", scores / scores.sum(-1, keepdims=True), v)


def experts(params, q, k, v):
    gates = softmax(jnp.einsum("btnh,dnh->btd", q, params))
    outs = jnp.tanh(jnp.einsum("btnh,dnh->btdh", k, params))
    return jnp.einsum("btd,btdh->bth", gates, outs)


def opaque(params, q, k, v):
    attention = jax.custom_vjp(heads_third)
    attention.defvjp(lambda q, k, v: (heads_third(q, k, v), (q, k, v)), lambda saved, g: saved)
    return attention(q, k, v)


def over_queries(params, q, k, v):
    return jnp.einsum("bnts,bsnh->btnh", softmax(jnp.einsum("btnh,bsnh->bnts", q, k), 2), v)


def in_chunks(params, q, k, v):
    def step(carry, chunk):
        top, total, sums = carry
        scores = jnp.einsum("btnh,bsnh->bnts", q, chunk[0])
        new = jnp.maximum(top, scores.max(-1))
        weights, old = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
        sums = sums * old[..., None] + jnp.einsum("bnts,bsnh->bnth", weights, chunk[1])
        return (new, total * old + weights.sum(-1), sums), None

    start = jnp.full((B, N, T), -1e9), jnp.zeros((B, N, T)), jnp.zeros((B, N, T, H))
    (_, total, sums), _ = lax.scan(step, start, jax.tree.map(lambda x: x[None], (k, v)))
    return sums / total[..., None]


OTHERS = [linear, sigmoid, state_space, experts, opaque, over_queries, in_chunks]


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_no_attention_is_left_alone(other):
    args = [project(w, X, N) / 4 for w in (WQ, WK, WV)]
    fn = mark_attention(other)
    assert marks(fn, WQ, *args) == {}
    np.testing.assert_array_equal(fn(WQ, *args), other(WQ, *args))
