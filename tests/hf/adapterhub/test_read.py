"""Adapters of AdapterHub compute here what the library computes; its outputs are stored."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpeft.hf.adapterhub import AdapterHubFormatError, load_adapterhub
from tests.hf.adapterhub.conftest import FIXTURES, QUICK, bare, base, cases, inputs, outputs, stored

CLOSE = dict(rtol=1e-5, atol=1e-5)

OTHERWISE = {  # tested below
    "bert/direft", "bert/prefix_tuning_leave_out", "bert/prompt_tuning_after_bos",
    "t5_gated/compacter", "t5_gated/ia3", "t5_gated/lora",
}  # fmt: skip


def expected(kind, name):
    return stored(kind)[f"{name}/{'last_hidden_state' if kind == 'bert_bare' else 'logits'}"]


def told(kind, name):
    """ReFT is told which tokens are real; the library takes that from the model's own mask."""
    return {"token_mask": inputs(kind)[1].get("mask")} if "reft" in name else {}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case in QUICK else pytest.mark.slow)
        for case in cases()
        if case not in OTHERWISE
    ],
)
def test_outputs_are_those_of_the_library(case):
    kind, name = case.split("/")
    model, params = base(kind)
    tuned, adapter = load_adapterhub(FIXTURES / case, model)
    found = outputs(kind, tuned, adapter, params, **told(kind, name))
    np.testing.assert_allclose(found, expected(kind, name), **CLOSE)


@pytest.mark.parametrize(
    "case",
    ["bert/noreft", "bert/unipelt", "bert/prompt_tuning",
     pytest.param("vit/loreft", marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_states_of_all_positions_are_those_of_the_library(case):
    kind, name = case.split("/")
    model, params = bare(kind, {"bert": "BertModel", "vit": "ViTModel"}[kind])
    tuned, adapter = load_adapterhub(FIXTURES / case, model)
    found = outputs(kind, tuned, adapter, params, **told(kind, name))
    found = found if found.ndim == 3 else found[0]
    wanted = stored(kind)[f"{name}/last_hidden_state"]
    np.testing.assert_allclose(found, wanted[:, -found.shape[1] :], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compacter", "ia3", "lora"])
def test_a_t5_with_gates_and_a_head_of_its_own(name):
    # The library's own T5 has no head here: the decoder's states, times the output table.
    model, params = base("t5_gated")
    tuned, adapter = load_adapterhub(FIXTURES / "t5_gated" / name, model)
    states = stored("t5_gated")[f"{name}/last_hidden_state"]
    table = load_file(FIXTURES / "t5_gated/model.safetensors")["lm_head.weight"]
    found = outputs("t5_gated", tuned, adapter, params)
    np.testing.assert_allclose(found, states @ table.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("direft, name", [(True, "direft"), (False, "direft_reloaded")])
def test_a_direft_is_taken_for_a_noreft_unless_it_is_told(direft, name):
    model, params = base("bert")
    tuned, adapter = load_adapterhub(FIXTURES / "bert/direft", model, direft=direft)
    found = outputs("bert", tuned, adapter, params, **told("bert", "direft"))
    np.testing.assert_allclose(found, expected("bert", name), **CLOSE)


def test_a_prompt_behind_the_first_token():
    # In the last row the first token is padding. The library's mask for it falls on the prompt.
    model, params = base("bert")
    tuned, adapter = load_adapterhub(FIXTURES / "bert/prompt_tuning_after_bos", model)
    found = outputs("bert", tuned, adapter, params)
    np.testing.assert_allclose(found[:2], expected("bert", "prompt_tuning_after_bos")[:2], **CLOSE)


def test_a_pickled_file_is_read():
    model, _ = base("bert")
    _, adapter = load_adapterhub(FIXTURES / "binary", model)
    _, wanted = load_adapterhub(FIXTURES / "bert/prefix_tuning", model)
    jax.tree.map(np.testing.assert_array_equal, dict(adapter), dict(wanted))


def test_fused_adapters_may_be_anywhere(tmp_path):
    model, _ = base("bert")
    shutil.copytree(FIXTURES / "bert/fusion_dynamic", tmp_path / "fusion")
    with pytest.raises(FileNotFoundError, match="seq_bn"):
        load_adapterhub(tmp_path / "fusion", model)
    names = ["seq_bn", "seq_bn_2"]
    fused = [FIXTURES / "bert" / name for name in names]
    _, adapter = load_adapterhub(tmp_path / "fusion", model, fused=fused)
    _, first = load_adapterhub(fused[0], model)
    path = "encoder/layer/output:delta"
    np.testing.assert_array_equal(adapter[path]["0"]["down"], first[path]["down"])
    for name in names:
        shutil.copytree(FIXTURES / "bert" / name, tmp_path / "fusion" / name)
    load_adapterhub(tmp_path / "fusion", model)


def changed(tmp_path, case, tensors=None, **options):
    """A copy of an adapter with other options, and tensors changed by a function."""
    folder = tmp_path / "changed"
    shutil.copytree(FIXTURES / case, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    for name, value in options.items():
        (config if name in config else config["config"])[name] = value
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if tensors:
        found = load_file(folder / "adapter.safetensors")
        save_file(tensors(found), folder / "adapter.safetensors")
    return folder


def test_early_task_adapters_have_no_invertible_adapter(tmp_path):
    model, _ = base("bert")
    options = {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2}
    folder = changed(tmp_path, "bert/seq_bn", **options)
    with pytest.raises(ValueError, match="invertible_adapters"):
        load_adapterhub(folder, model)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"type": "text_task"}))
    _, adapter = load_adapterhub(folder, model)
    assert list(adapter) == ["encoder/layer/output:delta"]


@pytest.mark.parametrize(
    "case, options, message",
    [
        ("bert/prefix_tuning_leave_out", {}, "leave_out of prefix tuning"),
        ("bert/seq_bn_inv", {"inv_adapter": "glow"}, "'glow', which the library saves but"),
        ("bert/double_seq_bn", {"original_ln_after": False}, "the model's own residual"),
        ("vit/seq_bn", {"residual_before_ln": "post_add"}, "mean nothing in this model"),
        ("bert/lora", {"use_dora": True}, "as nobody else"),
        ("bert/ia3", {"alpha": 2}, "alpha=2"),
        ("bert/seq_bn", {"hidden_size": 768}, "of width 768, this is a 'bert' model of width 16"),
        ("bert/seq_bn", {"model_type": "roberta"}, "a 'roberta' model"),
        ("bert/compacter", {"reduction_factor": {"default": 4}}, "for each layer"),
    ],
)
def test_what_no_method_here_does_is_refused(tmp_path, case, options, message):
    model, _ = base(case.split("/")[0])
    with pytest.raises(AdapterHubFormatError, match=message) as error:
        load_adapterhub(changed(tmp_path, case, **options), model)
    assert "adapter_config.json" in str(error.value)


def test_models_of_others_are_refused():
    with pytest.raises(AdapterHubFormatError, match="no model of jaxpeft.models"):
        load_adapterhub(FIXTURES / "bert/seq_bn", lambda params, x: x)


DOWN = "bert.encoder.layer.0.output.adapters.seq_bn.adapter_down.0.weight"


@pytest.mark.parametrize(
    "case, tensors, message",
    [
        ("seq_bn", lambda t: {k: v for k, v in t.items() if k != DOWN}, "is missing"),
        ("seq_bn", lambda t: t | {"bert.more": t[DOWN]}, "more is not expected"),
        ("seq_bn", lambda t: t | {DOWN: t[DOWN][:2]}, "expected \\(4, 16\\)"),
        ("seq_bn", lambda t: t | {DOWN: t[DOWN].astype("i4")}, "expected floating point"),
        ("compacter", lambda t: {k: v for k, v in t.items() if "shared" not in k}, "with one"),
        (
            "prefix_tuning",
            lambda t: {k: v + ("layer.1" in k) for k, v in t.items()},
            "differs from the tensor that it is a copy of",
        ),
    ],
)
def test_every_tensor_is_used_and_fits(tmp_path, case, tensors, message):
    model, _ = base("bert")
    with pytest.raises(ValueError, match=message):
        load_adapterhub(changed(tmp_path, f"bert/{case}", tensors), model)


def test_layers_left_out_have_no_parameters():
    model, _ = base("bert")
    tuned, adapter = load_adapterhub(FIXTURES / "bert/leave_out", model)
    sites = {site.path: site for site in adapter.sites}
    path = "encoder/layer/output:delta"
    assert sites[path].shape[0] == 2
    assert {len(leaf) for leaf in jax.tree.leaves(adapter[path])} == {1}
