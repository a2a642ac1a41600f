"""Tuned vision transformers: the laws, and adapter files against PEFT."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxpeft as jp
from jaxpeft.models.vit_names import adapter_names, names
from tests.hf.conftest import PEFT_WARNINGS, randomize
from tests.models.vit_oracle import check, pixels, reference
from tests.models.vit_oracle import vit_oracle as vit_oracle

QUERY_VALUE = "encoder/layer/attention/attention/{query,value}/kernel"
HEADS = {"vit": ["classifier"], "deit-teacher": ["cls_classifier", "distillation_classifier"]}
pytestmark = PEFT_WARNINGS


def filled(adapter, scale=0.3):
    """Random values, so that no factor is zero."""
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    values = [scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, values)


def sites_of(model):
    return jp.transform(model, jp.full()).sites(nnx.state(model), *model.example())


def test_lora_on_every_weight_is_fast_and_merges(vit_oracle):
    torch_model, directory = vit_oracle("vit")
    model, params = jp.models.load(directory)
    images = pixels(torch_model)
    tuned = jp.transform(model, jp.lora(2), strict=True)
    adapter = filled(jax.eval_shape(tuned.init, jax.random.key(0), params, images))
    tuned_paths = set(adapter)
    assert "embeddings/patch_embeddings/projection/kernel" in tuned_paths
    assert "classifier/kernel" not in tuned_paths
    got = jax.jit(tuned.apply)(adapter, params, images)
    expected = jax.jit(lambda a: model.apply(tuned.merge(a, params), images))(adapter)
    check(got, np.asarray(expected))
    assert np.abs(got - reference(torch_model, images).logits.numpy()).max() > 0.1


def test_bottlenecks_sit_at_the_encoder_and_at_each_sublayer(vit_oracle):
    model, params = jp.models.load(vit_oracle("deit")[1])
    images = pixels(vit_oracle("deit")[0])
    for pattern in ("encoder", "encoder/layer/{attention,output}"):
        tuned = jp.transform(model, jp.rules((f"{pattern}:out", jp.bottleneck(2))))
        adapter = jax.eval_shape(tuned.init, jax.random.key(0), params, images)
        stacks = {leaf.shape[0] for leaf in jax.tree.leaves(adapter)}
        assert (stacks == {3}) == ("layer" in pattern)
        logits = jax.eval_shape(tuned.apply, adapter, params, images)
        assert logits.shape == (2, 3)


def peft_model(torch_model, heads):
    options = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], modules_to_save=heads
    )
    tuned = peft.get_peft_model(copy.deepcopy(torch_model), options)
    randomize(tuned)
    return tuned.eval()


@pytest.mark.parametrize("name", HEADS)
def test_adapters_of_peft_are_read(vit_oracle, tmp_path, name):
    torch_model, directory = vit_oracle(name)
    model, params = jp.models.load(directory)
    theirs = peft_model(torch_model, HEADS[name])
    theirs.save_pretrained(tmp_path)
    named = dict(names=adapter_names(model.config), sites=sites_of(model))
    tuned, adapter = jp.hf.load_adapter(tmp_path, model, **named)
    images = pixels(torch_model)
    expected = reference(theirs, images).logits
    check(jax.jit(model.apply)(tuned.merge(adapter, params), images), expected)


def test_adapters_of_older_versions_are_read(vit_oracle, tmp_path):
    torch_model, directory = vit_oracle("vit")
    model, params = jp.models.load(directory)
    theirs = peft_model(torch_model, ["classifier"])
    theirs.save_pretrained(tmp_path)
    # As transformers 4 has the modules: with the names of the files of weights.
    new, old = adapter_names(model.config), {row.path: row.tensor for row in names(model.config)}
    renamed = {}
    for key, value in load_file(tmp_path / "adapter_model.safetensors").items():
        for path in old:
            for layer in range(3) if "lora_" in key else ():
                a, b = (f"{n[path].format(layer=layer).removesuffix('weight')}" for n in (new, old))
                key = key.replace(f".{a}lora_", f".{b}lora_")
        renamed[key] = value
    assert "base_model.model.vit.encoder.layer.0.attention.attention.query.lora_A.weight" in renamed
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_modules"] = ["query", "value"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tuned, adapter = jp.hf.load_adapter(tmp_path, model)
    images = pixels(torch_model)
    got = jax.jit(model.apply)(tuned.merge(adapter, params), images)
    check(got, reference(theirs, images).logits)


@pytest.mark.parametrize("name", HEADS)
def test_peft_reads_adapters(vit_oracle, tmp_path, name):
    torch_model, directory = vit_oracle(name)
    model, params = jp.models.load(directory)
    images = pixels(torch_model)
    heads = [(f"{head}/*", jp.full()) for head in HEADS[name]]
    tuned = jp.transform(model, jp.rules((QUERY_VALUE, jp.lora(2, 3)), *heads))
    adapter = filled(jax.eval_shape(tuned.init, jax.random.key(0), params, images))
    jp.hf.save_adapter(
        tmp_path, tuned, adapter, names=adapter_names(model.config), sites=sites_of(model),
        task_type=None,
    )  # fmt: skip
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(torch_model), tmp_path).eval()
    got = jax.jit(tuned.apply)(adapter, params, images)
    assert got.dtype == jnp.float32
    check(got, reference(theirs, images).logits)
