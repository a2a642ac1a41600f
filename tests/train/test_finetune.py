"""The whole way, from JSONL to a merged model, and against transformers and peft."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx

import jaxpeft as jp
from jaxpeft import models, train

RANK, ALPHA, RATE, STEPS = 2, 4.0, 0.02, 5
SIZES = dict(
    vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3,
)  # fmt: skip
TARGETS = ("q_proj", "v_proj")


@pytest.fixture(scope="module")
def hugging_face():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()


@pytest.fixture(scope="module")
def loaded(hugging_face, tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    hugging_face.save_pretrained(directory)
    return models.load(directory)


def batches():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, SIZES["vocab_size"], n) for n in (6, 9, 12, 7, 10, 8)]
    examples = [train.Example(row, np.arange(len(row)) >= 4) for row in rows]
    return train.Batches(examples, 4, seed=0, lengths=(12,))


class Run:
    """A tuned model with its steps, compiled once for all the tests here."""

    def __init__(self, model, params):
        self.model, self.params = model, params
        self.tuned = jp.transform(model, jp.rules(("**/{q,v}_proj/kernel", jp.lora(RANK, ALPHA))))
        self.adapter = self.tuned.init(
            jax.random.key(0), params, jax.ShapeDtypeStruct((4, 12), jnp.int32)
        )
        self.optimizer = train.optimizer(RATE, weight_decay=0.1)
        self.loss_fn = train.causal_lm_loss(self.tuned.apply)
        self.trainable = self.tuned.trainable(self.adapter)
        self.steps = {n: self.step(n) for n in (1, 2)}

    def step(self, n):
        options = dict(trainable=self.trainable, micro_batches=n)
        return train.make_step(self.loss_fn, self.optimizer, **options)

    def start(self, seed=0):
        key = jax.random.key(seed)
        return train.init_state(self.adapter, self.optimizer, key, trainable=self.trainable)

    def fit(self, state, steps, directory, micro_batches=1):
        step, options = self.steps[micro_batches], dict(directory=directory, learning_rate=RATE)
        return train.fit(step, state, self.params, batches(), steps=steps, **options)


@pytest.fixture(scope="module")
def run(loaded):
    return Run(*loaded)


def peft_losses(base, adapter):
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for i, layer in enumerate(model.model.model.layers):
            for name in TARGETS:
                leaf = adapter[f"layers/self_attn/{name}/kernel"]
                linear = getattr(layer.self_attn, name)
                linear.lora_A["default"].weight.copy_(torch.tensor(np.array(leaf["a"][i])))
                linear.lora_B["default"].weight.copy_(torch.tensor(np.array(leaf["b"][i].T)))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, data, losses = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.1), batches(), []
    for i in range(STEPS):
        batch = data(i)
        tokens, mask = torch.tensor(batch.tokens).long(), torch.tensor(batch.mask).long()
        labels = torch.where(torch.tensor(batch.targets), tokens, -100)
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_losses_equal_those_of_peft(hugging_face, run, tmp_path, micro_batches):
    run.fit(run.start(), STEPS, tmp_path, micro_batches)
    ours = [row["loss"] for row in train.read_metrics(tmp_path / "metrics.jsonl")]
    base = transformers.LlamaForCausalLM(hugging_face.config)
    base.load_state_dict(hugging_face.state_dict())
    theirs = peft_losses(base, run.adapter)
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)
    evaluation = train.make_evaluation(run.loss_fn)
    untrained = train.evaluate(evaluation, run.adapter, run.params, [batches()(STEPS - 1)])
    assert abs(untrained / theirs[-1] - 1) > 1e-2  # there was something to agree on


def test_a_real_adapter_comes_back_from_a_checkpoint(run, tmp_path):
    state = run.fit(run.start(), 2, tmp_path)
    back = train.restore(tmp_path / "checkpoints", run.start(seed=9))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(back.adapter), jax.tree.leaves(state.adapter), strict=True):
        np.testing.assert_array_equal(a, b)
    adapter = run.fit(back, 4, tmp_path).adapter
    batch, merged = batches()(0), run.tuned.merge(adapter, run.params)
    tuned_logits = run.tuned.apply(adapter, run.params, batch.tokens, mask=batch.mask)
    merged_logits = run.model.apply(merged, batch.tokens, mask=batch.mask)
    expected, actual = (np.asarray(x)[batch.mask] for x in (merged_logits, tuned_logits))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_from_jsonl_to_a_lower_loss(byte_chat_tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"instruction": "two and two", "output": "four"}\n' * 3)
    examples = train.encode(train.read_jsonl(path), byte_chat_tokenizer, max_length=64)
    config = models.DecoderConfig(
        "llama", len(byte_chat_tokenizer), 16, 24, 2, 2, 1, 8, initializer_range=0.3
    )
    model = models.Decoder(config, rngs=nnx.Rngs(0))
    params = nnx.state(model)
    tuned = jp.transform(model, jp.lora(4))
    data = train.Batches(examples, 2)
    adapter = tuned.init(jax.random.key(0), params, data(0).tokens)
    loss_fn, optimizer = train.causal_lm_loss(tuned.apply), train.optimizer(0.02)
    evaluation = train.make_evaluation(loss_fn)
    seen = []
    train.fit(
        train.make_step(loss_fn, optimizer),
        train.init_state(adapter, optimizer, jax.random.key(0)),
        params,
        data,
        steps=20,
        directory=tmp_path,
        learning_rate=0.02,
        evaluate=lambda adapter: train.evaluate(evaluation, adapter, params, data),
        eval_every=10,
        on_step=seen.append,
    )
    evaluations = [row["eval_loss"] for row in seen if "eval_loss" in row]
    assert len(evaluations) == 2 and evaluations[1] < 0.5 * seen[0]["loss"]
    train.plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
