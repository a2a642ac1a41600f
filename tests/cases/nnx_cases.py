"""Flax nnx models, written the way that nnx users write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from tests.cases.case import Built, nnx_case, normal, table

NNX, case = table()
LAYERS, LOOPS, STATE = "Flax nnx layers", "Flax nnx loops, remat and jit", "Flax nnx state"
IDS = jnp.array([[1, 4, 2], [0, 3, 4]])


class Sequence(nnx.Module):
    """Some layers in a row, and a function between them."""

    def __init__(self, *layers: Any, between: Callable[[Any], Any] = jnp.tanh):
        self.layers = nnx.List(layers)
        self.between = between

    def __call__(self, x):
        first, *rest = self.layers
        x = first(x)
        for layer in rest:
            x = layer(self.between(x))
        return x


@case(LAYERS, "`nnx.Linear`", peers={"qwix": "fast", "quax": "fast"})
def linear() -> Built:
    def make(rngs):
        return Sequence(nnx.Linear(5, 7, rngs=rngs), nnx.Linear(7, 11, rngs=rngs))

    return nnx_case(make, normal(1, 3, 5))


@case(LAYERS, "`nnx.LinearGeneral`")
def linear_general() -> Built:
    def make(rngs):
        heads = nnx.LinearGeneral(11, (5, 4), rngs=rngs)
        return Sequence(heads, nnx.LinearGeneral((5, 4), 7, axis=(-2, -1), rngs=rngs))

    return nnx_case(make, normal(1, 2, 3, 11))


@case(LAYERS, "`nnx.Einsum`", peers={"quax": "dense"})
def einsum() -> Built:
    def make(rngs):
        return nnx.Einsum("btd,dnh->btnh", (7, 5, 3), rngs=rngs)

    return nnx_case(make, normal(1, 2, 2, 7))


@case(LAYERS, "`nnx.Conv`", peers={"qwix": "fast"})
def conv() -> Built:
    return nnx_case(lambda rngs: nnx.Conv(5, 7, (3,), rngs=rngs), normal(1, 2, 9, 5))


@case(LAYERS, "`nnx.Embed` with a tied `attend`", peers={"qwix": "silent"})
def embed() -> Built:
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 7, rngs=rngs)

        def __call__(self, ids):
            return self.embed.attend(jnp.tanh(self.embed(ids)))

    return nnx_case(Tied, IDS)


@case(LAYERS, "`nnx.MultiHeadAttention`")
def attention() -> Built:
    def make(rngs):
        return nnx.MultiHeadAttention(3, 7, 15, 11, decode=False, rngs=rngs)

    return nnx_case(make, normal(1, 2, 4, 7))


class Own(nnx.Module):
    """A weight of one's own, as third-party Llamas have."""

    def __init__(self, shape: tuple[int, ...], use: Callable[[Any, Any], Any]):
        self.w = nnx.Param(normal(5, *shape))
        self.use = use

    def __call__(self, x):
        return self.use(self.w[...], x)


def own(shape: tuple[int, ...], use: Callable[[Any, Any], Any], x: Any) -> Built:
    return nnx_case(lambda rngs: Own(shape, use), x)


@case(LAYERS, "`x @ self.w`", peers={"qwix": "fails or silent"})
def own_matmul() -> Built:
    return own((5, 7), lambda w, x: x @ w, normal(1, 3, 5))


@case(LAYERS, "own einsum module, string given to the constructor", peers={"qwix": "fast"})
def own_einsum() -> Built:
    return own((5, 7, 3), lambda w, x: jnp.einsum("BTD,NDH->BTNH", x, w), normal(1, 2, 2, 7))


@case(LAYERS, "a method whose first argument is not called `self`", peers={"qwix": "fails"})
def other_name() -> Built:
    class Odd(nnx.Module):
        def __init__(module, rngs):
            module.w = nnx.Param(normal(5, 5, 7))

        def __call__(module, x):
            return jnp.einsum("bd,df->bf", x, module.w[...])

    return nnx_case(Odd, normal(1, 3, 5))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(7, 13, rngs=rngs)
        self.down = nnx.Linear(13, 7, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Stack(nnx.Module):
    """Three layers in one, made by `nnx.vmap` and run by `run(blocks, x)`."""

    def __init__(self, rngs, run: Callable[[Any, Any], Any], axis: int = 0):
        make = nnx.vmap(Block, in_axes=0, out_axes=axis)
        self.blocks = make(rngs.split(3))
        self.run = run

    def __call__(self, x):
        return self.run(self.blocks, x)


def nnx_scan(axis: int, remat: bool) -> Callable[[Any, Any], Any]:
    def forward(block, x):
        return block(x)

    step = nnx.remat(forward) if remat else forward
    return nnx.scan(step, in_axes=(axis, nnx.Carry), out_axes=nnx.Carry)


@case(LOOPS, "`nnx.scan`", peers={"qwix": "fails"})
def scanned() -> Built:
    return nnx_case(lambda rngs: Stack(rngs, nnx_scan(0, False)), normal(1, 5, 7))


@case(LOOPS, "`nnx.scan` of `nnx.remat`", peers={"qwix": "fails"})
def scanned_remat() -> Built:
    return nnx_case(lambda rngs: Stack(rngs, nnx_scan(0, True)), normal(1, 5, 7))


@case(LOOPS, "`nnx.scan`, layers on axis 1")
def scanned_axis_1() -> Built:
    return nnx_case(lambda rngs: Stack(rngs, nnx_scan(1, False), axis=1), normal(1, 5, 7))


@case(LOOPS, "`nnx.scan` of `nnx.remat`, layers on axis 1")
def scanned_remat_axis_1() -> Built:
    return nnx_case(lambda rngs: Stack(rngs, nnx_scan(1, True), axis=1), normal(1, 5, 7))


def over_split(blocks: Any, x: Any) -> Any:
    graphdef, state = nnx.split(blocks)

    def body(x, layer):
        return nnx.merge(graphdef, layer)(x), None

    return lax.scan(jax.checkpoint(body), x, state)[0]


@case(LOOPS, "`lax.scan` of `jax.checkpoint` over `nnx.split` state", peers={"qwix": "fails"})
def scanned_state() -> Built:
    return nnx_case(lambda rngs: Stack(rngs, over_split), normal(1, 5, 7))


def checkpointed(block: Any, x: Any) -> Any:
    graphdef, state = nnx.split(block)
    return jax.checkpoint(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)


class Once(nnx.Module):
    def __init__(self, rngs, run: Callable[[Any, Any], Any]):
        self.block = Block(rngs)
        self.run = run

    def __call__(self, x):
        return self.run(self.block, x)


@case(LOOPS, "`jax.checkpoint` over `nnx.split` state (Tunix)", peers={"qwix": "silent"})
def remat_state() -> Built:
    return nnx_case(lambda rngs: Once(rngs, checkpointed), normal(1, 5, 7))


@case(LOOPS, "`nnx.remat`", peers={"qwix": "fast"})
def remat() -> Built:
    return nnx_case(lambda rngs: Once(rngs, nnx.remat(lambda block, x: block(x))), normal(1, 5, 7))


@case(LOOPS, "`nnx.jit` inside the model")
def nnx_jit() -> Built:
    return nnx_case(lambda rngs: Once(rngs, nnx.jit(lambda block, x: block(x))), normal(1, 5, 7))


@jax.jit
def helper(w, x):
    return jnp.tanh(x @ w)


@case(LOOPS, "a `@jax.jit` helper", peers={"qwix": "fails"})
def jit_helper() -> Built:
    return own((5, 7), helper, normal(1, 3, 5))


@case(LOOPS, "a `@jax.jit` helper, after the base model ran", peers={"qwix": "silent"})
def jit_helper_warm() -> Built:
    x = normal(1, 3, 5)
    Own((5, 7), helper)(x)
    return own((5, 7), helper, x)


@case(LOOPS, "`jax.vmap` inside the model", peers={"qwix": "fails"})
def vmapped() -> Built:
    def rows(w, x):
        return jax.vmap(lambda row: row @ w)(x)

    return own((5, 7), rows, normal(1, 3, 5))


@case(STATE, "batch statistics and dropout, `mutable=`")
def mutable() -> Built:
    rngs = nnx.Rngs(0)
    model = Sequence(
        nnx.Linear(5, 7, rngs=rngs),
        nnx.BatchNorm(7, rngs=rngs),
        nnx.Dropout(0.5, rngs=rngs),
        nnx.Linear(7, 11, rngs=rngs),
    )
    return Built(model, nnx.state(model), (normal(1, 3, 5),), {"mutable": nnx.BatchStat})
