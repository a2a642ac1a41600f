"""Flax linen models, written the way that linen users write them."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.cases.case import Built, linen_case, normal, table

LINEN, case = table()
LAYERS, LOOPS, STATE = "Flax linen layers", "Flax linen loops and remat", "Flax linen state"
IDS = jnp.array([[1, 4, 2], [0, 3, 4]])


@case(LAYERS, "`nn.Dense`", peers={"qwix": "fast", "quax": "fast", "gemma": "fast"})
def dense() -> Built:
    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(11)(nn.relu(nn.Dense(7)(x)))

    return linen_case(MLP(), normal(1, 3, 5))


@case(LAYERS, "`nn.Dense(dtype=bfloat16)`", tolerance=3e-2, peers={"quax": "dense"})
def dense_cast() -> Built:
    return linen_case(nn.Dense(7, dtype=jnp.bfloat16), normal(1, 3, 5))


@case(LAYERS, "`nn.DenseGeneral`, several axes", peers={"quax": "dense", "gemma": "fast"})
def dense_general() -> Built:
    class Heads(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.DenseGeneral((5, 4))(x)
            return nn.DenseGeneral(7, axis=(-2, -1))(y)

    return linen_case(Heads(), normal(1, 2, 3, 11))


@case(LAYERS, "`nn.Einsum`", peers={"qwix": "fails", "gemma": "fast"})
def einsum() -> Built:
    return linen_case(nn.Einsum((7, 5, 3), "btd,dnh->btnh"), normal(1, 2, 2, 7))


@case(LAYERS, "`x @ self.param(...)`", peers={"qwix": "fails or silent"})
def raw_param() -> Built:
    class Raw(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("w", nn.initializers.lecun_normal(), (5, 7))

    return linen_case(Raw(), normal(1, 3, 5))


@case(
    LAYERS, "`self.param` and `jnp.einsum` in `setup`", peers={"qwix": "fails", "gemma": "silent"}
)
def setup_param() -> Built:
    class Own(nn.Module):
        def setup(self):
            self.w = self.param("w", nn.initializers.lecun_normal(), (5, 7))

        def __call__(self, x):
            return jnp.einsum("bd,df->bf", x, self.w)

    return linen_case(Own(), normal(1, 3, 5))


@case(LAYERS, "einsum with the weight on the left", peers={"qwix": "silent", "gemma": "silent"})
def left_einsum() -> Built:
    class Left(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.lecun_normal(), (5, 7))
            return jnp.einsum("df,bd->bf", w, x)

    return linen_case(Left(), normal(1, 3, 5))


@case(LAYERS, "`nn.Conv`, 1-D", peers={"qwix": "fast", "quax": "dense", "gemma": "silent"})
def conv_1d() -> Built:
    return linen_case(nn.Conv(7, (3,)), normal(1, 2, 9, 5))


@case(LAYERS, "`nn.Conv`, 2-D, strided")
def conv_2d() -> Built:
    return linen_case(nn.Conv(7, (3, 2), strides=(2, 1), padding="VALID"), normal(1, 2, 5, 4, 3))


@case(LAYERS, "`nn.Conv`, grouped and dilated")
def conv_grouped() -> Built:
    module = nn.Conv(10, (3, 2), feature_group_count=2, kernel_dilation=(1, 2))
    return linen_case(module, normal(1, 1, 4, 4, 6))


@case(LAYERS, "`nn.Conv`, depthwise")
def conv_depthwise() -> Built:
    return linen_case(nn.Conv(15, (7,), feature_group_count=5), normal(1, 2, 8, 5))


@case(LAYERS, "`nn.ConvTranspose`")
def conv_transpose() -> Built:
    return linen_case(nn.ConvTranspose(7, (3,), strides=(2,)), normal(1, 2, 4, 5))


@case(LAYERS, "`nn.Embed`")
def embed() -> Built:
    return linen_case(nn.Embed(11, 7), IDS)


@case(LAYERS, "`nn.Embed` with a tied `attend`", peers={"qwix": "fails"})
def embed_attend() -> Built:
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(11, 7)
            return embed.attend(jnp.tanh(embed(ids)))

    return linen_case(Tied(), IDS)


@case(LAYERS, "`nn.MultiHeadDotProductAttention`", peers={"qwix": "fast", "gemma": "fast"})
def attention() -> Built:
    module = nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=15, out_features=11)
    return linen_case(module, normal(1, 2, 4, 7))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(7)(jnp.tanh(nn.Dense(13)(x))), None


def stack(block: Any, axis: int = 0) -> Any:
    return nn.scan(block, variable_axes={"params": axis}, split_rngs={"params": True}, length=3)


class Layers(nn.Module):
    remat: bool = False
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        return stack(block, self.axis)()(x, None)[0]


@case(LOOPS, "`nn.scan`", peers={"qwix": "fast", "quax": "fast", "gemma": "fast"})
def scanned() -> Built:
    return linen_case(Layers(), normal(1, 5, 7))


@case(LOOPS, "`nn.scan` of `nn.remat`", peers={"qwix": "fast", "quax": "dense", "gemma": "fast"})
def scanned_remat() -> Built:
    return linen_case(Layers(remat=True), normal(1, 5, 7))


@case(LOOPS, "`nn.scan`, layers on axis 1")
def scanned_axis_1() -> Built:
    return linen_case(Layers(axis=1), normal(1, 5, 7))


@case(LOOPS, "`nn.scan` of `nn.remat`, layers on axis 1")
def scanned_remat_axis_1() -> Built:
    return linen_case(Layers(remat=True, axis=1), normal(1, 5, 7))


@case(LOOPS, "`nn.remat`", peers={"quax": "dense"})
def remat() -> Built:
    class Once(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(Block)()(x)[0]

    return linen_case(Once(), normal(1, 5, 7))


@case(STATE, "batch statistics and dropout, `mutable=`")
def mutable() -> Built:
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False)(nn.Dense(7)(x))
            return nn.Dense(11)(nn.Dropout(0.5, deterministic=False)(x))

    model, x = Noisy(), normal(1, 3, 5)
    variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
    kwargs = {"mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(2)}}
    return Built(model, variables, (x,), kwargs)
