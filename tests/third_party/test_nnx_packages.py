"""Published nnx models: the language models of Tunix, and Mamba 2.

Tunix writes its own `Einsum` modules, experts as bare parameters, and `nnx.remat` around blocks.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxpeft as jp
from tests.third_party.checks import FORMATS, RANK, Example, check, check_packed

pytestmark = [
    pytest.mark.third_party,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

DEPTH = 2
IDS = jnp.arange(12).reshape(2, 6)
SIZES = {"num_layers": DEPTH, "embed_dim": 32, "hidden_dim": 64, "num_heads": 4, "head_dim": 8}
GQA = {**SIZES, "vocab_size": 80, "num_kv_heads": 2, "rope_theta": 10_000, "norm_eps": 1e-6}
GEMMA = {**SIZES, "num_embed": 80, "sliding_window_size": 4, "param_dtype": jnp.float32}
ATTENTION = [f"attn/{name}_proj/w" for name in "qkvo"]
MLP = [f"mlp/{name}_proj/kernel" for name in ("gate", "up", "down")]
EXPERTS = [f"mlp/{name}_proj" for name in ("gate", "up", "down")]

# Module, class, options, linear maps in a layer, other maps. Tied heads are embedding tables.
TUNIX = {
    "Llama 3": ("llama3", "Llama3", GQA, ATTENTION + MLP, ["lm_head/w"]),
    "Qwen 3: a config without a hash, tied head": (
        "qwen3", "Qwen3", {**GQA, "use_tied_embedding": True}, ATTENTION + MLP, []),
    "Qwen 3: blocks under remat": (
        "qwen3", "Qwen3", {**GQA, "remat_config": "BLOCK"}, ATTENTION + MLP, ["lm_head/w"]),
    "Qwen 3: experts": (
        "qwen3", "Qwen3", {**GQA, "num_experts": 4, "num_experts_per_tok": 2},
        [*ATTENTION, *EXPERTS, "mlp/router/kernel"], ["lm_head/w"]),
    "Gemma 3: fused keys and values": (
        "gemma3", "Gemma3", {**GEMMA, "num_kv_heads": 2},
        [f"attn/{name}_einsum/w" for name in ("q", "kv", "attn_vec")] + MLP, []),
    "Gemma 3: fused queries, keys and values, layers under remat": (
        "gemma3", "Gemma3", {**GEMMA, "num_kv_heads": 4, "remat_config": "DECODER"},
        [f"attn/{name}_einsum/w" for name in ("qkv", "attn_vec")] + MLP, []),
}  # fmt: skip


def as_example(model, inputs, read):
    graphdef, state = nnx.split(model)
    return Example(model, lambda s, *a: nnx.merge(graphdef, s)(*a), state, inputs, {}, read)


def tunix(module, cls, options):
    library = pytest.importorskip(f"tunix.models.{module}.model")
    if "remat_config" in options:
        options = {**options, "remat_config": library.RematConfig[options["remat_config"]]}
    model = getattr(library, cls)(library.ModelConfig(**options), rngs=nnx.Rngs(0))
    positions = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
    mask = jnp.tril(jnp.ones((len(IDS), IDS.shape[1], IDS.shape[1]), bool))
    return as_example(model, (IDS, positions, None, mask), lambda out: out[0])


@pytest.mark.parametrize("name", TUNIX)
def test_every_linear_map_of_tunix_is_found_and_tuned(name):
    *parts, maps, others = TUNIX[name]
    layers = [f"layers/{layer}/{path}" for layer in range(DEPTH) for path in maps]
    check(tunix(*parts), jp.lora(RANK), layers + others)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("name", TUNIX)
def test_tunix_runs_on_packed_weights(name, fmt):
    *parts, maps, others = TUNIX[name]
    assert len(check_packed(tunix(*parts), fmt)) == DEPTH * len(maps) + len(others)


def test_every_expert_of_tunix_has_its_own_pair():
    example = tunix(*TUNIX["Qwen 3: experts"][:3])
    rule = jp.rules(("**/mlp/gate_proj", jp.lora(RANK)))
    adapter = check(example, rule, [f"layers/{layer}/mlp/gate_proj" for layer in range(DEPTH)])
    leaves = adapter["layers/0/mlp/gate_proj"]
    assert {name: leaf.shape for name, leaf in leaves.items()} == {
        "a": (4, RANK, 32),
        "b": (4, RANK, 64),
    }


def test_the_state_of_a_tunix_model_may_be_abstract():
    """Shapes are enough to make an adapter, as for models that do not fit on the host."""
    example = tunix(*TUNIX["Llama 3"][:3])
    shapes = jax.eval_shape(lambda state: state, example.params)
    tuned = jp.transform(example.model, jp.rules(("**/attn/**", jp.lora(RANK))))
    adapter = tuned.init(jax.random.key(0), shapes, *example.inputs)
    assert len(adapter) == len(ATTENTION) * DEPTH
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter)) == DEPTH * RANK * (
        (32 + 32) + 2 * (32 + 16) + (32 + 32)
    )


def mamba():
    library = pytest.importorskip("mamba2_jax")
    config = library.Mamba2Config(
        vocab_size=80, hidden_size=32, state_size=8, head_dim=8, chunk_size=4,
        num_hidden_layers=DEPTH,
    )  # fmt: skip
    model = library.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    return as_example(model, (IDS,), lambda out: out["logits"])


PROJECTIONS = [
    f"backbone/layers/{i}/mixer/{name}/kernel"
    for i in range(DEPTH)
    for name in ("in_proj", "out_proj")
]


def test_the_projections_of_mamba_are_found_and_tuned():
    """Its depthwise convolution mixes no channels: a kernel of one row a channel has no rank."""
    example = mamba()
    check(example, jp.lora(RANK), PROJECTIONS)
    check(example, jp.rules(("**/in_proj/**", jp.lora(RANK))), PROJECTIONS[::2])


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_mamba_runs_on_packed_weights(fmt):
    assert set(PROJECTIONS) <= set(check_packed(mamba(), fmt))
