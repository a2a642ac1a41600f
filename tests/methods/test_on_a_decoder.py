"""Laws that small methods share, on one decoder with remat: files, bfloat16, vmap, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft.hf.native import describe
from jaxpeft.methods.bitfit import bitfit
from jaxpeft.methods.cartridge import cartridge
from jaxpeft.methods.cpt import cpt
from jaxpeft.methods.ia3 import ia3
from jaxpeft.methods.ladder import ladder
from jaxpeft.methods.llama_adapter import llama_adapter
from jaxpeft.methods.multitask_prompt import multitask_prompt_tuning
from jaxpeft.methods.p_tuning import p_tuning
from tests.methods.decoding import IDS, decoder

MODEL, PARAMS = decoder()
TASKS = {"task_ids": jnp.array([2, 0])}
METHODS = {
    "ia3": (ia3(), {}),
    "ia3 of activations": (jp.rules(("**/k_proj:out", ia3("activations"))), {}),
    "bitfit": (bitfit(), {}),
    "qalora": (jp.qalora(2, alpha=3, group=4), {}),
    "p_tuning": (p_tuning(2, hidden=3), {}),
    "multitask": (multitask_prompt_tuning(2, 3, ranks=2), TASKS),
    "cpt": (cpt([5, 1, 7, 2], [1, 2, 3, 4], epsilon=20.0), {}),
    "llama_adapter": (llama_adapter(2, layers=1), {}),
    "cartridge": (cartridge(3, frozen=1), {}),
    "ladder": (jp.rules(("norm:in", ladder(2, 2))), {}),
    "attending ladder": (jp.rules(("norm:in", ladder(2, 2, heads=2))), {}),
    "shadow": (jp.shadow(2, hidden=3, alpha=1.0, blocks=1), {}),
    "layers": (jp.layers(jp.chain(jp.lora(2), jp.houlsby(width=2)), slice(1, 2)), {}),
    "dropped": (jp.layers(jp.houlsby(width=2)), {"drop_layers": jnp.array(1)}),
}
# Whose form lets a fresh adapter change nothing.
STILL = ("ia3", "qalora", "llama_adapter", "layers", "dropped", "shadow")
MAPPED = (*STILL, "multitask", "cpt", "cartridge", "ladder", "attending ladder")


@pytest.fixture(scope="module", params=METHODS)
def made(request):
    """The tuned model, a fresh adapter, and one with noise on what is trained."""
    tuning, own = METHODS[request.param]
    tuned = jp.transform(MODEL, tuning)
    fresh = jax.jit(tuned.init)(jax.random.key(0), PARAMS, IDS)
    noise = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda leaf, train: leaf + train * 0.3 * noise.standard_normal(leaf.shape).astype("f"),
        fresh,
        tuned.trainable(fresh),
    )
    return request.param, tuned, own, fresh, moved


@pytest.mark.parametrize("made", MAPPED, indirect=True)
def test_vmap_over_adapters_is_a_loop_over_adapters(made):
    name, tuned, own, fresh, moved = made

    def apply(adapter):
        return tuned.apply(adapter, PARAMS, IDS, **own)

    @jax.jit
    def program(fresh, moved):
        both = jax.tree.map(lambda *leaves: jnp.stack(leaves), fresh, moved)
        ones = apply(fresh), apply(moved)
        slope = jax.grad(lambda adapter: jnp.sin(apply(adapter)).sum())(moved)
        return MODEL.apply(PARAMS, IDS), ones, jax.vmap(apply)(both), slope

    plain, ones, mapped, slope = program(fresh, moved)
    if name in STILL:
        np.testing.assert_allclose(ones[0], plain, rtol=1e-4, atol=1e-5)
    assert ones[0].shape == plain.shape and np.abs(ones[1] - ones[0]).max() > 1e-2
    for one, other in zip(ones, mapped, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    for leaf, train in zip(*map(jax.tree.leaves, (slope, tuned.trainable(slope))), strict=True):
        assert bool(leaf.any()) == train and np.isfinite(leaf).all()


def test_files_hold_it(made, tmp_path):
    _, tuned, _, _, moved = made
    jp.save(tmp_path / "adapter.safetensors", moved, tuned)
    again, loaded = jp.load(tmp_path / "adapter.safetensors", MODEL)
    assert loaded.sites == moved.sites
    assert jax.tree.structure(loaded) == jax.tree.structure(moved)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(a, b)
    pairs = zip(tuned._methods(moved).values(), again._methods(loaded).values(), strict=True)
    assert all(describe(a) == describe(b) for a, b in pairs)


def test_a_bfloat16_model_stays_bfloat16(made):
    _, tuned, own, fresh, _ = made
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    # The carry of the layers' scan would have another type if an adapter widened it.
    y = jax.eval_shape(lambda: tuned.apply(fresh, small, IDS, **own))
    assert y.dtype == jax.eval_shape(lambda: MODEL.apply(small, IDS)).dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
