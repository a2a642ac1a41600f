"""T5s against transformers on the same random weights."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers.models.t5.modeling_t5 import T5Attention

import jaxpeft as jp
from jaxpeft.models import load, save
from jaxpeft.models.t5 import T5
from jaxpeft.models.t5_config import from_hf, to_hf
from jaxpeft.models.t5_names import names
from jaxpeft.models.t5_positions import distance_buckets
from tests.models.tiny_t5 import DECODER_MASK, MASK, MODELS, check, reference
from tests.models.tiny_t5 import pairs as pairs
from tests.models.tiny_t5 import t5 as t5

CONFIG = dict(
    model_type="t5", vocab_size=8, d_model=4, d_kv=2, d_ff=8, num_layers=2, num_heads=2
)  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_encoding_equal_transformers(t5, pairs, name):
    tiny = t5(name)

    @jax.jit
    def outputs(params, tokens, decoder_tokens):
        live = nnx.merge(nnx.graphdef(tiny.model), params)
        logits = live(tokens, decoder_tokens, mask=MASK, decoder_mask=DECODER_MASK)
        encoded = live.encode(tokens, mask=MASK)
        return logits, encoded, live(None, decoder_tokens, mask=MASK, encoded=encoded)

    expected = reference(tiny.torch_model, *pairs)
    logits, encoded, again = outputs(tiny.params, *pairs)
    assert logits.dtype == jnp.float32
    check(logits[DECODER_MASK], expected.logits.numpy()[DECODER_MASK])
    check(encoded[MASK], expected.encoder_last_hidden_state.numpy()[MASK])
    check(again[DECODER_MASK], expected.logits.numpy()[DECODER_MASK])


def test_cached_equals_uncached(t5, pairs):
    tiny, (tokens, decoder_tokens) = t5("t5"), pairs
    expected = reference(tiny.torch_model, *pairs, decoder_mask=np.ones((2, 12), bool))
    call = jax.jit(tiny.model.apply)
    cache = tiny.model.init_cache(2, 16)
    first, cache = call(tiny.params, tokens, decoder_tokens[:, :5], mask=MASK, cache=cache)
    later, cache = call(tiny.params, None, decoder_tokens[:, 5:], cache=cache)
    check(np.concatenate([first, later], axis=1), expected.logits.numpy())
    assert cache["cross_k"].shape == (2, 2, 13, 4, 6) and int(cache["index"]) == 12


def test_the_first_call_needs_something_to_read(t5, pairs):
    tiny = t5("flan")
    with pytest.raises(ValueError, match="Give the tokens in the first call"):
        tiny.model.apply(tiny.params, None, pairs[1], cache=tiny.model.init_cache(2, 16))


@pytest.mark.parametrize("buckets", [4, 8, 32])
@pytest.mark.parametrize("max_distance", [17, 128, 1000])
def test_distances_fall_into_the_buckets_of_transformers(buckets, max_distance):
    distance = np.arange(1500)
    expected = T5Attention._relative_position_bucket(
        -torch.tensor(distance), False, buckets, max_distance
    )
    table = distance_buckets(buckets, max_distance)
    np.testing.assert_array_equal(table[np.minimum(distance, max_distance)], expected)


def test_gradients_equal_those_of_torch(t5, pairs):
    tiny = t5("t5")
    names = {name.path: name for name in tiny.model.names()}
    tokens, labels = torch.tensor(pairs[0]), torch.tensor(pairs[1])
    logits = tiny.torch_model(input_ids=tokens, decoder_input_ids=labels).logits
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    ).backward()
    torch_grads = {name: p.grad.numpy() for name, p in tiny.torch_model.named_parameters()}
    tiny.torch_model.zero_grad()

    def loss(params):
        scores = jax.nn.log_softmax(tiny.model.apply(params, *pairs)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(scores, pairs[1][:, 1:, None], axis=-1))

    grads = jax.jit(jax.grad(loss))(tiny.params)
    for path, leaf in nnx.to_flat_state(grads):
        name = names["/".join(map(str, path))]
        tensors = [torch_grads[tensor] for tensor in name.tensors(leaf.shape)]
        layers = leaf[...] if name.stacked else leaf[...][None]
        check(np.stack([name.to_hf(np.asarray(layer)) for layer in layers]), np.stack(tensors))


def test_random_weights_are_spread_like_those_of_transformers():
    sizes = CONFIG | dict(vocab_size=500, d_model=64, d_kv=16, d_ff=96, num_heads=4, num_layers=4)
    config = from_hf(sizes | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    state = jax.jit(lambda: nnx.state(T5(config, rngs=nnx.Rngs(0))))()
    leaves = {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}
    torch_model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes | dict(
        feed_forward_proj="gated-gelu")))  # fmt: skip
    expected = torch_model.state_dict()
    for name in names(config):
        tensors = [expected[t].numpy() for t in name.tensors(leaves[name.path].shape)]
        # Four standard errors of a standard deviation over the fewest numbers, the biases' 128.
        assert np.std(leaves[name.path]) == pytest.approx(np.std(tensors), rel=0.25), name.path


def test_points_mark_attentions_and_sublayers(t5, pairs):
    tiny = t5("flan")
    stacks = {
        "encoder": (3, ["SelfAttention"]),
        "decoder": (2, ["SelfAttention", "EncDecAttention"]),
    }
    expected = {}
    for stack, (layers, attentions) in stacks.items():
        for i, name in enumerate([*attentions, "DenseReluDense"]):
            expected[f"{stack}/block/layer/{i}:delta"] = layers
            for key in ("query", "key", "value", "context") if name in attentions else ():
                expected[f"{stack}/block/layer/{i}/{name}:{key}"] = layers
    tuned = jp.transform(tiny.model, jp.rules(("**/*:delta", jp.bottleneck(2))))
    marked = {site.path: site for site in tuned.sites(tiny.params, *pairs) if site.boundary}
    found = {path: site.sizes("stack")[0] for path, site in marked.items() if path in expected}
    assert found == expected
    adapter = tuned.init(jax.random.key(0), tiny.params, *pairs)
    assert set(adapter) == {path for path in expected if path.endswith(":delta")}


def test_a_bare_method_leaves_the_head_alone(t5, pairs):
    for name in ("t5", "flan"):
        tuned = jp.transform(t5(name).model, jp.lora(2))
        adapter = jax.eval_shape(tuned.init, jax.random.key(0), t5(name).params, *pairs)
        assert not [path for path in adapter if "block" not in path]


def test_another_method_of_the_model_runs_tuned(t5, pairs):
    tiny = t5("flan")
    tuned = jp.transform(tiny.model, jp.rules(("**/SelfAttention/q/kernel", jp.lora(2))))
    adapter = tuned.init(jax.random.key(0), tiny.params, *pairs)
    adapter = jax.tree.map(lambda leaf: leaf + 0.3, adapter)
    merged = nnx.merge(nnx.graphdef(tiny.model), tuned.merge(adapter, tiny.params))
    encoded = tuned.apply(adapter, tiny.params, pairs[0], mask=MASK, method="encode")
    check(encoded[MASK], np.asarray(merged.encode(pairs[0], mask=MASK))[MASK])


def test_bfloat16_is_as_close_as_in_transformers(t5, pairs):
    tiny = t5("flan")
    model, params = load(tiny.directory, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    logits = jax.jit(model.apply)(params, *pairs, mask=MASK, decoder_mask=DECODER_MASK)
    assert logits.dtype == jnp.float32
    expected = reference(tiny.torch_model, *pairs).logits.numpy()
    rounded = reference(copy.deepcopy(tiny.torch_model).bfloat16(), *pairs).logits.float().numpy()
    error, theirs = (np.abs(x - expected)[DECODER_MASK].mean() for x in (logits, rounded))
    assert 0 < error < 1.2 * theirs


@pytest.mark.parametrize("name", MODELS)
def test_saved_for_transformers(t5, pairs, name, tmp_path):
    tiny = t5(name)
    save(tmp_path, tiny.model, tiny.params)
    torch_model = type(tiny.torch_model).from_pretrained(tmp_path)
    expected = tiny.torch_model.state_dict()
    assert torch_model.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in torch_model.state_dict().items())
    assert torch_model.config.decoder_start_token_id == 0
    check(reference(torch_model, *pairs).logits, reference(tiny.torch_model, *pairs).logits.numpy())
    again, params = load(tmp_path)
    assert again.config == tiny.model.config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, tiny.params))


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("stored", ["absent", "equal", "other"])
def test_the_tensors_say_whether_the_head_is_tied(t5, tmp_path, stated, stored):
    source = t5("t5").directory
    values = json.loads((source / "config.json").read_text()) | dict(tie_word_embeddings=stated)
    tensors = load_file(source / "model.safetensors")
    if stored != "absent":
        tensors["lm_head.weight"] = tensors["shared.weight"] + (stored == "other")
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = load(tmp_path)[0].config
    # A copy that config.json calls a head of its own may be trained apart from the embedding.
    assert config.tie_word_embeddings == (stored == "absent" or (stored == "equal" and stated))
    assert config.scale_decoder_outputs


@pytest.mark.parametrize("name", MODELS)
def test_a_config_is_read_back(t5, name):
    config = t5(name).model.config
    assert from_hf(json.loads(json.dumps(to_hf(config, "float32")))) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(feed_forward_proj="gated-tanh"), "feed_forward_proj='gated-tanh'.*gelu_new"),
        (dict(model_type="umt5"), "model_type='umt5' is not supported.*mt5"),
        (dict(task="sequence-classification"), "task='sequence-classification'.*seq2seq-lm"),
        (dict(labels=3), "labels=3"),
    ],
)
def test_errors_name_the_option(options, message):
    kw = {name: options.pop(name) for name in ("task", "labels") if name in options}
    with pytest.raises(ValueError, match=message):
        jp.models.families.read_config(CONFIG | options, **kw)


def test_a_missing_size_is_named():
    with pytest.raises(ValueError, match="lacks d_kv, num_heads"):
        from_hf({k: v for k, v in CONFIG.items() if k not in ("d_kv", "num_heads")})
