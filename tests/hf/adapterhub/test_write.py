"""Adapters are written as AdapterHub's library writes them; its own files are the oracle.

That the library loads what is written here, with equal outputs, is checked with
`scripts/adapterhub_fixtures.py --check`, in an environment that has it.
"""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxpeft as jp
from jaxpeft.hf.adapterhub import AdapterHubFormatError, load_adapterhub, save_adapterhub
from jaxpeft.methods.adapters import compacter, houlsby, parallel_adapter, pfeiffer
from jaxpeft.methods.fusion import fuse
from jaxpeft.methods.reft import direft, loreft
from tests.hf.adapterhub.conftest import FIXTURES, QUICK, bare, base, cases

FUSIONS = [case for case in cases() if "fusion" in case]
# Refused when they are read, and an old file, which comes back in today's form.
NOT_AGAIN = {"bert/prefix_tuning_leave_out", "bert/legacy"}
# What the library writes without using it.
IDLE = {"bert/lora_gated": {"alpha"}}


def config_of(folder, name="adapter_config.json"):
    return json.loads((folder / name).read_text())


def tensors_of(folder, name="adapter.safetensors"):
    found = load_file(folder / name)
    return {key.removeprefix("transformer."): value for key, value in found.items()}


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def again(case, folder):
    kind, name = case.split("/")
    model, _ = base(kind)
    tuned, adapter = load_adapterhub(FIXTURES / case, model)
    if "fusion" in name:
        name = config_of(FIXTURES / case, "adapter_fusion_config.json")["name"]
    save_adapterhub(folder, tuned, adapter, model, name=name)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case in QUICK else pytest.mark.slow)
        for case in cases()
        if case not in NOT_AGAIN and case not in FUSIONS
    ],
)
def test_what_was_read_is_written_as_it_was(case, tmp_path):
    again(case, tmp_path)
    wanted, found = config_of(FIXTURES / case), config_of(tmp_path)
    for file in (wanted, found):
        for idle in IDLE.get(case, ()):
            del file["config"][idle]
        del file["model_name"], file["model_class"]
    if case == "bert/reduction_map":
        assert found["config"].pop("reduction_factor") == {"0": 8, "1": 2}
        assert wanted["config"].pop("reduction_factor") == {"1": 2, "default": 8}
    assert found == wanted
    if "loreft" not in case:
        assert_equal(tensors_of(tmp_path), tensors_of(FIXTURES / case))


@pytest.mark.parametrize("case", ["bert/loreft", "bert/loreft_tied"])
def test_rotations_are_written_in_another_form_of_the_same(case, tmp_path):
    model, _ = base(case.split("/")[0])
    again(case, tmp_path)
    wanted, found = tensors_of(FIXTURES / case), tensors_of(tmp_path)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}
    _, first = load_adapterhub(FIXTURES / case, model)
    _, second = load_adapterhub(tmp_path, model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), first, second)


@pytest.mark.parametrize("case", FUSIONS)
def test_a_fusion_is_written_with_the_adapters_that_it_fuses(case, tmp_path):
    again(case, tmp_path)
    names = "adapter_fusion_config.json", "model_adapter_fusion.safetensors"
    wanted, found = (config_of(folder, names[0]) for folder in (FIXTURES / case, tmp_path))
    assert found | {"model_name": "tiny-bert"} == wanted
    assert_equal(tensors_of(tmp_path, names[1]), tensors_of(FIXTURES / case, names[1]))
    for name in wanted["adapter_names"]:
        assert_equal(tensors_of(tmp_path / name), tensors_of(FIXTURES / "bert" / name))


def test_an_old_file_is_written_in_todays_form(tmp_path):
    again("bert/legacy", tmp_path)
    assert config_of(tmp_path)["config"]["non_linearity"] == "gelu_new"
    keys = {key.partition("output.")[2].split(".")[0] for key in tensors_of(tmp_path)}
    assert keys == {"adapters"}


def written(folder, kind, tuning, name="adapter"):
    """The files of an adapter of a tuning with random leaves, and the adapter."""
    model, params = base(kind)
    tuned = jp.transform(model, tuning)
    shapes = jax.eval_shape(lambda k: tuned.init(k, params, *model.example()), jax.random.key(0))
    random = np.random.default_rng(0)
    adapter = jax.tree.map(lambda x: random.normal(size=x.shape).astype("f4"), shapes)
    save_adapterhub(folder, tuned, adapter, model, name=name)
    return config_of(folder), tuned, adapter


def _prefix_places(method):
    return jp.rules(("**/attention:{key,value}", method))


@pytest.mark.parametrize(
    "tuning, case, other",
    [
        (houlsby(reduction=4), "double_seq_bn", {}),
        (pfeiffer(reduction=4), "seq_bn", {}),
        (parallel_adapter(reduction=2), "par_bn", {}),
        (compacter(reduction=4), "compacter", {}),
        (jp.rules(("**/{query,value}/kernel", jp.lora(2, alpha=6))), "lora", {}),
        (_prefix_places(jp.prefix_tuning(3)), "prefix_tuning_flat", {}),
        (_prefix_places(jp.prefix_tuning(3, hidden=4)), "prefix_tuning_flat", {}),
        (jp.rules(("encoder/layer:out", loreft(2, dropout=0.05))), "loreft", {}),
        (houlsby(width=4), "double_seq_bn", {}),
        (houlsby(width=3), "double_seq_bn", {"reduction_factor": 16 / 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tunings_made_here_are_the_librarys_own(tuning, case, other, tmp_path):
    found, _, _ = written(tmp_path, "bert", tuning, name=case)
    wanted = config_of(FIXTURES / "bert" / case)
    assert found["config"] == wanted["config"] | other
    assert found["name"] == case


def test_several_methods_are_a_union(tmp_path):
    tuning = jp.chain(
        _prefix_places(jp.prefix_tuning(3)),
        jp.rules(("**/output:delta", jp.bottleneck(4, reads="norm"))),
        jp.rules(("**/query/kernel", jp.lora(2))),
    )
    found, _, adapter = written(tmp_path, "bert", tuning)
    parts = found["config"]["configs"]
    assert [part.get("architecture") for part in parts] == ["prefix_tuning", None, "lora"]
    tuned, read = load_adapterhub(tmp_path, base("bert")[0])
    own = {path: next(iter(leaves.values())) for path, leaves in adapter.items()}
    jax.tree.map(np.testing.assert_array_equal, dict(read), own)


def test_a_part_of_the_layers_is_left_out(tmp_path):
    tuning = jp.rules(("encoder/block/layer/{0,1}:delta", jp.bottleneck(4)))
    found, _, _ = written(tmp_path, "t5", tuning)
    assert found["config"]["leave_out"] == [2, 3]
    assert not [key for key in tensors_of(tmp_path) if "decoder" in key]
    _, adapter = load_adapterhub(tmp_path, base("t5")[0])
    assert list(adapter) == [f"encoder/block/layer/{i}:delta" for i in (0, 1)]


@pytest.mark.parametrize(
    "tuning", [jp.pfeiffer(reduction=4), jp.rules(("**/layer/output/dense/kernel", jp.lora(2)))]
)
def test_layers_of_a_stack_are_left_out(tmp_path, tuning):
    found, _, adapter = written(tmp_path, "bert", jp.layers(tuning, slice(1, None)))
    assert found["config"]["leave_out"] == [0]
    assert all(".layer.1." in key for key in tensors_of(tmp_path))
    _, read = load_adapterhub(tmp_path, base("bert")[0])
    jax.tree.map(np.testing.assert_array_equal, dict(read), dict(adapter))


def test_a_direft_is_written_as_the_noreft_that_does_the_same(tmp_path):
    found, _, adapter = written(
        tmp_path, "bert", jp.rules(("encoder/layer:out", direft(2, init="uniform")))
    )
    assert not found["config"]["orthogonality"] and "subtract_projection" not in found["config"]
    _, read = load_adapterhub(tmp_path, base("bert")[0])
    one, other = (a["encoder/layer:out"]["first"] for a in (adapter, read))
    np.testing.assert_allclose(other["source"] - other["rotation"], one["source"], atol=1e-6)
    np.testing.assert_array_equal(other["rotation"], one["rotation"])


def test_bare_models_have_no_prefix_in_their_names(tmp_path):
    model, params = bare("bert", "BertModel")
    tuned, adapter = load_adapterhub(FIXTURES / "bert/seq_bn", model)
    save_adapterhub(tmp_path, tuned, adapter, model, name="seq_bn")
    wanted = tensors_of(FIXTURES / "bert/seq_bn")
    assert_equal(tensors_of(tmp_path), {k.removeprefix("bert."): v for k, v in wanted.items()})
    assert config_of(tmp_path)["model_class"] == "BertModel"


def by_place(**options):
    return jp.chain(
        jp.rules(("**/attention:delta", jp.bottleneck(4))),
        jp.rules(("**/output:delta", jp.bottleneck(4, **options))),
    )


def test_attentions_and_feed_forward_sublayers_may_have_other_options(tmp_path):
    found, _, _ = written(tmp_path, "bert", by_place(activation="tanh", reads="norm"))
    parts = found["config"]["configs"]
    assert [(p["mh_adapter"], p["non_linearity"]) for p in parts] == [(True, "relu"),
                                                                     (False, "tanh")]  # fmt: skip


@pytest.mark.parametrize(
    "kind, tuning, message",
    [
        ("bert", jp.rules(("classifier/*", jp.full())), "no place for 'full' at 'classifier"),
        ("bert", jp.rules(("**/output:delta", jp.bottleneck(4, gate="token"))), "'token'"),
        ("bert", jp.rules(("**/output:delta", jp.bottleneck(4, bias=False))), "bias"),
        ("bert", jp.rules(("**/output:delta", jp.bottleneck(4, activation="selu"))), "'selu'"),
        ("bert", jp.rules(("**/output:delta", jp.bottleneck(4, residual="norm"))), "residual"),
        ("bert", jp.rules(("**/query/kernel", jp.lora(2)), ("**/value/kernel", jp.lora(4))),
         "LoRA has other options"),
        ("bert", jp.rules(("encoder/layer:out", direft(2, activation="relu"))), "activation"),
        ("bert", jp.rules(("encoder/layer:out", loreft(2, first=None))), "every position"),
        ("bert", jp.rules(("**/attention:{key,value}", jp.prefix_tuning(3, place="back"))),
         "beside the sequence"),
        ("bert", jp.rules(("embeddings:out", jp.invertible(16, coupling="affine"))),
         "runs coupling='additive' there only"),
        ("t5", jp.prefix_tuning(3), "in the library it has shift=True"),
        ("t5", jp.rules(("encoder/block/layer/0:delta", jp.bottleneck(4)),
                        ("**/block/layer/{1,2}:delta", jp.bottleneck(4))), "left out everywhere"),
        ("bert", jp.chain(houlsby(), houlsby()), "one after the other"),
        ("bert", houlsby(activation=jax.nn.gelu, reads="stream", norm_out="result"), "norm_out"),
    ],
)  # fmt: skip
def test_what_the_files_cannot_express_is_refused(kind, tuning, message, tmp_path):
    with pytest.raises(AdapterHubFormatError, match=message):
        written(tmp_path, kind, tuning)
    assert not list(tmp_path.iterdir())


def test_names_are_parts_of_names(tmp_path):
    with pytest.raises(ValueError, match="without dots"):
        written(tmp_path, "bert", houlsby(), name="a.b")
    two = jp.rules(("**/output:delta", fuse(pfeiffer(), pfeiffer())))
    with pytest.raises(ValueError, match="a fusion of 2 adapters"):
        written(tmp_path, "bert", two)
