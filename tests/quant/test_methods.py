"""Every method on one decoder with nf4 weights: as over the unpacked ones, and nothing dense."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpeft as jp
from jaxpeft.models.config import from_hf

CONFIG = from_hf(
    dict(
        model_type="qwen2", vocab_size=16, hidden_size=64, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    )
)  # fmt: skip
IDS = jnp.array([[1, 2, 3, 4], [4, 5, 6, 7]])
TASKS = {"task_ids": jnp.array([1, 0])}
# The names of the methods, and a tuning that has them.
TUNINGS = {
    "lora rslora qalora ia3 bitfit norm_tuning full": jp.chain(
        jp.rules(
            ("**/q_proj/kernel", jp.lora(2, alpha=4)),
            ("**/k_proj/kernel", jp.rslora(2)),
            ("**/v_proj/kernel", jp.ia3()),
            ("**/o_proj/kernel", jp.ia3("in")),
            ("**/gate_proj/kernel", jp.qalora(2, group=32)),
            ("**/{up,down}_proj/kernel", jp.lora(2, dtype=jnp.bfloat16)),
            ("**/bias", jp.bitfit()),
            ("layers/*norm/*", jp.norm_tuning()),
            ("norm/*", jp.full()),
        ),
        jp.rules(("**/down_proj/kernel", jp.ia3())),
    ),
    "houlsby compacter loreft ia3 invertible": jp.rules(
        ("**/self_attn:delta", jp.houlsby(reduction=16)),
        ("**/mlp:delta", jp.compacter(reduction=8)),
        ("layers:out", jp.loreft(2)),
        ("**/k_proj:out", jp.ia3("activations")),
        ("embed_tokens:out", jp.invertible(64)),
    ),
    "fuse pfeiffer split bottleneck average noreft direft": jp.rules(
        ("**/mlp:delta", jp.fuse(jp.pfeiffer(reduction=16), jp.pfeiffer(reduction=16))),
        ("**/self_attn:delta", jp.split(jp.bottleneck(2), jp.bottleneck(2), at=2)),
        ("layers:out", jp.average(jp.noreft(2), jp.direft(2))),
    ),
    "adapter_plus parallel_adapter batch_split compacter_plus": jp.chain(
        jp.rules(
            ("**/self_attn:delta", jp.batch_split(*[jp.bottleneck(2)] * 2, sizes=(1, 1))),
            ("**/mlp:delta", jp.parallel_adapter(reduction=16)),
            ("layers:out", jp.adapter_plus(reduction=16)),
        ),
        jp.rules(("**/mlp:delta", jp.compacter_plus(reduction=8))),
    ),
    "prompt_tuning prefix_tuning": jp.chain(jp.prompt_tuning(2), jp.prefix_tuning(2, hidden=4)),
    "p_tuning": jp.p_tuning(2, hidden=4),
    "multitask_prompt_tuning": jp.multitask_prompt_tuning(2, 2),
    "cpt": jp.cpt([5, 1, 7], [1, 2, 3]),
    "cartridge": jp.cartridge(3),
    "llama_adapter": jp.llama_adapter(2, layers=1),
    "ladder": jp.rules(("norm:in", jp.ladder(2, 2))),
    "shadow": jp.shadow(2),
}
# It lengthens the sequences inside of an encoder of images, behind the looked-up tokens.
ELSEWHERE = {"deep_prompt"}


@pytest.fixture(scope="module")
def decoder():
    model = nnx.eval_shape(lambda: jp.models.Decoder(CONFIG, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)

    def filled(leaf):
        size = leaf.shape[-2] if leaf.ndim > 2 else 4
        return jnp.asarray(random.standard_normal(leaf.shape) / size**0.5 + (leaf.ndim == 1), "f")

    params = jax.tree.map(filled, nnx.state(model))
    packed = jp.quantize(params, jp.rules(("**/*_proj/kernel", jp.quant.nf4())))
    return model, packed, unpacked(packed)


def unpacked(params):
    is_packed = lambda leaf: isinstance(leaf, jp.quant.QuantizedWeight)  # noqa: E731
    return jax.tree.map(
        lambda leaf: leaf.materialize() if is_packed(leaf) else leaf, params, is_leaf=is_packed
    )


def moved(adapter):
    noise = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.1 * noise.standard_normal(x.shape).astype(x.dtype), adapter)


@pytest.mark.parametrize("names", TUNINGS)
def test_outputs_and_gradients_are_those_over_the_unpacked_weights(names, decoder):
    model, packed, plain = decoder
    # strict: a weight that became dense as a whole would be an error.
    tuned = jp.transform(model, TUNINGS[names], strict=True)
    own = TASKS if "multitask" in names else {}
    adapter = moved(tuned.init(jax.random.key(0), packed, IDS))

    def loss(adapter, params):
        y = tuned.apply(adapter, params, IDS, **own)
        return jnp.sin(y).sum(), y

    @jax.jit
    def program(adapter, packed, plain):
        both = jax.value_and_grad(loss, has_aux=True)
        return both(adapter, packed), both(adapter, plain)

    ours, theirs = program(adapter, packed, plain)
    np.testing.assert_allclose(ours[0][1], theirs[0][1], rtol=1e-3, atol=1e-4)
    pairs = zip(*(jax.tree.leaves(side[1]) for side in (ours, theirs)), strict=True)
    for got, expected in pairs:
        got, expected = (np.asarray(x, np.float32) for x in (got, expected))
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert any(leaf.any() for leaf in jax.tree.leaves(ours[1]))


def test_every_public_method_is_here():
    made = [
        name
        for name, value in vars(jp).items()
        if inspect.isfunction(value) and inspect.signature(value).return_annotation == "Method"
    ]
    assert set(made) == {name for names in TUNINGS for name in names.split()} | ELSEWHERE
