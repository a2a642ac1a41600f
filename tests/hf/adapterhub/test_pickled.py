"""Files of `torch.save`, read without torch; torch itself is the oracle."""

import collections
import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from jaxpeft.hf.adapterhub.pickled import UnsafePickleError, read_pickled

FIXTURE = Path(__file__).parents[2] / "fixtures/adapterhub/binary/pytorch_adapter.bin"


def assert_as_torch_reads(path):
    expected = torch.load(path, weights_only=True)
    found = read_pickled(path)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        kept = found[name]
        assert kept.dtype.name == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(kept.astype("f8"), tensor.to(torch.float64).numpy())


def tensors():
    shared = torch.arange(12.0).reshape(3, 4)
    return collections.OrderedDict(
        rows=shared[1:],
        columns=shared.T,
        strided=torch.arange(10)[1::3],
        half=torch.randn(2, 3, dtype=torch.float16),
        brain=torch.randn(5).to(torch.bfloat16),
        scalar=torch.tensor(2.5, dtype=torch.float64),
        empty=torch.zeros(0, 3),
        flags=torch.tensor([True, False]),
        parameter=torch.nn.Parameter(torch.randn(2)).detach(),
    )


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_tensors_are_those_that_torch_reads(tmp_path, zipped):
    path = tmp_path / "tensors.bin"
    torch.save(tensors(), path, _use_new_zipfile_serialization=zipped)
    assert_as_torch_reads(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_carries_metadata_that_is_passed_over(tmp_path, zipped):
    path = tmp_path / "tensors.bin"
    state = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)).state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert_as_torch_reads(path)


def test_an_adapter_of_adapterhub():
    assert_as_torch_reads(FIXTURE)


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def as_zip(path, payload):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", payload)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, zipped):
    path = tmp_path / "bad.bin"
    payload = pickle.dumps({"w": Harm(tmp_path / "harmed")}, protocol=2)
    as_zip(path, payload) if zipped else path.write_bytes(payload)
    with pytest.raises(UnsafePickleError, match="mkdir"):
        read_pickled(path)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("name", ["builtins eval", "torch load", "jaxpeft.hf.files read_json"])
def test_no_name_but_those_of_tensors_is_known(tmp_path, name):
    path = tmp_path / "bad.bin"
    module, function = name.split()
    as_zip(path, f"c{module}\n{function}\n(X\x01\x00\x00\x001tR.".encode())
    with pytest.raises(UnsafePickleError, match=function):
        read_pickled(path)


@pytest.mark.parametrize("operation", [b"cos\nsystem\n(dS'a'\nI1\nsb.", b"(ios\nsystem\n."])
def test_no_operation_but_those_of_tensors_is_known(tmp_path, operation):
    path = tmp_path / "bad.bin"
    as_zip(path, operation)
    with pytest.raises(UnsafePickleError, match="operation"):
        read_pickled(path)


@pytest.mark.parametrize("value", [[1, 2], {"w": 3}, {"w": {"x": torch.ones(1)}}])
def test_what_is_no_dictionary_of_tensors_is_refused(tmp_path, value):
    path = tmp_path / "other.bin"
    torch.save(value, path)
    with pytest.raises(UnsafePickleError, match="tensors by name"):
        read_pickled(path)


def test_a_tensor_must_lie_in_its_storage(tmp_path):
    path = tmp_path / "bad.bin"
    torch.save({"w": torch.ones(4)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    data = next(name for name in members if name.endswith("data/0"))
    members[data] = members[data][:8]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match="outside of its storage"):
        read_pickled(path)


def test_damaged_files_say_so(tmp_path):
    buffer = io.BytesIO()
    torch.save(tensors(), buffer)
    path = tmp_path / "cut.bin"
    path.write_bytes(buffer.getvalue()[:200])
    with pytest.raises(ValueError, match="damaged"):
        read_pickled(path)
    with pytest.raises(FileNotFoundError, match="absent.bin"):
        read_pickled(tmp_path / "absent.bin")
