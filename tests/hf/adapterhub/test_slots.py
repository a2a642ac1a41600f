"""How leaves are cut into tensors, and the orthogonal parametrization; torch is the oracle."""

import numpy as np
import pytest
import torch

from jaxpeft.hf.adapterhub.slots import (
    Gates,
    Packed,
    Rotation,
    Stacked,
    Unused,
    flat,
    nested,
)


class Tensors(dict):
    """In the place of a file."""

    def take(self, name, shape):
        assert self[name].shape == shape
        return self[name]

    def copies(self, names, of):
        assert all(np.array_equal(self[name], of) for name in names)


def random(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype("f4")


def orthogonal(rank, width):
    """A linear map with an orthogonal parametrization away from its start."""
    torch.manual_seed(0)
    linear = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(width, rank, bias=False))
    original = linear.parametrizations.weight.original
    signs = torch.where(torch.arange(rank) % 2 == 0, 1.0, -1.0)
    original.data += 0.3 * torch.randn(rank, width)
    original.data[range(rank), range(rank)] = signs
    return linear


@pytest.mark.parametrize("rank, width", [(1, 5), (3, 8), (4, 4)])
def test_a_rotation_is_that_of_torch(rank, width):
    linear = orthogonal(rank, width)
    tensors = Tensors({f"p.{k}": v.numpy() for k, v in linear.state_dict().items()})
    slot = Rotation("here", "r", ("p.parametrizations",))
    found = slot.read(tensors, {("here", "r"): (1, rank, width)})["here", "r"]
    np.testing.assert_allclose(found[0], linear.weight.detach(), atol=1e-6)


@pytest.mark.parametrize("rank, width", [(1, 5), (3, 8), (4, 4)])
def test_torch_reads_a_rotation_that_is_written(rank, width):
    rows = np.linalg.qr(random(width, rank))[0].T
    written = Rotation("", "r", ("parametrizations",)).write({("", "r"): rows[None]})
    linear = orthogonal(rank, width)
    linear.load_state_dict({name: torch.tensor(value) for name, value in written.items()})
    np.testing.assert_allclose(linear.weight.detach(), rows, atol=1e-6)


SLOTS = {
    "stacked": (Stacked("s", "x", ("a", "b")), {("s", "x"): random(2, 4, 2)}),
    "transposed": (Stacked("s", "x", ("a", "b"), "transposed"), {("s", "x"): random(2, 4, 3)}),
    "row": (Stacked("s", "x", ("a", "b"), "row"), {("s", "x"): random(2, 4)}),
    "scalar": (Stacked("s", "x", ("a", "b"), "row"), {("s", "x"): random(2)}),
    "column": (Stacked("s", "x", ("a", "b"), "column"), {("s", "x"): random(2, 4)}),
    "one": (Stacked("s", "x", ("a",), stacked=False), {("s", "x"): random(4, 2)}),
    "copied": (Stacked("s", "x", ("m.a",), copies=(("a", "b"),)), {("s", "x"): random(1, 2)}),
    "map": (
        Packed((("k", "up"), ("v", "up")), ("w", "again"), "map"),
        {("k", "up"): random(3, 4, 6), ("v", "up"): random(3, 4, 6)},
    ),
    "bias": (
        Packed((("k", "b"), ("v", "b")), ("w",), "bias"),
        {("k", "b"): random(3, 6), ("v", "b"): random(3, 6)},
    ),
    "flat": (
        Packed((("k", "p"), ("v", "p")), ("w",), "flat"),
        {("k", "p"): random(3, 5, 2, 4), ("v", "p"): random(3, 5, 2, 4)},
    ),
    "gates": (
        Gates(("k", "v"), ("a", "b"), 2),
        {(s, n): random(*z) for s in "kv" for n, z in (("gate", (2, 3)), ("gate_bias", (2,)))},
    ),
}


@pytest.mark.parametrize("slot, leaves", SLOTS.values(), ids=SLOTS)
def test_leaves_are_read_as_they_are_written(slot, leaves):
    tensors = Tensors(slot.write(leaves))
    found = slot.read(tensors, {key: leaf.shape for key, leaf in leaves.items()})
    assert found.keys() == leaves.keys()
    for key, leaf in leaves.items():
        np.testing.assert_array_equal(found[key], leaf)


def test_layers_may_be_stored_in_part():
    slot = Stacked("s", "x", ("a", "b"), "transposed", rows=(2, 3))
    leaf = random(2, 3, 4)
    tensors = Tensors(slot.write({("s", "x"): leaf}))
    assert tensors["a"].shape == (4, 2) and tensors["b"].shape == (4, 3)
    (found,) = slot.read(tensors, {("s", "x"): leaf.shape}).values()
    np.testing.assert_array_equal(found[0, :2], leaf[0, :2])
    assert not found[0, 2].any()


def test_what_has_no_use_is_passed_over():
    slot = Unused(Stacked("s", "x", ("a",)))
    leaf = random(1, 3)
    tensors = Tensors(slot.write({("s", "x"): leaf}))
    np.testing.assert_array_equal(tensors["a"], leaf[0])
    assert slot.read(tensors, {("s", "x"): (1, 3)}) == {}


def test_leaves_by_name_and_back():
    leaves = {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
    assert flat(leaves) == {"a": 1, "b/c": 2, "b/d/e": 3}
    assert nested(flat(leaves)) == leaves
