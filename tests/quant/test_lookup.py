"""Looking up rows of a packed table: as of the dense table, which is not made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.quant.quantize import pack

V, D = 40, 64
IDS = jnp.array([[0, 39, 5], [7, -1, 200]])
LOOKUPS = {
    "index": lambda table, ids: table[ids],
    "one row": lambda table, ids: table[ids[0, 1]],
    "take": lambda table, ids: jnp.take(table, ids, axis=0),
    "clip": lambda table, ids: jnp.take(table, ids, axis=0, mode="clip"),
    "fill": lambda table, ids: jnp.take(table, ids, axis=0, fill_value=3.0),
    "columns of the transpose": lambda table, ids: jnp.take(table.T, ids, axis=1),
    "a cast": lambda table, ids: table.astype(jnp.bfloat16)[ids],
}


def table(fmt):
    """A table (vocabulary, features) that is packed along its features, as those of files are."""
    return pack(jax.random.normal(jax.random.key(0), (V, D)), fmt, ((), (1,), (0,)))


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups_are_those_of_the_dense_table(name):
    packed, look = table(jp.quant.nf4()), LOOKUPS[name]
    found = jp.lift(look, strict=True)(packed, IDS)
    np.testing.assert_array_equal(found, look(packed.materialize(), IDS))


@pytest.mark.parametrize(
    "fmt",
    [jp.quant.int4(32, symmetric=False), jp.quant.fp8(), jp.quant.nvfp4(), jp.quant.llm_int8(),
     jp.quant.gguf("q5_1")],
    ids=str,
)  # fmt: skip
def test_the_table_is_not_made(fmt):
    packed, look = table(fmt), LOOKUPS["index"]
    compiled = jax.jit(jp.lift(look, strict=True)).lower(packed, IDS).compile()
    assert f"f32[{V},{D}]" not in compiled.as_text()
    np.testing.assert_array_equal(compiled(packed, IDS), look(packed.materialize(), IDS))


def test_other_lookups_are_done_on_the_dense_table():
    packed = pack(jax.random.normal(jax.random.key(0), (V, D)), jp.quant.int8(), ((), (0,), (1,)))
    for look in (lambda table, ids: table[ids], lambda table, ids: table[ids[0, 0], 2:5]):
        found = jp.lift(look)(packed, IDS)
        np.testing.assert_array_equal(found, look(packed.materialize(), IDS))


TOKENS = jnp.array([[0, 39, 5], [7, 3, 20]])


def test_a_tied_table_is_blocked_as_its_output_head_is():
    """With sites and without: blocks of 64 fit the features, not the rows."""
    params = {"wte": jax.random.normal(jax.random.key(0), (V, D)) / 8}
    model = lambda p, ids: jnp.tanh(p["wte"][ids]) @ p["wte"].T  # noqa: E731
    tuned = jp.transform(model, jp.rules(("wte", jp.lora(2))), strict=True)
    rules = jp.rules(("wte", jp.quant.nf4()))
    packed = jp.quantize(params, rules, sites=tuned.sites(params, TOKENS))
    named = jp.quantize({"embedding": params["wte"]}, jp.rules(("embedding", jp.quant.nf4())))
    jax.tree.map(np.testing.assert_array_equal, packed["wte"].packed, named["embedding"].packed)
    plain = {"wte": packed["wte"].materialize()}
    adapter = jax.tree.map(lambda a: a + 0.1, tuned.init(jax.random.key(1), packed, TOKENS))

    def loss(adapter, params):
        y = tuned.apply(adapter, params, TOKENS)
        return jnp.sin(y).sum(), y

    step = jax.jit(jax.grad(loss, has_aux=True))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # noqa: E731
    jax.tree.map(close, step(adapter, packed), step(adapter, plain))
    np.testing.assert_allclose(
        model(tuned.merge(adapter, packed), TOKENS), tuned.apply(adapter, packed, TOKENS), atol=1e-4
    )
