"""Files that cannot be read as they are: options, tensors, damage. Each is an error."""

import json
import re

import numpy as np
import peft
import pytest
from safetensors.numpy import load_file, save_file

from jaxpeft.hf import load_adapter
from tests.hf.conftest import PEFT_WARNINGS, tune
from tests.hf.test_read import written

pytestmark = PEFT_WARNINGS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def model(base):
    return base("llama")[1]


@pytest.fixture(scope="module")
def original(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("original")
    written(base, directory)
    return {name: (directory / name).read_bytes() for name in (CONFIG, WEIGHTS)}


@pytest.fixture
def adapter(original, tmp_path):
    """A directory with a good adapter, to be broken."""
    for name, content in original.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def change(directory, **options):
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | options))


def change_tensors(directory, edit):
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS)


OPTIONS = {
    "use_dora": True,
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1e-4},
    "layer_replication": [[0, 2], [1, 3]],
    "megatron_config": {"tensor_model_parallel_size": 2},
    "monteclora_config": {"num_samples": 4},
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "velora_config": {"num_groups": 8},
    "brand_new_option": 1,
    "another_new_option": {"on": True},
    "peft_type": "LOHA",
    "target_modules": None,
    "r": 0,
    "lora_alpha": "many",
    "lora_dropout": 1.5,
    "rank_pattern": {"q_proj": -1},
    "alpha_pattern": [1],
    "bias": "some",
    "use_rslora": "yes",
    "modules_to_save": "lm_head",
    "layers_to_transform": ["a"],
    "layers_pattern": 3,
    "exclude_modules": "(",
    "trainable_token_indices": [-1],
    "ensure_weight_tying": 1,
    "lora_bias": True,
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_cannot_be_followed_is_named(adapter, model, option):
    change(adapter, **{option: OPTIONS[option]})
    with pytest.raises(ValueError, match=option):
        load_adapter(adapter, model)


def test_every_option_of_peft_is_followed_or_refused(adapter, model):
    """A value that PEFT's default is not: no option may be skipped without being listed here."""
    neutral = {
        "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision",
        "task_type", "megatron_core", "qalora_group_size", "fan_in_fan_out", "runtime_config",
        "eva_config", "corda_config", "lora_ga_config", "loftq_config", "lora_dropout",
        "ensure_weight_tying", "layers_pattern",
    }  # fmt: skip
    known = set(peft.LoraConfig().to_dict()) - neutral
    before = json.loads((adapter / CONFIG).read_text())
    for option in sorted(known):
        value = before[option]
        other = (not value) if isinstance(value, bool) else {"q_proj": 3}
        if option in ("r", "lora_alpha"):
            continue  # Numbers that the tests of reading vary.
        change(adapter, **before | {option: other})
        if option == "use_rslora":
            load_adapter(adapter, model)  # The scale; see the tests of reading.
        elif option == "alpha_pattern":
            load_adapter(adapter, model)
        elif option == "init_lora_weights":
            with pytest.raises(ValueError, match=option):
                change(adapter, **before | {option: "pissa"})
                load_adapter(adapter, model)
        else:
            with pytest.raises(ValueError):
                load_adapter(adapter, model)


@pytest.mark.parametrize("value", [None, False, {}, []])
def test_an_unknown_option_that_is_off_is_fine(adapter, model, value):
    change(adapter, brand_new_option=value)
    load_adapter(adapter, model)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_an_init_that_changed_the_base_is_explained(adapter, model, init):
    change(adapter, init_lora_weights=init)
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' changed the base weights"):
        load_adapter(adapter, model)


def test_missing_left_over_and_misshapen_tensors_are_listed(adapter, model):
    prefix = "base_model.model.model.layers.1.self_attn."

    def edit(tensors):
        del tensors[f"{prefix}q_proj.lora_A.weight"]
        tensors[f"{prefix}k_proj.lora_A.weight"] = np.zeros((8, 32), np.float32)
        tensors[f"{prefix}v_proj.lora_B.weight"] = np.zeros((16, 7), np.float32)

    change_tensors(adapter, edit)
    with pytest.raises(ValueError) as error:
        load_adapter(adapter, model)
    for part in (
        "q_proj.lora_A.weight of shape (8, 32) is missing",
        "k_proj.lora_A.weight is not expected",
        "v_proj.lora_B.weight has shape (16, 7), expected (16, 8)",
        "3 problems",
    ):
        assert part in str(error.value)


def test_integers_are_no_factors(adapter, model):
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    change_tensors(adapter, lambda tensors: tensors.update({key: np.ones((8, 32), np.int32)}))
    with pytest.raises(ValueError, match="is int32, expected floating point"):
        load_adapter(adapter, model)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_truncated_file_is_named(adapter, model, cut):
    path = adapter / WEIGHTS
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged"):
        load_adapter(adapter, model)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"\xff\xfe", b'{"peft_type": "LORA"', b"[" * 100_000, b"null"],
    ids=["empty", "open", "list", "bytes", "cut", "deep", "null"],
)
def test_a_damaged_configuration_is_named(adapter, model, content):
    (adapter / CONFIG).write_bytes(content)
    with pytest.raises(ValueError, match=CONFIG):
        load_adapter(adapter, model)


@pytest.mark.parametrize(
    "header",
    [
        b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,9999]}}',
        b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}',
        b"not json at all",
    ],
)
def test_a_hostile_header_is_an_error(adapter, model, header):
    (adapter / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        load_adapter(adapter, model)


def test_a_header_longer_than_the_file_is_an_error(adapter, model):
    (adapter / WEIGHTS).write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="is damaged"):
        load_adapter(adapter, model)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_an_absent_file_is_named_with_what_is_there(adapter, model, name):
    (adapter / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is not in .* it holds adapter_"):
        load_adapter(adapter, model)


def test_a_pickle_is_refused(adapter, model):
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match="a pickle, which can run code"):
        load_adapter(adapter, model)


def test_an_adapter_of_another_model_is_an_error(base, tmp_path):
    written(base, tmp_path, base="llama")
    with pytest.raises(ValueError, match="does not fit the model"):
        load_adapter(tmp_path, base("llama-wide-heads")[1])


def test_modules_that_are_not_there_are_an_error(adapter, model):
    change(adapter, target_modules=["query", "value"])
    with pytest.raises(ValueError, match=r"chooses none of the model's \d+ modules"):
        load_adapter(adapter, model)


def test_a_norm_cannot_have_lora(adapter, model):
    change(adapter, target_modules=["q_proj", "norm"])
    with pytest.raises(ValueError, match="'model.norm', which is neither a linear map"):
        load_adapter(adapter, model)


UNTIED = {
    "embedding": dict(target_modules=["embed_tokens"]),
    "head": dict(target_modules=["lm_head"]),
    "saved": dict(modules_to_save=["embed_tokens"]),
    "saved-head": dict(modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("name", UNTIED)
def test_one_side_of_a_tied_weight_is_an_error(base, tmp_path, name):
    torch_model, model, _ = base("llama-tied")
    tune(torch_model, **UNTIED[name]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="they are one weight in this model"):
        load_adapter(tmp_path, model)


def test_a_tied_head_with_values_of_its_own_is_an_error(base, tmp_path):
    torch_model, model, _ = base("llama-tied")
    options = dict(target_modules=["embed_tokens"], ensure_weight_tying=True)
    tune(torch_model, **options).save_pretrained(tmp_path)

    def edit(tensors):
        tensors["base_model.model.lm_head.lora_A.weight"] += 1

    change_tensors(tmp_path, edit)
    with pytest.raises(ValueError, match="lm_head.lora_A.weight is not tied to"):
        load_adapter(tmp_path, model)


def test_a_head_of_another_rank_than_its_table_is_an_error(base, tmp_path):
    torch_model, model, _ = base("llama-tied")
    options = dict(target_modules=["embed_tokens"], ensure_weight_tying=True)
    tune(torch_model, **options).save_pretrained(tmp_path)
    change(tmp_path, alpha_pattern={"lm_head": 3})
    with pytest.raises(ValueError, match=r"\(rank, alpha\) differ: \(8, 8\) and \(8, 3\)"):
        load_adapter(tmp_path, model)
