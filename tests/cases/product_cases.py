"""Pure functions: the products that models are made of, and the views of weights before them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.cases.case import Built, normal, of_weight, table

PRODUCTS, case = table()
EINSUMS, VIEWS, EXPERTS = "Einsums given at call time", "Views of a weight", "Experts"


def einsum_case(equation: str, *shapes: tuple[int, ...], left: bool = False) -> Built:
    """The einsum string arrives with the call, as in Gemma's layers."""
    w, x = normal(5, *shapes[1]), normal(1, *shapes[0])
    if left:
        return of_weight(lambda w, x: jnp.einsum(equation, w, x), w, x)
    return of_weight(lambda w, x: jnp.einsum(equation, x, w), w, x)


@case(EINSUMS, "`BTD,NDH->BTNH` (query)", peers={"qwix": "fails in linen", "quax": "dense"})
def query() -> Built:
    return einsum_case("BTD,NDH->BTNH", (2, 2, 7), (5, 7, 3))


@case(EINSUMS, "`BTD,SNDH->SBTNH` (fused q, k, v)")
def fused_qkv() -> Built:
    return einsum_case("BTD,SNDH->SBTNH", (2, 2, 7), (3, 5, 7, 4))


@case(EINSUMS, "`BSD,CKDH->CBSKH` (fused k, v)")
def fused_kv() -> Built:
    return einsum_case("BSD,CKDH->CBSKH", (2, 2, 7), (2, 3, 7, 5))


@case(EINSUMS, "`BTNH,NHD->BTD` (attention output)")
def attention_out() -> Built:
    return einsum_case("BTNH,NHD->BTD", (2, 2, 3, 5), (3, 5, 7))


@case(EINSUMS, "`...F,NHF->...NH`")
def ellipsis() -> Built:
    return einsum_case("...F,NHF->...NH", (2, 2, 7), (3, 5, 7))


@case(EINSUMS, "`NDH,BTD->BTNH`, weight on the left", peers={"qwix": "silent"})
def left() -> Built:
    return einsum_case("NDH,BTD->BTNH", (2, 2, 7), (5, 7, 3), left=True)


@case(EINSUMS, "`gating[0]`, `gating[1]` of (2, F, H)", peers={"qwix": "silent", "quax": "dense"})
def gating() -> Built:
    def gated(w, x):
        up = jnp.einsum("...F,HF->...H", x, w[1])
        return jax.nn.gelu(jnp.einsum("...F,HF->...H", x, w[0])) * up

    return of_weight(gated, normal(5, 2, 11, 7), normal(1, 3, 7))


@case(EINSUMS, "the same, `(2, F, H)` used as `jnp.dot(x, w[i])` (pi0)")
def gating_dot() -> Built:
    def gated(w, x):
        return jax.nn.gelu(jnp.dot(x, w[0].astype(x.dtype))) * jnp.dot(x, w[1].astype(x.dtype))

    return of_weight(gated, normal(5, 2, 7, 11), normal(1, 3, 7))


@case(VIEWS, "`x @ w`", peers={"quax": "fast"})
def matmul() -> Built:
    return of_weight(lambda w, x: x @ w, normal(5, 5, 7), normal(1, 3, 5))


@case(VIEWS, "`x @ w.T`", peers={"quax": "dense"})
def transposed() -> Built:
    return of_weight(lambda w, x: x @ w.T, normal(5, 7, 5), normal(1, 3, 5))


@case(VIEWS, "`w.T @ x`, a vector `x`")
def vector() -> Built:
    return of_weight(lambda w, x: w.T @ x, normal(5, 5, 7), normal(1, 5))


@case(VIEWS, "`w.astype(bfloat16)`", tolerance=3e-2, peers={"quax": "dense"})
def cast() -> Built:
    w, x = normal(5, 5, 7), normal(1, 3, 5).astype(jnp.bfloat16)
    return of_weight(lambda w, x: x @ w.astype(jnp.bfloat16), w, x)


@case(VIEWS, "`jnp.asarray(kernel, dtype)`, `lax.dot_general` (MaxText)")
def asarray() -> Built:
    def general(w, x):
        kernel = jnp.asarray(w, jnp.float32)
        return lax.dot_general(x, kernel, (((2,), (0,)), ((), ())))

    return of_weight(general, normal(5, 7, 5, 3), normal(1, 2, 2, 7))


@case(VIEWS, "`w.reshape`, split and merged axes", peers={"quax": "dense"})
def reshaped() -> Built:
    def heads(w, x):
        y = jnp.einsum("bd,dnh->bnh", x, w.reshape(7, 5, 3))
        return y.reshape(2, 15) @ w.reshape(7, 15).T

    return of_weight(heads, normal(5, 7, 15), normal(1, 2, 7))


@case(VIEWS, "`w[i]`, static", peers={"qwix": "silent", "quax": "dense"})
def indexed() -> Built:
    def use(w, x):
        return x @ w[2] + jnp.sin(x @ w[0])

    return of_weight(use, normal(5, 3, 5, 7), normal(1, 3, 5))


@case(VIEWS, "`w[i]`, traced", peers={"qwix": "silent", "quax": "dense"})
def indexed_traced() -> Built:
    return of_weight(lambda w, x, i: x @ w[i], normal(5, 3, 5, 7), normal(1, 3, 5), jnp.array(1))


@case(VIEWS, "`w[:, i]`, traced, `keepdims`")
def dynamic_index() -> Built:
    def use(w, x, i):
        return x @ lax.dynamic_index_in_dim(w, i, 1)[:, 0]

    return of_weight(use, normal(5, 5, 3, 7), normal(1, 3, 5), jnp.array(2))


@case(VIEWS, "`w * scale`, a number", peers={"quax": "dense"})
def scaled() -> Built:
    return of_weight(lambda w, x: x @ (w * 0.5), normal(5, 5, 7), normal(1, 3, 5))


@case(VIEWS, "`w * scale`, a traced scalar", peers={"quax": "dense"})
def scaled_traced() -> Built:
    s = jnp.array(0.7)
    return of_weight(lambda w, x, s: x @ (w * s), normal(5, 5, 7), normal(1, 3, 5), s)


@case(VIEWS, "`w * scale`, a vector of outputs or inputs")
def scaled_vector() -> Built:
    def use(w, x, s, t):
        return x @ (w * s) + x @ (t[:, None] * w) - x @ (w / s[None])

    w, x = normal(5, 5, 7), normal(1, 3, 5)
    return of_weight(use, w, x, 2 + jnp.cos(normal(6, 7)), normal(8, 5))


@case(VIEWS, "`-w`")
def negated() -> Built:
    return of_weight(lambda w, x: x @ -w, normal(5, 5, 7), normal(1, 3, 5))


@case(VIEWS, "`with_sharding_constraint` on a weight", peers={"quax": "dense"})
def constrained() -> Built:
    mesh = Mesh(jax.devices()[:1], ("x",))
    place = NamedSharding(mesh, PartitionSpec("x", None))

    def use(w, x):
        return x @ lax.with_sharding_constraint(w, place)

    return of_weight(use, normal(5, 5, 7), normal(1, 3, 5))


@case(VIEWS, "`optimization_barrier` on a weight", peers={"quax": "dense"})
def barrier() -> Built:
    def use(w, x):
        w, x = lax.optimization_barrier((w, x))
        return x @ w

    return of_weight(use, normal(5, 5, 7), normal(1, 3, 5))


@case(VIEWS, "`jnp.split` of a fused kernel")
def split() -> Built:
    def use(w, x):
        q, k, v = jnp.split(w, [5, 8], axis=1)
        return (x @ q).sum(-1, keepdims=True) * (x @ k) + x @ v

    return of_weight(use, normal(5, 7, 11), normal(1, 2, 7))


@case(VIEWS, "`w[..., b:e]`, static and dynamic slices")
def sliced() -> Built:
    def use(w, x, i):
        return x @ w[:, 2:6] + x @ lax.dynamic_slice_in_dim(w, i, 4, axis=1) + x @ w[:, 1:8:2]

    return of_weight(use, normal(5, 7, 11), normal(1, 2, 7), jnp.array(5))


@case(VIEWS, "`jnp.moveaxis`, `swapaxes`")
def moved() -> Built:
    def use(w, x):
        return jnp.einsum("bd,dnh->bnh", x, jnp.moveaxis(w, 0, 1)) + jnp.einsum(
            "bd,ndh->bnh", x, jnp.swapaxes(jnp.swapaxes(w, 0, 2), 0, 2)
        )

    return of_weight(use, normal(5, 5, 7, 3), normal(1, 2, 7))


@case(VIEWS, "`w[None]` against a batch of `x`")
def broadcast() -> Built:
    def use(w, x):
        return jnp.matmul(x, jnp.broadcast_to(w[None], (3, 7, 11)))

    return of_weight(use, normal(5, 7, 11), normal(1, 3, 2, 7))


@case(VIEWS, "one weight used twice")
def twice() -> Built:
    def use(w, x):
        return jnp.tanh(x @ w) @ w.T

    return of_weight(use, normal(5, 5, 7), normal(1, 3, 5))


@case(VIEWS, "`table[(ids,)]` and `jnp.dot(x, table.T)` (Gemma)", peers={"quax": "dense"})
def tied() -> Built:
    def use(w, ids):
        return jnp.dot(jnp.tanh(w[(ids,)]), w.T)

    return of_weight(use, normal(5, 11, 7), jnp.array([[1, 4, 2]]))


@case(VIEWS, "`table.at[(ids,)].get(...)`, `jnp.take`, one-hot")
def tables() -> Built:
    def use(w, ids):
        rows = w.at[(ids,)].get() + jnp.take(w, ids, axis=0)
        return rows + jax.nn.one_hot(ids, 11) @ w

    return of_weight(use, normal(5, 11, 7), jnp.array([[1, 4, 2]]))


@case(VIEWS, "a torch-style dict of dotted names, kernels `(out, in)`", peers={"qwix": "fails"})
def torch_dict() -> Built:
    def model(weights, x):
        for name in ("layers.0.linear", "layers.1.linear"):
            x = jnp.tanh(x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])
        return x

    params = {
        "layers.0.linear.weight": normal(5, 7, 5),
        "layers.0.linear.bias": normal(6, 7),
        "layers.1.linear.weight": normal(7, 11, 7),
        "layers.1.linear.bias": normal(8, 11),
    }
    return Built(model, params, (normal(1, 3, 5),), {})


@case(
    EXPERTS,
    "`ebd,edf->ebf`, one A and B an expert",
    peers={"quax": "fast", "qwix": "one B for all"},
)
def experts() -> Built:
    return einsum_case("ebd,edf->ebf", (3, 2, 5), (3, 5, 7))


@case(EXPERTS, "`gecd,ekfd->kgecf` (Gemma)")
def grouped_experts() -> Built:
    return einsum_case("gecd,ekfd->kgecf", (2, 3, 2, 7), (3, 2, 11, 7))


@case(EXPERTS, "a loop over experts, `w[i]`", peers={"qwix": "silent"})
def expert_loop() -> Built:
    def use(w, x):
        return sum(jnp.einsum("BD,DF->BF", x * (i + 1), w[i]) for i in range(3))

    return of_weight(use, normal(5, 3, 5, 7), normal(1, 2, 5))


# JAX 0.10 cannot map a `ragged_dot` unless all of its operands are mapped, the group sizes too.
@case(
    EXPERTS,
    "`jax.lax.ragged_dot`",
    mapped=False,
    peers={"qwix": "fails or silent", "quax": "dense"},
)
def ragged() -> Built:
    def use(w, x, sizes):
        return lax.ragged_dot(x, w, sizes)

    return of_weight(use, normal(5, 3, 5, 7), normal(1, 6, 5), jnp.array([2, 3, 1]))


@case(EXPERTS, "`jax.lax.ragged_dot`, `(E, 2, H, F)` kernel transposed (Gemma)", mapped=False)
def ragged_gated() -> Built:
    def use(w, x, sizes):
        gate, up = (lax.ragged_dot(x, w[:, i].swapaxes(1, 2), sizes) for i in range(2))
        return jax.nn.silu(gate) * up

    return of_weight(use, normal(5, 3, 2, 11, 5), normal(1, 6, 5), jnp.array([2, 3, 1]))
