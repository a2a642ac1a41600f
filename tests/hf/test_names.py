"""Adapters of models that this library does not know, by names that their owner gives."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import linen as nn
from flax import nnx
from safetensors.numpy import load_file

import jaxpeft as jp
from jaxpeft.hf import load_adapter, save_adapter
from tests.hf.conftest import PEFT_WARNINGS, check, randomize
from tests.hf.test_write import random_adapter, same

pytestmark = PEFT_WARNINGS
WIDTH, HEADS, DEPTH, VOCABULARY = 8, 2, 3, 12


class TorchBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.query = torch.nn.Linear(WIDTH, WIDTH)
        self.out = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return x + self.out(torch.tanh(self.query(x)))


class TorchModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = torch.nn.ModuleList(TorchBlock() for _ in range(DEPTH))

    def forward(self, tokens):
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        return x


def values(torch_model):
    return {name: value.detach().numpy() for name, value in torch_model.state_dict().items()}


class LinenModel(nn.Module):
    """One module a layer, heads on axes of their own."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, WIDTH, name="table")(tokens)
        for i in range(DEPTH):
            heads = nn.DenseGeneral((HEADS, WIDTH // HEADS), name=f"block_{i}_query")(x)
            out = nn.DenseGeneral(WIDTH, axis=(-2, -1), use_bias=False, name=f"block_{i}_out")
            x = x + out(jnp.tanh(heads))
        return x


def linen(weights):
    params = {"table": {"embedding": weights["table.weight"]}}
    for i in range(DEPTH):
        kernel = weights[f"blocks.{i}.query.weight"].T.reshape(WIDTH, HEADS, -1)
        bias = weights[f"blocks.{i}.query.bias"].reshape(HEADS, -1)
        out = weights[f"blocks.{i}.out.weight"].T.reshape(HEADS, -1, WIDTH)
        params[f"block_{i}_query"] = {"kernel": kernel, "bias": bias}
        params[f"block_{i}_out"] = {"kernel": out}
    return LinenModel(), {"params": jax.tree.map(jnp.asarray, params)}


LINEN_NAMES = {
    "params/table/embedding": "table",
    "params/block_*_*/kernel": "blocks.*.*",
    "params/block_*_query/bias": "blocks.*.query",
}


def function(params, tokens):
    """Layers stacked, each weight (out, in) as torch has it."""
    x = params["table"][tokens]

    def step(x, layer):
        hidden = jnp.tanh(x @ layer["query"].T + layer["query_bias"])
        return x + hidden @ layer["out"].T, None

    return jax.lax.scan(step, x, params["layers"])[0]


def stack(weights, name):
    return jnp.stack([weights[f"blocks.{i}.{name}"] for i in range(DEPTH)])


def functional(weights):
    layers = {"query": "query.weight", "query_bias": "query.bias", "out": "out.weight"}
    stacked = {ours: stack(weights, theirs) for ours, theirs in layers.items()}
    return function, {"table": jnp.asarray(weights["table.weight"]), "layers": stacked}


FUNCTION_NAMES = {
    "table": "table",
    "layers/query": "blocks.{layer}.query",
    "layers/out": "blocks.{layer}.out.weight",
    "layers/query_bias": "blocks.{layer}.query.bias",
}


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.table = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.query = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(DEPTH)])
        self.out = nnx.List(
            [nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs) for _ in range(DEPTH)]
        )

    def __call__(self, tokens):
        x = self.table(tokens)
        for query, out in zip(self.query, self.out, strict=True):
            x = x + out(jnp.tanh(query(x)))
        return x


def nnx_model(weights):
    model = NnxModel(nnx.Rngs(0))
    model.table.embedding[...] = jnp.asarray(weights["table.weight"])
    for i in range(DEPTH):
        model.query[i].kernel[...] = jnp.asarray(weights[f"blocks.{i}.query.weight"].T)
        model.query[i].bias[...] = jnp.asarray(weights[f"blocks.{i}.query.bias"])
        model.out[i].kernel[...] = jnp.asarray(weights[f"blocks.{i}.out.weight"].T)
    return model, nnx.state(model)


NNX_NAMES = {
    "table/embedding": "table.weight",
    "query/*/kernel": "blocks.*.query",
    "query/*/bias": "blocks.*.query.bias",
    "out/*/kernel": "blocks.*.out",
}
MODELS = {
    "linen": (linen, LINEN_NAMES),
    "function": (functional, FUNCTION_NAMES),
    "nnx": (nnx_model, NNX_NAMES),
}
OPTIONS = {
    "lora": dict(target_modules=["query", "out"], r=3, lora_alpha=5),
    "layers": dict(
        target_modules=["query"],
        layers_to_transform=[0, 2],
        layers_pattern="blocks",
        rank_pattern={"2.query": 4},
    ),
    "embedding": dict(target_modules=["table", "blocks.1.out"], r=2),
    "biases": dict(target_modules=["query"], bias="all", lora_bias=True, r=2),
    "saved": dict(target_modules=["out"], modules_to_save=["query"]),
}


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, VOCABULARY, (2, 5))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", OPTIONS)
def test_both_ways(tmp_path, tokens, kind, options):
    torch.manual_seed(0)
    torch_model = TorchModel()
    weights = {name: value.copy() for name, value in values(torch_model).items()}
    build, names = MODELS[kind]
    model, params = build(weights)
    theirs = peft.get_peft_model(torch_model, peft.LoraConfig(**OPTIONS[options]))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    sites = jp.transform(model, jp.full()).sites(params, tokens)
    tuned, adapter = load_adapter(tmp_path / "theirs", model, names=names, sites=sites)
    expected = theirs(torch.tensor(tokens)).detach().numpy()
    check(tuned.apply(adapter, params, tokens), expected)
    save_adapter(tmp_path / "ours", tuned, adapter, names=names, sites=sites, task_type=None)
    first, second = (
        load_file(tmp_path / place / "adapter_model.safetensors") for place in ("theirs", "ours")
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)
    fresh = TorchModel()
    fresh.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours")
    check(again(torch.tensor(tokens)).detach().numpy(), expected)
    same(load_adapter(tmp_path / "ours", model)[1], adapter)


@pytest.fixture
def made(tokens):
    torch.manual_seed(0)
    model, params = linen(values(TorchModel()))
    tuned = jp.transform(model, jp.rules(("**/*query/kernel", jp.lora(2))))
    return tuned, random_adapter(tuned.init(jax.random.key(0), params, tokens)), model


def test_names_are_asked_for(made, tmp_path):
    tuned, adapter, model = made
    with pytest.raises(ValueError, match="Pass names="):
        save_adapter(tmp_path, tuned, adapter)
    save_adapter(tmp_path, tuned, adapter, names=LINEN_NAMES)
    (tmp_path / "jaxpeft.json").unlink()
    with pytest.raises(ValueError, match=r"Pass names=.*sites="):
        load_adapter(tmp_path, model)


def test_names_that_fit_nothing_or_twice_are_errors(made, tmp_path):
    tuned, adapter, model = made
    with pytest.raises(ValueError, match="'params/block_1_query/kernel' both stand for"):
        save_adapter(tmp_path, tuned, adapter, names={"params/*/kernel": "blocks.0.query"})
    with pytest.raises(ValueError, match="no torch module for 'params/block_0_query/kernel'"):
        save_adapter(tmp_path, tuned, adapter, names={"params/table/embedding": "table"})
    with pytest.raises(ValueError, match="'{layer}'"):
        save_adapter(tmp_path, tuned, adapter, names={"params/*/kernel": "blocks.{layer}.query"})
    with pytest.raises(ValueError, match=r"has 2 `\*`"):
        save_adapter(tmp_path, tuned, adapter, names={"params/*/kernel": "blocks.*.*"})
    save_adapter(tmp_path, tuned, adapter, names=LINEN_NAMES)
    wrong = {"params/blok_*/kernel": "blocks.*"}
    with pytest.raises(ValueError, match="fits no parameter. Nearest: 'params/block_0_query"):
        load_adapter(tmp_path, model, names=wrong, sites=adapter.sites)


def test_a_damaged_note_is_named(made, tmp_path):
    tuned, adapter, model = made
    save_adapter(tmp_path, tuned, adapter, names=LINEN_NAMES)
    for content in ("{", '{"sites": [{"path": 3}], "names": {}}', '{"sites": 1}', "[]"):
        (tmp_path / "jaxpeft.json").write_text(content)
        with pytest.raises(ValueError, match="jaxpeft.json"):
            load_adapter(tmp_path, model)
