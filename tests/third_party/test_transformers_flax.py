"""The linen models of transformers 4: one table of architectures, held to all of the laws.

Each row counts the linear maps that the architecture has, in terms of its depth.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft as jp
from jaxpeft.core.tree import leaves_with_paths
from tests.third_party.checks import (
    FORMATS,
    RANK,
    Example,
    check,
    check_packed,
    close,
    filled,
    spread,
)

pytestmark = [
    pytest.mark.third_party,
    # The package says on import and at the first model that version 5 has no Flax models any more.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "FlaxBertModel"):
    pytest.skip("Flax models left transformers with version 5", allow_module_level=True)

DEPTH = 2
ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
TEXT = {**ENCODER, "vocab_size": 80, "max_position_embeddings": 48, "num_labels": 5}
VISION = {**ENCODER, "image_size": 16, "patch_size": 8, "num_labels": 5}
GQA = {**TEXT, "num_key_value_heads": 1}
SEQ2SEQ = {
    "vocab_size": 80,
    "d_model": 32,
    "encoder_layers": DEPTH,
    "decoder_layers": DEPTH,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
GPT = {"vocab_size": 80, "n_embd": 32, "n_layer": DEPTH, "n_head": 2, "n_positions": 40}
CLIP = {"text_config": {**TEXT, "eos_token_id": 2}, "vision_config": VISION, "projection_dim": 8}
WHISPER = {
    **SEQ2SEQ,
    "num_mel_bins": 32,
    "max_source_positions": 10,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
RESNET = {
    "embedding_size": 128,
    "hidden_sizes": [128, 128],
    "depths": [1, 1],
    "layer_type": "bottleneck",
    "num_labels": 5,
}
BIG_BIRD = {**TEXT, "attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}

IDS = {"input_ids": jnp.arange(14).reshape(2, 7)}
LONG = {"input_ids": jnp.arange(96).reshape(2, 48) % 64}
PIXELS = {"pixel_values": jnp.sin(jnp.arange(2304.0)).reshape(3, 3, 16, 16)}
PAIR = {**IDS, "decoder_input_ids": IDS["input_ids"]}
SOUND = {
    "input_features": jnp.sin(jnp.arange(1280.0)).reshape(2, 32, 20),
    "decoder_input_ids": IDS["input_ids"],
}

# Attention has 4 maps and cross-attention 4 more, an MLP 2, a gated one 3.
MODELS = {
    "Bert: pooler, classifier": (
        "BertForSequenceClassification", "BertConfig", TEXT, IDS, 6 * DEPTH + 2),
    "Bert: a tied head": ("BertForMaskedLM", "BertConfig", TEXT, IDS, 6 * DEPTH + 1),
    "Albert: one layer run DEPTH times": (
        "AlbertForMaskedLM", "AlbertConfig", {**TEXT, "embedding_size": 32}, IDS, 6 + 2),
    "BigBird: block sparse attention": (
        "BigBirdForMaskedLM", "BigBirdConfig", BIG_BIRD, LONG, 6 * DEPTH + 1),
    "GPT-2: transposed kernels, fused qkv, tied head": (
        "GPT2LMHeadModel", "GPT2Config", GPT, IDS, 4 * DEPTH),
    "GPT-J: attention beside the MLP, rotary, a head": (
        "GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}, IDS, 6 * DEPTH + 1),
    "Llama: grouped queries, gated MLP, a head": (
        "LlamaForCausalLM", "LlamaConfig", GQA, IDS, 7 * DEPTH + 1),
    "Bart: cross-attention": (
        "BartForConditionalGeneration", "BartConfig", {**SEQ2SEQ, "max_position_embeddings": 32},
        PAIR, 6 * DEPTH + 10 * DEPTH),
    "Whisper: two 1-D convolutions": (
        "WhisperForConditionalGeneration", "WhisperConfig", WHISPER, SOUND, 16 * DEPTH + 2),
    "ViT: a patch convolution": (
        "ViTForImageClassification", "ViTConfig", VISION, PIXELS, 6 * DEPTH + 2),
    "Dinov2": (
        "Dinov2ForImageClassification", "Dinov2Config", VISION, PIXELS, 6 * DEPTH + 2),
    "CLIP: two towers, two projections, patches": (
        "CLIPModel", "CLIPConfig", CLIP, {**IDS, **PIXELS}, 2 * 6 * DEPTH + 3),
    "ResNet: stem, 3 convolutions in each block, one shortcut, classifier": (
        "ResNetForImageClassification", "ResNetConfig", RESNET, PIXELS, 1 + 2 * 3 + 1 + 1),
}  # fmt: skip


def build(model: str, config: str, options: dict, inputs: dict) -> Example:
    """A model's own call as a function of its params and keyword arguments."""
    model = getattr(transformers, f"Flax{model}")(getattr(transformers, config)(**options), seed=0)

    def run(params, inputs):
        return model(**inputs, params=params)[0]

    return Example(run, run, model.params, (inputs,))


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_map_is_found_and_tuned(name):
    *parts, count = MODELS[name]
    example = build(*parts)
    kernels = [p for p, _ in leaves_with_paths(example.params)[0] if p.endswith("kernel")]
    assert len(kernels) == count
    check(example, jp.lora(RANK), kernels)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_runs_on_packed_weights(name, fmt):
    *parts, count = MODELS[name]
    stem = fmt.name == "nf4" and "stem" in name  # it has 3 x 7 x 7 inputs, no whole blocks of 32
    assert len(check_packed(build(*parts), fmt)) == count - stem


def test_rules_choose_the_sites_of_a_linen_module():
    """The module inside the model, called as linen modules are, with params at their own paths."""
    config = transformers.GPT2Config(**GPT)
    model = transformers.FlaxGPT2LMHeadModel(config, seed=0)
    ids = IDS["input_ids"]
    inputs = (ids, jnp.ones_like(ids), jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape))
    variables = {"params": model.params}
    example = Example(
        model.module, model.module.apply, variables, inputs, {"deterministic": True},
        lambda out: out.logits,
    )  # fmt: skip
    tuning = jp.rules(("**/attn/c_attn/kernel", jp.lora(RANK)), ("**/ln_*/*", jp.full()))
    layers = [f"params/transformer/h/{i}" for i in range(DEPTH)]
    norms = [f"{layer}/{norm}" for layer in layers for norm in ("ln_1", "ln_2")]
    paths = [f"{layer}/attn/c_attn/kernel" for layer in layers]
    paths += [
        f"{n}/{leaf}" for n in (*norms, "params/transformer/ln_f") for leaf in ("bias", "scale")
    ]
    check(example, tuning, paths)


def test_a_weight_that_is_normalized_becomes_dense_and_is_reported():
    """Wav2Vec2 divides the weight of one convolution by its norm, which has no low-rank form."""
    options = {
        **ENCODER, "vocab_size": 32,
        "conv_dim": (8, 8), "conv_kernel": (5, 3), "conv_stride": (4, 2),
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
        "do_stable_layer_norm": True, "feat_extract_norm": "layer",
    }  # fmt: skip
    inputs = {"input_values": jnp.sin(jnp.arange(400.0)).reshape(2, 200)}
    example = build("Wav2Vec2ForCTC", "Wav2Vec2Config", options, inputs)
    kernels = [p for p, _ in leaves_with_paths(example.params)[0] if p.endswith("kernel")]
    normalized = "wav2vec2/encoder/pos_conv_embed/conv/weight_v"
    tuned = jp.transform(example.model, jp.lora(RANK))
    fresh = tuned.init(jax.random.key(0), example.params, inputs)
    assert sorted(fresh) == sorted([*kernels, normalized])
    adapter = filled(fresh)
    with pytest.warns(jp.MaterializeWarning, match=normalized) as seen:
        got = tuned.apply(adapter, example.params, inputs)
    assert all(normalized in str(warning.message) for warning in seen)
    close(got, example.run(tuned.merge(adapter, example.params), inputs), 1e-5)
    check(example, jp.rules(("**/kernel", jp.lora(RANK))), kernels)


def test_training_lowers_the_loss():
    """GPT-2 learns one batch by heart through its adapter; its own params stay as they were."""
    example = build("GPT2LMHeadModel", "GPT2Config", GPT, IDS)
    params = spread(example.params)
    tuned = jp.transform(example.model, jp.lora(4), strict=True)
    adapter = tuned.init(jax.random.key(0), params, IDS)
    optimizer = optax.adam(3e-2)

    def loss(adapter):
        logits = tuned.apply(adapter, params, IDS)[:, :-1]
        targets = IDS["input_ids"][:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    @jax.jit
    def step(adapter, state):
        value, grads = jax.value_and_grad(loss)(adapter)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(adapter, updates), state, value

    before, state, values = jax.tree.map(np.array, params), optimizer.init(adapter), []
    for _ in range(60):
        adapter, state, value = step(adapter, state)
        values.append(float(value))
    print(f"\n  loss: {values[0]:.2f} to {values[-1]:.2f}")
    assert values[-1] < 0.5 * values[0]
    jax.tree.map(np.testing.assert_array_equal, before, params)
