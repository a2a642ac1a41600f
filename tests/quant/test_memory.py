"""A training step over a packed base holds packed weights, and one layer or tile dense at a time.

Read from what the backward pass is handed, and from the compiled step.
"""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxpeft as jp
from jaxpeft.models.config import from_hf
from tests.cases.hlo import made

# No activation has as many elements as a matrix, or as all of its layers.
TOKENS = jax.ShapeDtypeStruct((2, 5), jnp.int32)
LAYERS = 6
REMAT = {
    "all kept": None,
    "projections kept": jp.models.decoder.KEEP_PROJECTIONS,
    "nothing kept": jax.checkpoint_policies.nothing_saveable,
}


def is_packed(leaf):
    return isinstance(leaf, jp.quant.QuantizedWeight)


def setting(fmt, remat):
    """The loss of a decoder, its adapter and its packed base, and the packed weights."""
    config = from_hf(
        dict(
            model_type="llama", vocab_size=80, hidden_size=128, intermediate_size=256,
            num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip
    model = nnx.eval_shape(lambda: jp.models.Decoder(config, remat=remat, rngs=nnx.Rngs(0)))
    dense = nnx.state(model)
    tuned = jp.transform(model, jp.lora(4), strict=True)
    sites = tuned.sites(dense, TOKENS)
    params = jax.eval_shape(lambda p: jp.quantize(p, fmt, sites=sites), dense)
    adapter = jax.eval_shape(lambda p: tuned.init(jax.random.key(0), p, TOKENS), params)

    def loss(adapter, params, tokens):
        return (tuned.apply(adapter, params, tokens) ** 2).mean()

    packed = [w for w in jax.tree.leaves(params, is_leaf=is_packed) if is_packed(w)]
    return loss, adapter, params, packed


CASES = [(jp.quant.nf4(), remat) for remat in REMAT] + [(jp.quant.int8(), "all kept")]


@pytest.mark.parametrize("fmt,remat", CASES, ids=lambda x: getattr(x, "name", x))
def test_a_step_keeps_packed_weights_and_unpacks_a_layer_at_a_time(fmt, remat):
    loss, adapter, params, packed = setting(fmt, REMAT[remat])
    stacks = [w for w in packed if len(w.shape) == 3]
    assert len(stacks) == 7
    layer = {math.prod(w.shape[1:]) for w in stacks}
    everywhere = {LAYERS * size for size in layer}

    def kept(adapter, params, tokens):
        return jax.vjp(lambda adapter: loss(adapter, params, tokens), adapter)[1]

    residuals = jax.tree.leaves(jax.eval_shape(kept, adapter, params, TOKENS))
    floats = [x for x in residuals if jnp.issubdtype(x.dtype, jnp.floating)]
    assert not (layer | everywhere) & {x.size for x in floats}
    shapes = {x.shape for x in residuals}
    assert all(w.packed["codes"].shape in shapes for w in stacks)

    step = jax.jit(jax.value_and_grad(loss)).lower(adapter, params, TOKENS).compile()
    assert not made(step.as_text(), everywhere)
    dense = 4 * sum(math.prod(w.shape[1:]) for w in stacks)
    activations = sum(x.size * x.dtype.itemsize for x in floats)
    assert step.memory_analysis().temp_size_in_bytes < activations + 1.5 * dense, dense


def test_tiles_of_a_large_matrix_are_dense_one_at_a_time_in_both_passes(monkeypatch):
    """Nor is there an array of a tile's shape for each of the values that codes stand for."""
    tile, columns = 256 * 128 * 4, 1024
    monkeypatch.setattr("jaxpeft.quant.product.TILE", tile)
    shape = jax.ShapeDtypeStruct((256, columns), jnp.float32)
    x = jax.ShapeDtypeStruct((3, 256), jnp.float32)
    for fmt in (jp.quant.nf4(), jp.quant.int8(), jp.quant.gguf("q5_0")):
        params = jax.eval_shape(lambda w, f=fmt: jp.quantize({"w": w}, f, compute="xla"), shape)
        model = jp.lift(lambda params, x: jnp.tanh(x @ params["w"]).sum(), strict=True)
        step = jax.jit(jax.grad(jax.checkpoint(model), 1)).lower(params, x).compile()
        assert not made(step.as_text(), {256 * columns})
        packed = sum(a.size * a.dtype.itemsize for a in params["w"].packed.values())
        assert step.memory_analysis().temp_size_in_bytes < 2 * packed + 3 * tile
