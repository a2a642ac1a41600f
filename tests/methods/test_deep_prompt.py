"""Visual prompt tuning against transformers' ViT with rows put behind its sequences by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxpeft as jp
from jaxpeft.methods.deep_prompt import deep_prompt
from tests.methods.decoding import filled
from tests.models.vit_oracle import check, pixels
from tests.models.vit_oracle import vit_oracle as vit_oracle

ROWS, LAYERS, WIDTH = 4, 3, 32
PLACES = {"deep": "encoder/layer:in", "shallow": "encoder:in"}


def prompted(model, images, prompts):
    """Logits of transformers' ViT: each layer with its own prompt, or all with the first one."""
    x = model.vit.embeddings(torch.tensor(images).permute(0, 3, 1, 2))
    length = x.shape[1]
    for layer, rows in zip(model.vit.layers, prompts, strict=True):
        if rows is not None:
            x = torch.cat([x[:, :length], rows.expand(len(x), -1, -1)], dim=1)
        x = layer(x)
        x = x[0] if isinstance(x, tuple) else x
    return model.classifier(model.vit.layernorm(x[:, :length])[:, 0])


@pytest.fixture(scope="module")
def vit(vit_oracle):
    theirs, directory = vit_oracle("vit")
    return theirs, *jp.models.load(directory), pixels(theirs)


@pytest.mark.parametrize("kind", PLACES)
def test_outputs_and_gradients_are_those_of_rows_put_in_by_hand(vit, kind):
    theirs, model, params, images = vit
    site = PLACES[kind]
    tuned = jp.transform(model, jp.rules((site, deep_prompt(ROWS))))
    adapter = filled(jax.eval_shape(tuned.init, jax.random.key(0), params, images))
    stack = (LAYERS,) if kind == "deep" else ()
    assert {p: jax.tree.map(jnp.shape, leaves) for p, leaves in adapter.items()} == {
        site: {"prompt": (*stack, ROWS, WIDTH)}
    }
    leaf = torch.tensor(np.array(adapter[site]["prompt"]), requires_grad=True)
    prompts = list(leaf) if kind == "deep" else [leaf, None, None]
    want = prompted(theirs, images, prompts)
    torch.sin(want).sum().backward()

    def loss(adapter):
        y = tuned.apply(adapter, params, images)
        return jnp.sin(y).sum(), y

    grads, got = jax.jit(jax.grad(loss, has_aux=True))(adapter)
    check(got, want)
    assert np.abs(got - jax.jit(model.apply)(params, images)).max() > 1e-2
    check(grads[site]["prompt"], leaf.grad, 1e-4)


def test_alone_it_is_shallow_and_its_parameters_are_counted(vit):
    _, model, params, images = vit
    tuned = jp.transform(model, deep_prompt(ROWS))
    adapter = jax.eval_shape(tuned.init, jax.random.key(0), params, images)
    assert list(adapter) == ["encoder:in"]
    assert adapter["encoder:in"]["prompt"].size == ROWS * WIDTH


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(x)


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = Layer(name=f"layer_{i}")(x)
        return x


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Encoder(name="trunk")(jnp.sin(x)).mean(axis=1)


def test_layers_in_a_loop_have_prompts_each_and_dropout_takes_entries():
    x = jax.random.normal(jax.random.key(0), (3, 5, 4))
    variables = filled(jax.eval_shape(Model().init, jax.random.key(1), x))
    rule = deep_prompt(2, inside="trunk", dropout=0.5)
    tuned = jp.transform(Model(), jp.rules(("trunk/layer_*:in", rule)))
    adapter = filled(jax.eval_shape(tuned.init, jax.random.key(2), variables, x))

    @jax.jit
    def by_hand(adapter):
        h = jnp.sin(x)
        for i in range(2):
            rows = jnp.broadcast_to(adapter[f"trunk/layer_{i}:in"]["prompt"], (3, 2, 4))
            weights = {"params": variables["params"]["trunk"][f"layer_{i}"]}
            h = Layer().apply(weights, jnp.concatenate([h, rows], axis=1))[:, :5]
        return h.mean(axis=1)

    want = by_hand(adapter)
    got = jax.jit(tuned.apply)(adapter, variables, x)
    np.testing.assert_allclose(got, want, 1e-5, 1e-6)
    dropped = jax.jit(lambda key: tuned.apply(adapter, variables, x, dropout_key=key))
    one, again, other = (dropped(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3 and np.abs(one - want).max() > 1e-3


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="tokens=0"):
        deep_prompt(0)
    with pytest.raises(ValueError, match="dropout=1.0 is not a share"):
        deep_prompt(2, dropout=1.0)


def test_a_module_that_is_not_there_is_an_error(vit):
    _, model, params, images = vit
    tuning = jp.rules(("encoder/layer:in", deep_prompt(2, inside="trunk")))
    with pytest.raises(ValueError, match="`deep_prompt`: inside='trunk' matched none of"):
        jax.eval_shape(jp.transform(model, tuning).init, jax.random.key(0), params, images)
