"""Pure functions: loops, branches, remat, custom derivatives and kernels around weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import Mesh, PartitionSpec

from tests.cases.case import Built, normal, of_weight, table

CONTROL, case = table()
LOOPS, CALLS, AROUND = "Loops and branches", "Jit, remat, vmap", "Operations on activations"
DENSE = "Right, but dense"
X = (3, 7)


def stacked(axis: int = 0) -> jax.Array:
    return jnp.moveaxis(normal(5, 4, 7, 7), 0, axis)


def layer(x, w):
    return x + jnp.tanh(x @ w), None


@case(LOOPS, "`lax.scan` over stacked weights", peers={"qwix": "silent", "quax": "fast"})
def scan() -> Built:
    return of_weight(lambda w, x: lax.scan(layer, x, w)[0], stacked(), normal(1, *X))


@case(LOOPS, "`lax.scan` of `jax.checkpoint`", peers={"qwix": "silent"})
def scan_remat() -> Built:
    body = jax.checkpoint(layer)
    return of_weight(lambda w, x: lax.scan(body, x, w)[0], stacked(), normal(1, *X))


@case(LOOPS, "`lax.scan`, layers on axis 1")
def scan_axis_1() -> Built:
    def use(w, x):
        return lax.scan(layer, x, jnp.moveaxis(w, 1, 0))[0]

    return of_weight(use, stacked(1), normal(1, *X))


@case(LOOPS, "`lax.scan` of `jax.checkpoint`, layers on axis 1 (MaxText)")
def scan_axis_1_remat() -> Built:
    def use(w, x):
        return lax.scan(jax.checkpoint(layer), x, jnp.moveaxis(w, 1, 0))[0]

    return of_weight(use, stacked(1), normal(1, *X))


@case(LOOPS, "`w[i]` of a closed-over stack in `lax.scan`")
def scan_const() -> Built:
    def use(w, x):
        return lax.scan(lambda x, i: layer(x, w[i]), x, jnp.arange(4))[0]

    return of_weight(use, stacked(), normal(1, *X))


@case(LOOPS, "`w[i]` of a closed-over stack in `lax.scan` of `jax.checkpoint`")
def scan_const_remat() -> Built:
    def use(w, x):
        return lax.scan(jax.checkpoint(lambda x, i: layer(x, w[i])), x, jnp.arange(4))[0]

    return of_weight(use, stacked(), normal(1, *X))


@case(LOOPS, "`w[:, i]` of a closed-over stack in `lax.scan`")
def scan_const_axis_1() -> Built:
    def use(w, x):
        return lax.scan(lambda x, i: layer(x, w[:, i]), x, jnp.arange(4))[0]

    return of_weight(use, stacked(1), normal(1, *X))


@case(LOOPS, "`lax.scan`, unrolled and reversed")
def scan_reverse() -> Built:
    def use(w, x):
        return lax.scan(layer, x, w, reverse=True, unroll=2)[0]

    return of_weight(use, stacked(), normal(1, *X))


@case(LOOPS, "nested `lax.scan` (groups of layers)")
def scan_nested() -> Built:
    def use(w, x):
        def group(x, ws):
            return lax.scan(layer, x, ws)[0], None

        return lax.scan(group, x, w.reshape(2, 2, 7, 7))[0]

    return of_weight(use, stacked(), normal(1, *X))


@case(LOOPS, "one closed-over weight in every step of `lax.scan`")
def scan_shared() -> Built:
    def use(w, x):
        return lax.scan(lambda x, _: layer(x, w), x, None, length=3)[0]

    return of_weight(use, normal(5, 7, 7), normal(1, *X))


@case(LOOPS, "weights handed out of `lax.scan`, then used", peers={})
def scan_outputs() -> Built:
    def use(w, x):
        def body(x, w):
            return layer(x, w)[0], w

        x, again = lax.scan(body, x, w)
        return x @ again[1]

    return of_weight(use, stacked(), normal(1, *X))


@case(LOOPS, "`fori_loop` with `w[i]`", peers={"quax": "dense"})
def fori() -> Built:
    def use(w, x):
        return lax.fori_loop(0, 4, lambda i, x: layer(x, w[i])[0], x)

    return of_weight(use, stacked(), normal(1, *X))


@case(LOOPS, "`fori_loop` with a traced bound", reverse=False)
def fori_traced() -> Built:
    def use(w, x, n):
        return lax.fori_loop(0, n, lambda i, x: layer(x, w[i])[0], x)

    return of_weight(use, stacked(), normal(1, *X), jnp.array(3))


@case(LOOPS, "`while_loop`", reverse=False, peers={"quax": "fast"})
def while_loop() -> Built:
    def use(w, x):
        def go_on(state):
            return state[0] < 3

        return lax.while_loop(go_on, lambda s: (s[0] + 1, layer(s[1], w)[0]), (0, x))[1]

    return of_weight(use, normal(5, 7, 7), normal(1, *X))


@case(LOOPS, "`while_loop` whose condition uses the weight", reverse=False)
def while_condition() -> Built:
    def use(w, x):
        def go_on(state):
            return (state[0] < 4) & (jnp.abs(state[1] @ w).max() < 1e3)

        return lax.while_loop(go_on, lambda s: (s[0] + 1, s[1] * 2 + s[1] @ w), (0, x))[1]

    return of_weight(use, normal(5, 7, 7), normal(1, *X))


@case(LOOPS, "a weight carried unchanged through a loop")
def carried() -> Built:
    def use(w, x):
        def body(i, state):
            w, x = state
            return w, layer(x, w)[0]

        return lax.fori_loop(0, 3, body, (w, x))[1]

    return of_weight(use, normal(5, 7, 7), normal(1, *X))


@case(LOOPS, "`lax.cond`", peers={"quax": "fast"})
def cond() -> Built:
    def use(w, x, flag):
        return lax.cond(flag, lambda x: x @ w[0], lambda x: jnp.sin(x @ w[1]), x)

    return of_weight(use, normal(5, 2, 5, 7), normal(1, 3, 5), jnp.array(True))


@case(LOOPS, "`lax.switch`")
def switch() -> Built:
    def use(w, x, i):
        branches = [lambda x, f=f: f(x @ w) for f in (jnp.sin, jnp.tanh, jax.nn.relu)]
        return lax.switch(i, branches, x)

    return of_weight(use, normal(5, 5, 7), normal(1, 3, 5), jnp.array(2))


@case(CALLS, "a `@jax.jit` helper")
def jitted() -> Built:
    helper = jax.jit(lambda w, x: jnp.tanh(x @ w.T))
    return of_weight(helper, normal(5, 7, 5), normal(1, 3, 5))


@case(CALLS, "jit in jit, with a weight and a closed-over array")
def jitted_twice() -> Built:
    shift = jnp.arange(7.0)
    inner = jax.jit(lambda w, x: x @ w + shift)
    return of_weight(jax.jit(lambda w, x: inner(w, 2 * x)), normal(5, 5, 7), normal(1, 3, 5))


@case(CALLS, "`jax.checkpoint` with a policy", peers={"quax": "dense"})
def remat_policy() -> Built:
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    @functools.partial(jax.checkpoint, policy=policy)
    def block(w, x):
        return jnp.tanh(jnp.tanh(x @ w) @ w.T)

    return of_weight(block, normal(5, 5, 7), normal(1, 3, 5))


@case(CALLS, "`jax.vmap` over `x`", peers={"quax": "fast"})
def vmap_inputs() -> Built:
    def use(w, x):
        return jax.vmap(lambda row: row @ w)(x)

    return of_weight(use, normal(5, 5, 7), normal(1, 3, 5))


@case(CALLS, "`jax.vmap` over stacked weights", peers={"quax": "fast"})
def vmap_weights() -> Built:
    def use(w, x):
        return jax.vmap(lambda w, x: jnp.tanh(x @ w))(w, x)

    return of_weight(use, normal(5, 3, 5, 7), normal(1, 3, 2, 5))


@case(CALLS, "`jax.grad` inside the model", peers={"quax": "fast"})
def grad_inside() -> Built:
    def use(w, x):
        return jax.grad(lambda x: jnp.sin(x @ w).sum())(x)

    return of_weight(use, normal(5, 5, 7), normal(1, 3, 5))


@jax.custom_vjp
def attention(q, k, v):
    return jax.nn.softmax(q @ k.T) @ v


def _attention_forward(q, k, v):
    out, pull = jax.vjp(lambda q, k, v: jax.nn.softmax(q @ k.T) @ v, q, k, v)
    return out, pull


attention.defvjp(_attention_forward, lambda pull, g: pull(g))


@case(AROUND, "a `custom_vjp` attention", peers={"quax": "fails"})
def custom_vjp() -> Built:
    def use(w, x):
        q, k, v = (x @ w[i] for i in range(3))
        return attention(q, k, v)

    return of_weight(use, normal(5, 3, 7, 5), normal(1, 2, 7))


@case(AROUND, "a `shard_map`", peers={"quax": "fails"})
def shard_map() -> Built:
    mesh = Mesh(jax.devices()[:1], ("x",))
    spec = PartitionSpec("x")
    halve = jax.shard_map(lambda y: jnp.sin(y) / 2, mesh=mesh, in_specs=spec, out_specs=spec)
    return of_weight(lambda w, x: halve(x @ w), normal(5, 5, 7), normal(1, 3, 5))


def _double(x_ref, out_ref):
    out_ref[...] = 2 * x_ref[...]


def _kernel(x):
    return pl.pallas_call(_double, jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)


doubled = jax.custom_vjp(_kernel)
doubled.defvjp(lambda x: (_kernel(x), None), lambda _, g: (_kernel(g),))


@case(AROUND, "a Pallas kernel", peers={"quax": "fast"})
def pallas() -> Built:
    return of_weight(lambda w, x: doubled(x @ w), normal(5, 5, 7), normal(1, 3, 5))


@case(AROUND, "`custom_jvp` activations (`relu`, `gelu`, `silu`)", peers={"quax": "fast"})
def custom_jvp() -> Built:
    def use(w, x):
        y = x @ w
        return jax.nn.relu(y) + jax.nn.gelu(y) * jax.nn.silu(y)

    return of_weight(use, normal(5, 5, 7), normal(1, 3, 5))


@case(AROUND, "`jax.nn.dot_product_attention`", peers={"quax": "fast"})
def dot_product_attention() -> Built:
    def use(w, x):
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, w[i]) for i in range(3))
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    return of_weight(use, normal(5, 3, 7, 2, 5), normal(1, 1, 3, 7))


@case(DENSE, "`jax.nn.relu(w)`, `w + 1`: the weight's values are changed", fast=False)
def changed() -> Built:
    return of_weight(lambda w, x: x @ (jax.nn.relu(w) + 1), normal(5, 5, 7), normal(1, 3, 5))


@case(DENSE, "`w * mask`, a mask of the weight's shape", fast=False)
def masked() -> Built:
    def use(w, x, mask):
        return x @ (w * mask)

    mask = (normal(7, 5, 7) > 0).astype(jnp.float32)
    return of_weight(use, normal(5, 5, 7), normal(1, 3, 5), mask)


@case(DENSE, "`w / norm(w)` (weight normalization)", fast=False)
def normalized() -> Built:
    def use(w, x):
        return x @ (w / jnp.linalg.norm(w, axis=0))

    return of_weight(use, normal(5, 5, 7), normal(1, 3, 5))


@case(DENSE, "a `custom_vjp` that takes the weight", fast=False)
def custom_vjp_weight() -> Built:
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    return of_weight(lambda w, x: product(x, w) + x @ w, normal(5, 5, 7), normal(1, 3, 5))


@case(DENSE, "a `shard_map` that takes the weight", fast=False)
def shard_map_weight() -> Built:
    mesh = Mesh(jax.devices()[:1], ("x",))
    spec = PartitionSpec("x")
    product = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec
    )
    return of_weight(lambda w, x: product(x, w) + x @ w, normal(5, 5, 7), normal(1, 3, 5))


@case(DENSE, "weights put together: `jnp.concatenate`", fast=False)
def concatenated() -> Built:
    def model(params, x):
        return x @ jnp.concatenate([params["q"], params["k"]], axis=1) + (x @ params["q"]).sum()

    params = {"q": normal(5, 5, 7), "k": normal(6, 5, 3)}
    return Built(model, params, (normal(1, 3, 5),))
