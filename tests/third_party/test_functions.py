"""Published models as pure functions of arrays: equinox modules, and named arrays of penzai."""

import jax
import jax.numpy as jnp
import pytest

import jaxpeft as jp
from tests.third_party.checks import FORMATS, RANK, Example, check, check_packed

pytestmark = [
    pytest.mark.third_party,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
DEPTH = 2
IDS = jnp.arange(12).reshape(2, 6)
PIXELS = jnp.sin(jnp.arange(2304.0)).reshape(3, 3, 16, 16)
LLAMA = {
    "num_kv_heads": 1, "query_head_multiplier": 2, "embedding_dim": 32, "projection_dim": 32,
    "mlp_hidden_dim": 64, "num_decoder_blocks": DEPTH, "vocab_size": 80, "mlp_variant": "swiglu",
    "tie_embedder_and_logits": False,
}  # fmt: skip


def equimo():
    """A vision transformer: kernels `(out, in)`, convolved patches, mapped over images."""
    eqx = pytest.importorskip("equinox")
    library = pytest.importorskip("equimo.models.vit")
    model = library.VisionTransformer(
        16, 3, 32, 8, 2, [DEPTH], key=jax.random.key(0), num_classes=10, mlp_ratio=2.0
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def run(params, images):
        one = lambda image: eqx.combine(params, static)(image, jax.random.key(1), True)  # noqa: E731
        return jax.vmap(one)(images)

    return Example(run, run, params, (PIXELS,))


def penzai(**options):
    """A Llama of named arrays, whose products are einsums of positional views under vmaps."""
    pz = pytest.importorskip("penzai.pz")
    library = pytest.importorskip("penzai.models.transformer.variants.llamalike_common")
    config = library.LlamalikeTransformerConfig(**LLAMA | options)
    model = library.build_llamalike_transformer(config, jax.random.key(0))
    model, params = pz.unbind_params(model, freeze=True)

    def run(params, ids):
        logits = pz.bind_variables(model, params)(pz.nx.wrap(ids, "batch", "seq"))
        return logits.unwrap("batch", "seq", "vocabulary")

    return Example(run, run, params, (IDS,))


# Attention has 4 maps, of which equimo makes 3 one; an MLP has 2, a gated one 3. Patches, heads.
MODELS = {
    "equimo: ViT": (equimo, 4 * DEPTH + 2),
    "penzai: Llama": (penzai, 7 * DEPTH + 1),
    "penzai: Llama, layers in a scan": (lambda: penzai(use_layer_stack=True), 7 + 1),
    "penzai: Gemma, a tied head": (
        lambda: penzai(mlp_variant="geglu_approx", tie_embedder_and_logits=True), 7 * DEPTH),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_map_is_found_and_tuned(name):
    make, count = MODELS[name]
    example = make()
    tuned = jp.transform(example.model, jp.lora(RANK))
    maps = [
        s.path for s in tuned.sites(example.params, *example.inputs) if s.linear and not s.table
    ]
    assert len(maps) == count
    check(example, jp.lora(RANK), maps)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_runs_on_packed_weights(name, fmt):
    make, count = MODELS[name]
    assert len(check_packed(make(), fmt)) == count
