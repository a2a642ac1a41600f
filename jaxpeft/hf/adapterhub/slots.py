"""How the leaves of an adapter are cut into AdapterHub's tensors, and put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxpeft.hf.adapterhub.pickled import read_pickled
from jaxpeft.hf.files import read_tensors, some

WEIGHTS = "adapter.safetensors"
PICKLED = "pytorch_adapter.bin"

Array = np.ndarray
Shapes = Mapping[tuple[str, str], tuple[int, ...]]
Leaves = dict[tuple[str, str], Array]

# Parts of names that the library's first version had.
_FORMER = (
    ("attention_text_task_adapters", "adapters"),
    ("attention_text_lang_adapters", "adapters"),
    ("layer_text_task_adapters", "adapters"),
    ("layer_text_lang_adapters", "adapters"),
    ("invertible_lang_adapters", "invertible_adapters"),
)


class File:
    """The tensors of a file, each to be taken once; what goes wrong is told at the end."""

    def __init__(
        self, directory: Path, prefix: str, weights: str = WEIGHTS, pickled: str = PICKLED
    ):
        self.path = directory / weights
        if not self.path.is_file() and (directory / pickled).is_file():
            self.path = directory / pickled
            found = read_pickled(self.path)
        else:
            found, _ = read_tensors(self.path)
        self.tensors = {_renewed(name).removeprefix(prefix): x for name, x in found.items()}
        self.taken: set[str] = set()
        self.problems: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str, shape: tuple[int, ...]) -> Array:
        """The tensor in float32; zeros after a problem, which `check` raises."""
        self.taken.add(name)
        found = self.tensors.get(name)
        if found is None:
            self.problems.append(f"{name} of shape {shape} is missing")
        elif found.shape != shape:
            self.problems.append(f"{name} has shape {found.shape}, expected {shape}")
        elif found.dtype.kind not in "fV":
            self.problems.append(f"{name} is {found.dtype}, expected floating point")
        else:
            return found.astype(np.float32)
        return np.zeros(shape, np.float32)

    def copies(self, names: Sequence[str], of: Array) -> None:
        """Tensors that the library has twice; a file may leave the copies out."""
        for name in names:
            if name in self and not np.array_equal(self.take(name, of.shape), of):
                self.problems.append(f"{name} differs from the tensor that it is a copy of")

    def check(self) -> None:
        extra = self.tensors.keys() - self.taken
        problems = [*self.problems, *(f"{name} is not expected" for name in sorted(extra))]
        if problems:
            hint = ""
            if any("shared_parameters" in problem for problem in problems):
                hint = (
                    " The library leaves what layers share out of the files of models without a "
                    "head: save the adapter from a model with one."
                )
            raise ValueError(
                f"{self.path} does not fit the model and its configuration: {len(problems)} "
                f"problems: {some(problems, 12)}. Is it an adapter of this model?{hint}"
            )


def _renewed(name: str) -> str:
    for old, new in _FORMER:
        name = name.replace(old, new)
    return name


class Slot(Protocol):
    """Some leaves, and the tensors that they are stored in."""

    def read(self, file: File, shapes: Shapes) -> Leaves:
        """The leaves `(path, name)` with these shapes."""

    def write(self, leaves: Leaves) -> dict[str, Array]:
        """The tensors."""


class Stacked(NamedTuple):
    """A leaf that is one tensor in each layer; or one tensor, without layers.

    Attributes:
        path: of the leaf's site.
        leaf: its name.
        names: of the tensors, in the order of the layers that have one.
        form: of a tensor: "" as the leaf, "transposed", or with an axis of length 1 before the
            leaf's ("row") or behind ("column").
        rows: of each layer's leaf those that are stored, along its first axis; empty for all.
        copies: suffixes of each name and what they are replaced by in the name of a copy.
    """

    path: str
    leaf: str
    names: tuple[str, ...]
    form: str = ""
    rows: tuple[int, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    stacked: bool = True

    def read(self, file: File, shapes: Shapes) -> Leaves:
        shape = shapes[self.path, self.leaf]
        whole = np.zeros(shape, np.float32)
        parts = whole if self.stacked else whole[None]
        for layer, name in enumerate(self.names):
            ours = self._part(parts[layer : layer + 1], layer)
            value = file.take(name, self._form(ours[0]).shape)
            file.copies(self._copies(name), value)
            ours[0] = value.T if self.form == "transposed" else value.reshape(ours[0].shape)
        return {(self.path, self.leaf): whole}

    def write(self, leaves: Leaves) -> dict[str, Array]:
        whole = leaves[self.path, self.leaf]
        parts = whole if self.stacked else whole[None]
        tensors: dict[str, Array] = {}
        for layer, name in enumerate(self.names):
            value = self._form(self._part(parts[layer : layer + 1], layer)[0])
            tensors |= {one: value for one in (name, *self._copies(name))}
        return tensors

    def _part(self, one: Array, layer: int) -> Array:
        return one[:, : self.rows[layer]] if self.rows else one

    def _form(self, value: Array) -> Array:
        forms = {"": (...,), "transposed": (...,), "row": (None, ...), "column": (..., None)}
        return value.T if self.form == "transposed" else value[forms[self.form]]

    def _copies(self, name: str) -> list[str]:
        return [name.removesuffix(end) + new for end, new in self.copies if name.endswith(end)]


class Packed(NamedTuple):
    """Leaves of many attentions in one tensor: its parts, in the order of layers, key and value.

    Attributes:
        keys: `(path, name)` of the leaves at the keys and at the values, stacked over layers.
        names: of the tensor and its copies.
        form: "map" for an `up` (stack, hidden, out) from (parts * out, hidden); "bias" for
            (stack, out) from (parts * out,); "flat" for (stack, tokens, heads, width) from
            (tokens * parts * heads * width,).
    """

    keys: tuple[tuple[str, str], tuple[str, str]]
    names: tuple[str, ...]
    form: str

    def read(self, file: File, shapes: Shapes) -> Leaves:
        layers, *one = shapes[self.keys[0]]
        value = file.take(self.names[0], self._shape(layers, one))
        file.copies(self.names[1:], value)
        if self.form == "flat":
            parts = value.reshape(one[0], layers, 2, *one[1:]).transpose(1, 2, 0, 3, 4)
        elif self.form == "map":
            parts = value.reshape(layers, 2, one[1], one[0]).swapaxes(-1, -2)
        else:
            parts = value.reshape(layers, 2, *one)
        return {key: np.ascontiguousarray(parts[:, i]) for i, key in enumerate(self.keys)}

    def _shape(self, layers: int, one: list[int]) -> tuple[int, ...]:
        if self.form == "map":
            return (2 * layers * one[1], one[0])
        return (2 * layers * int(np.prod(one)),)

    def write(self, leaves: Leaves) -> dict[str, Array]:
        parts: Array = np.stack([leaves[key] for key in self.keys], 1)
        value: Array
        if self.form == "flat":
            value = parts.transpose(2, 0, 1, 3, 4).reshape(-1)
        elif self.form == "map":
            value = parts.swapaxes(-1, -2).reshape(-1, parts.shape[2])
        else:
            value = parts.reshape(-1)
        return dict.fromkeys(self.names, value)


class Gates(NamedTuple):
    """The gates of an attention's keys and values, in one linear map a layer.

    Attributes:
        paths: of the sites of keys and values, whose leaves are `gate` and `gate_bias`.
        names: of the map in each layer.
        outputs: 1 if keys and values have one gate together, else 2.
    """

    paths: tuple[str, str]
    names: tuple[str, ...]
    outputs: int

    def read(self, file: File, shapes: Shapes) -> Leaves:
        _, width = shapes[self.paths[0], "gate"]
        weights = [file.take(f"{name}.weight", (self.outputs, width)) for name in self.names]
        biases = [file.take(f"{name}.bias", (self.outputs,)) for name in self.names]
        found: Leaves = {}
        for path, row in zip(self.paths, (0, -1), strict=True):
            found[path, "gate"] = np.stack([weight[row] for weight in weights])
            found[path, "gate_bias"] = np.stack([bias[row] for bias in biases])
        return found

    def write(self, leaves: Leaves) -> dict[str, Array]:
        tensors: dict[str, Array] = {}
        paths = self.paths[: self.outputs]
        for layer, name in enumerate(self.names):
            for leaf, kind in (("gate", "weight"), ("gate_bias", "bias")):
                rows = [leaves[path, leaf][layer] for path in paths]
                tensors[f"{name}.{kind}"] = np.stack(rows)
        return tensors


class Rotation(NamedTuple):
    """Orthonormal rows R (r, d), in the two tensors of torch's orthogonal parametrization.

    With X the first of them, (r, d), and B the second, (d, d) and orthogonal: if r < d, R^T is B
    times the first r columns of the product of reflections with the vectors e_i + X_i beyond the
    diagonal, times the signs on the diagonal of X; if r = d, R = B exp(L - L^T), L the lower
    triangle of X. It is written with X in its initial form, for which R^T is the first r columns of
    B (r < d), or R = B (r = d).

    Attributes:
        path: of the leaf's site.
        leaf: its name.
        names: of the module in each layer that has one.
    """

    path: str
    leaf: str
    names: tuple[str, ...]

    def read(self, file: File, shapes: Shapes) -> Leaves:
        whole = np.zeros(shapes[self.path, self.leaf], np.float32)
        rank, width = whole.shape[1:]
        for layer, name in enumerate(self.names):
            x = file.take(f"{name}.weight.original", (rank, width))
            base = file.take(f"{name}.weight.0.base", (width, width))
            whole[layer] = _rotation(x.astype(np.float64), base.astype(np.float64))
        return {(self.path, self.leaf): whole}

    def write(self, leaves: Leaves) -> dict[str, Array]:
        whole = leaves[self.path, self.leaf]
        tensors: dict[str, Array] = {}
        for layer, name in enumerate(self.names):
            x, base = _reflections(whole[layer].astype(np.float64))
            tensors[f"{name}.weight.original"] = x.astype(np.float32)
            tensors[f"{name}.weight.0.base"] = base.astype(np.float32)
        return tensors


def _rotation(x: Array, base: Array) -> Array:
    rank, width = x.shape
    if rank == width:
        lower = np.tril(x)
        return base @ np.asarray(jax.scipy.linalg.expm(lower - lower.T))
    columns = np.eye(width, rank)
    for i in reversed(range(rank)):
        v = np.where(np.arange(width) > i, x[i], 0.0)
        v[i] = 1.0
        columns -= np.outer(2 / (v @ v) * v, v @ columns)
    # Torch cuts the diagonal off at the point, in the hope that it holds signs.
    return (base @ (columns * np.trunc(np.diagonal(x)))).T


def _reflections(rows: Array) -> tuple[Array, Array]:
    """The two tensors for orthonormal rows, or for those that Gram-Schmidt makes of others."""
    rank, width = rows.shape
    q, r = np.linalg.qr(rows.T, mode="complete")
    q[:, :rank] *= np.where(np.diagonal(r) < 0, -1.0, 1.0)
    return -np.eye(rank, width), q.T if rank == width else q


class Unused(NamedTuple):
    """Tensors that the library has without a use: passed over, and written as those of a slot."""

    slot: Any

    def read(self, file: File, shapes: Shapes) -> Leaves:
        self.slot.read(file, shapes)
        return {}

    def write(self, leaves: Leaves) -> dict[str, Array]:
        found: dict[str, Array] = self.slot.write(leaves)
        return found


def flat(leaves: Mapping[str, Any], root: str = "") -> dict[str, Any]:
    """The leaves of a site by name, those of inner dictionaries as "outer/inner"."""
    found: dict[str, Any] = {}
    for name, leaf in leaves.items():
        found |= flat(leaf, f"{root}{name}/") if isinstance(leaf, Mapping) else {root + name: leaf}
    return found


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    found: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *outer, last = name.split("/")
        at = found
        for key in outer:
            at = at.setdefault(key, {})
        at[last] = leaf
    return found


def leaves_of(adapter: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """The leaves of an adapter, by path and name."""
    return {(path, name): x for path, leaves in adapter.items() for name, x in flat(leaves).items()}
