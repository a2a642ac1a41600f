"""A part of a plan: a method at a site, and the tensors that hold its leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxpeft.core.method import Method
from jaxpeft.hf.adapterhub.places import Places
from jaxpeft.hf.adapterhub.slots import Slot

# Activations whose name in transformers is not that in jax.nn.
ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "leakyrelu": "leaky_relu",
    "linear": "identity",
}
# Those that have one name in both.
_SAME = ("relu", "silu", "swish", "tanh", "sigmoid", "relu6", "mish", "quick_gelu")


class Piece(NamedTuple):
    """A method at a site, and where its leaves are stored."""

    path: str
    method: Method
    slots: tuple[Slot, ...]


class Context(NamedTuple):
    """What a plan is made for.

    Attributes:
        name: of the adapter.
        places: of the model.
        width: of the model.
        pools: whether the model's head reads the first position.
    """

    name: str
    places: Places
    width: int
    pools: bool = False


class AdapterHubFormatError(ValueError):
    """A file that asks for what no method here does, or an adapter that no file there can hold."""


def activation(name: str) -> str:
    """The name here of an activation of transformers.

    >>> activation("gelu"), activation("gelu_new"), activation("relu")
    ('gelu_exact', 'gelu', 'relu')
    """
    return ACTIVATIONS.get(name.lower(), name.lower())


def hub_activation(name: str) -> str:
    """The name in transformers of an activation here; the inverse of `activation`.

    Raises:
        AdapterHubFormatError: if it has none.
    """
    known = dict(zip(_SAME, _SAME, strict=True))
    known |= {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    if name not in known:
        raise AdapterHubFormatError(f"the activation {name!r}: known are {', '.join(known)}.")
    return known[name]


def at(modules: Sequence[str], tensor: str) -> tuple[str, ...]:
    """The names of a tensor in each layer's module."""
    return tuple(f"{module}.{tensor}" for module in modules)


def added(modules: Sequence[str], layers: Sequence[bool], what: str) -> list[str]:
    """The names of what the library adds to the module in each layer that is not left out."""
    return [f"{m}.{what}" for m, on in zip(modules, layers, strict=True) if on]
