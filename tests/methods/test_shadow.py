"""ShadowPEFT against PEFT on a tiny Llama, with the state starting as PEFT's own parts start it."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.tuners.shadow.model import _TokenShadowBackbone

import jaxpeft as jp
from jaxpeft.methods.shadow import shadow
from jaxpeft.methods.shadow_backbone import shadow_start
from jaxpeft.models import load
from tests.hf.conftest import PEFT_WARNINGS
from tests.methods.decoding import IDS, decoder, filled
from tests.models.tiny import oracle, tokens  # noqa: F401

pytestmark = PEFT_WARNINGS
RANK, HIDDEN, WIDTH = 3, 5, 6


class Embeddings(torch.nn.Module):
    """A backbone that hands on what it is given."""

    def forward(self, inputs_embeds, **kwargs):
        return types.SimpleNamespace(last_hidden_state=inputs_embeds, past_key_values=None)


def wrapped(model, backbone, projection):
    config = peft.ShadowConfig(
        r=RANK, update_hidden_size=HIDDEN, shadow_alpha=0.7, init_weights=False,
        auxiliary_loss_weight=0.0, shadow_dropout=0.3, task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(0)
    wrap = peft.get_peft_model(model, config)
    wrap.base_model.shadow_backbone["default"] = backbone
    wrap.base_model.shadow_projection["default"] = projection
    return wrap.eval()


def stacked(wrap, name):
    """The weights of a linear map of each layer, (layers, out, in)."""
    layers = wrap.base_model.model.model.layers
    maps = [layer.get_submodule(f"shadow_{name}") for layer in layers]
    found = {"weight": np.stack([m.weight.detach() for m in maps])}
    return found | ({"bias": np.stack([m.bias.detach() for m in maps])} if m_has_bias(maps) else {})


def m_has_bias(maps):
    return maps[0].bias is not None


def network(wrap, name):
    first, second = (stacked(wrap, f"update_{name}.default.{i}") for i in (0, 2))
    return {
        "down": first["weight"], "down_bias": first["bias"],
        "up": second["weight"].swapaxes(1, 2), "up_bias": second["bias"],
    }  # fmt: skip


def backbone_leaves(net, out):
    blocks = net.blocks
    t = lambda x: np.asarray(x.detach())  # noqa: E731
    return {
        "in": t(net.proj_in.weight).T, "in_bias": t(net.proj_in.bias), "out": t(out.weight).T,
        "scale": np.stack([t(b[0].weight) for b in blocks]),
        "bias": np.stack([t(b[0].bias) for b in blocks]),
        "first": np.stack([t(b[1].weight).T for b in blocks]),
        "first_bias": np.stack([t(b[1].bias) for b in blocks]),
        "second": np.stack([t(b[3].weight).T for b in blocks]),
        "second_bias": np.stack([t(b[3].bias) for b in blocks]),
    }  # fmt: skip


@pytest.mark.parametrize("blocks", [0, 2])
def test_it_equals_peft(oracle, tokens, blocks):  # noqa: F811
    torch_model, directory = oracle("llama")
    model, params = load(directory)
    d = model.config.hidden_size
    net, out = Embeddings(), torch.nn.Identity()
    if blocks:
        torch.manual_seed(1)
        net = _TokenShadowBackbone(d, WIDTH, blocks, WIDTH)
        out = torch.nn.Linear(WIDTH, d, bias=False)
    wrap = wrapped(torch_model, net, out)
    inputs = torch.tensor(tokens)
    logits = wrap(input_ids=inputs, use_cache=False).logits
    torch.sin(logits).sum().backward()

    method = shadow(RANK, hidden=HIDDEN, alpha=0.7, dropout=0.3, blocks=blocks, width=WIDTH)
    tuned = jp.transform(model, method)
    shapes = jax.eval_shape(tuned.init, jax.random.key(0), params, tokens)
    at_start = backbone_leaves(net, out) if blocks else {}
    leaves = {
        "embed_tokens:out": at_start,
        "layers:in": {
            "down": stacked(wrap, "down.default")["weight"],
            "up": stacked(wrap, "up.default")["weight"].swapaxes(1, 2),
        },
        "layers:out": {"candidate": network(wrap, "transform"), "gate": network(wrap, "gate")},
    }
    adapter = jp.Adapter(jax.tree.map(jnp.asarray, leaves), shapes.sites)
    assert jax.tree.map(jnp.shape, dict(adapter)) == jax.tree.map(jnp.shape, dict(shapes))

    def loss(adapter):
        y = tuned.apply(adapter, params, tokens)
        return jnp.sin(y).sum(), (y, shadow_start(tuned, adapter, params, tokens))

    grads, (y, first) = jax.jit(jax.grad(loss, has_aux=True))(adapter)
    np.testing.assert_allclose(y, logits.detach(), rtol=1e-4, atol=1e-4)
    seed = wrap.base_model._seed_shadow_state.detach()
    np.testing.assert_allclose(first, seed, rtol=1e-4, atol=1e-5)
    layers = wrap.base_model.model.model.layers
    for i, layer in enumerate(layers):
        for mine, theirs in (
            (grads["layers:in"]["down"][i], layer.shadow_down["default"].weight),
            (grads["layers:in"]["up"][i].T, layer.shadow_up["default"].weight),
            (grads["layers:out"]["gate"]["down"][i], layer.shadow_update_gate["default"][0].weight),
        ):
            np.testing.assert_allclose(mine, _grad(theirs), rtol=1e-3, atol=1e-4)
    if blocks:
        np.testing.assert_allclose(
            grads["embed_tokens:out"]["in"].T, _grad(net.proj_in.weight), rtol=1e-3, atol=1e-4
        )
    wrap.unload()


def _grad(weight):
    return np.zeros(weight.shape) if weight.grad is None else weight.grad


@pytest.mark.parametrize("sizes", [{}, {"num_hidden_layers": 2, "intermediate_size": 20}])
def test_files_of_peft_with_a_mirror_are_read_and_written(oracle, tokens, tmp_path, sizes):  # noqa: F811
    torch_model, directory = oracle("llama")
    model, params = load(directory)
    config = peft.ShadowConfig(
        r=RANK, update_hidden_size=HIDDEN, shadow_alpha=0.7, init_weights=False,
        task_type="CAUSAL_LM", **{f"shadow_{name}": size for name, size in sizes.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    wrap = peft.get_peft_model(torch_model, config).eval()
    wrap.save_pretrained(tmp_path / "peft")
    mask = np.ones_like(tokens)
    mask[1, :4] = 0
    given = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
    places = np.maximum(mask.cumsum(1) - 1, 0)
    given["position_ids"] = torch.tensor(places)
    expected = wrap(**given, use_cache=False).logits.detach().numpy()
    wrap.unload()

    tuned, adapter = jp.hf.load_adapter(tmp_path / "peft", model)
    real = mask.astype(bool)
    found, plain = jax.jit(
        lambda: (tuned.apply(adapter, params, tokens, mask=real), model.apply(params, tokens))
    )()
    np.testing.assert_allclose(found[real], expected[real], rtol=1e-4, atol=1e-4)
    assert np.abs(found - plain)[real].max() > 1e-2
    with pytest.raises(ValueError, match="`shadow` attends to whole sequences"):
        tuned.apply(adapter, params, tokens, cache=model.init_cache(2, 12))

    jp.hf.save_adapter(tmp_path / "own", tuned, adapter, model=model)
    again = peft.PeftModel.from_pretrained(torch_model, tmp_path / "own").eval()
    np.testing.assert_allclose(
        again(**given, use_cache=False).logits.detach()[real], expected[real], rtol=1e-5, atol=1e-5
    )
    again.unload()
    _, back = jp.hf.load_adapter(tmp_path / "own", model)
    jax.tree.map(np.testing.assert_array_equal, dict(back), dict(adapter))
    jp.save(tmp_path / "native", adapter, tuned)
    native, back = jp.load(tmp_path / "native", model)  # makes the mirror of the model again
    jax.tree.map(np.testing.assert_array_equal, dict(back), dict(adapter))
    alike = lambda t: jax.make_jaxpr(t.apply)(adapter, params, tokens)  # noqa: E731
    assert str(alike(native)) == str(alike(tuned))
    with pytest.raises(ValueError, match="Pass the tuning .* tuning="):
        jp.load(tmp_path / "native", lambda params, x: x)


def test_what_a_file_cannot_hold_or_ask_for_is_refused(oracle, tmp_path):  # noqa: F811
    model, params = load(oracle("llama")[1])
    tuned = jp.transform(model, shadow(2))
    adapter = jax.eval_shape(tuned.init, jax.random.key(0), params, IDS)
    with pytest.raises(jp.hf.PeftFormatError, match="starts from jaxpeft.models.mirror"):
        jp.hf.save_adapter(tmp_path, tuned, filled(adapter), model=model)
    good = {"peft_type": "SHADOW", "r": 2, "shadow_alpha": 0.1, "shadow_dropout": 0.2}
    for option in (
        {"shadow_model": "a/path"}, {"r": "2"}, {"shadow_num_hidden_layers": "x"},
        {"target_modules": ["model.layers.1"]},
    ):  # fmt: skip
        (tmp_path / "adapter_config.json").write_text(json.dumps(good | option))
        with pytest.raises(ValueError, match=next(iter(option))):
            jp.hf.load_adapter(tmp_path, model)
    with pytest.raises(TypeError, match="is no decoder"):
        jp.models.mirror(torch)
    for wrong in (dict(layers=0), dict(heads=-1), dict(intermediate="8")):
        with pytest.raises(ValueError, match=f"{min(wrong)}=.* is out of range"):
            jp.models.mirror(decoder()[0], **wrong)


def test_with_a_cache_it_generates_the_same_tokens():
    (model, params), ids = decoder(), IDS
    tuned = jp.transform(model, shadow(2, alpha=1.0, blocks=1))
    adapter = filled(jax.eval_shape(tuned.init, jax.random.key(0), params, ids))
    cache = model.init_cache(2, 5, jnp.float32)
    new = jp.serve.generate(tuned.apply, (adapter, params), ids, cache=cache, max_new_tokens=2)
    text = ids
    for _ in range(2):
        step = tuned.apply(adapter, params, text)[:, -1].argmax(-1)
        text = np.concatenate([text, np.asarray(step)[:, None]], 1)
    np.testing.assert_array_equal(new, text[:, 3:])


def test_layers_with_names_of_their_own():
    """Looped layers hand the state on as scanned ones do, behind other methods too."""
    w = np.random.default_rng(0).standard_normal((3, 4, 4)).astype("f") / 2
    x = np.random.default_rng(1).standard_normal((2, 4)).astype("f")

    def layer(x, w, name):
        return jp.tap(x + jnp.tanh(jp.tap(x, f"{name}:in") @ w), f"{name}:out")

    def scanned(params, x):
        step = jax.checkpoint(lambda x, w: (layer(x, w, "layers"), None))
        return jax.lax.scan(step, jp.tap(x, "embed:out"), params)[0]

    def looped(params, x):
        x = jp.tap(x, "embed:out")
        for i in range(3):
            x = layer(x, params[i], f"block_{i}")
        return x

    options = dict(alpha=1.0, blocks=1, width=3)
    behind = jp.rules(("{layers,block_*}:in", jp.ia3("activations")))
    one = jp.transform(scanned, jp.chain(behind, shadow(2, **options)))
    many = jp.transform(looped, jp.chain(behind, shadow(2, **options, layers="block_*")))
    adapter = filled(jax.eval_shape(one.init, jax.random.key(0), w, x))
    sites = jax.eval_shape(many.init, jax.random.key(0), w, x).sites
    leaves = {"embed:out": adapter["embed:out"]}
    for i in range(3):
        for side in ("in", "out"):
            found = jax.tree.map(lambda leaf, i=i: leaf[i], adapter[f"layers:{side}"])
            leaves[f"block_{i}:{side}"] = found
    same = jp.Adapter(leaves, sites)
    a, b, plain = jax.jit(
        lambda: (one.apply(adapter, w, x), many.apply(same, w, x), scanned(w, x))
    )()
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert np.abs(a - plain).max() > 1e-2
    starts = shadow_start(one, adapter, w, x), shadow_start(many, same, w, x)
    np.testing.assert_allclose(*starts, rtol=1e-5, atol=1e-6)


def test_numbers_and_starts_are_checked():
    (model, params), ids = decoder(), IDS
    for wrong in ({"rank": 0}, {"hidden": 0.5}, {"blocks": -1}, {"width": 0}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            shadow(**({"rank": 2} | wrong))
    for option, glob in (("layers", "blocks"), ("start", "wte:out")):
        message = rf"`shadow`: {option}='{glob}' matched none of .* Nearest: "
        for tuning in (shadow(2, **{option: glob}), jp.rules(("**", shadow(2, **{option: glob})))):
            with pytest.raises(ValueError, match=message):
                jp.transform(model, tuning).init(jax.random.key(0), params, ids)
    tuned = jp.transform(model, shadow(2, start="norm:out"))
    adapter = tuned.init(jax.random.key(0), params, ids)
    with pytest.raises(ValueError, match="'layers:in' takes up 'shadow', which no site in front"):
        tuned.apply(adapter, params, ids)
    plain = jp.transform(model, jp.lora(2))
    with pytest.raises(ValueError, match="has no `shadow`"):
        shadow_start(plain, plain.init(jax.random.key(0), params, ids), params, ids)
    size = sum(leaf.size for leaf in jax.tree.leaves(adapter["layers:out"]))
    assert size == 2 * 2 * (2 * 2 * 8 + 2 + 8)
