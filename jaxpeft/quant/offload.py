"""`offload`: frozen weights that wait in host memory, and come to the device a layer at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxpeft.core.labels import Layout
from jaxpeft.core.memory import to_device, to_host
from jaxpeft.core.rules import Where, compile_pattern, unmatched
from jaxpeft.core.sharding import automatic, placed_as, spread
from jaxpeft.core.structured import Structured
from jaxpeft.core.tree import leaves_with_paths
from jaxpeft.quant.formats import Format, Packed
from jaxpeft.quant.formats.host import Plain, Worded, from_words, on_device, to_words
from jaxpeft.quant.quantize import axes_of, is_matrix, is_usual
from jaxpeft.quant.weight import QuantizedWeight


def offload(params: Any, where: Where | None = None) -> Any:
    """Params whose weights are in host memory: the device holds those that it is working on.

    A product moves the weight to the device next to it, and its backward pass moves it again. In a
    scan over layers that is one layer at a time. Packed weights move packed (their codes as words,
    which a TPU can take by layers; scales stay on the device), so that `quantize` first makes each
    move shorter. Outputs, gradients and adapters are the same, on meshes too.

    Args:
        params: a tree of arrays and quantized weights.
        where: a glob or predicate of the paths that go; by default every quantized weight, and
            every matrix but embeddings.

    Returns:
        A tree like `params`, in which weights that go are `QuantizedWeight`s, whose values or codes
        are in host memory.

    Raises:
        ValueError: if `where` matches no weight.
        NoHostMemoryError: if the devices have no host memory that their programs can read.

    Example:
        >>> import jax, jax.numpy as jnp, jaxpeft as jp
        >>> params = offload({"w": jnp.ones((4, 3)), "bias": jnp.ones(3)})
        >>> params["w"].packed["values"].sharding.memory_kind
        'pinned_host'
        >>> jp.lift(lambda p, x: x @ p["w"] + p["bias"])(params, jnp.ones((1, 4))).tolist()
        [[5.0, 5.0, 5.0]]
    """
    pairs, tree = leaves_with_paths(params, is_leaf=lambda x: isinstance(x, Structured))
    matches = _goes if where is None else compile_pattern(where)
    going = {path for path, leaf in pairs if _can(leaf) and matches(path, leaf)}
    if where is not None and not going:
        raise ValueError(unmatched(where, [path for path, _ in pairs], "weights"))
    return tree.unflatten([_moved(leaf) if path in going else leaf for path, leaf in pairs])


def _can(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedWeight) or is_matrix(leaf)


def _goes(path: str, leaf: Any) -> bool:
    return isinstance(leaf, QuantizedWeight) or is_usual(path, leaf, Plain(), None)


def _moved(leaf: Any) -> QuantizedWeight:
    if isinstance(leaf, QuantizedWeight):
        words, fmt = _worded(leaf)
        # The scales are small, and of shapes that a TPU may not take from the host by layers.
        largest = max(words, key=lambda name: words[name].nbytes)
        packed = words | {largest: to_host(words[largest])}
        return dataclasses.replace(leaf, packed=packed, format=fmt)
    return QuantizedWeight(
        {"values": to_host(leaf)},
        Plain(str(leaf.dtype)),
        axes_of(leaf.shape, None),
        Layout.of(leaf.shape),
        leaf.dtype,
        compute="xla",
    )


def fetched(weight: QuantizedWeight) -> QuantizedWeight:
    """A packed weight as it was before `offload`, on the device; others as they are."""
    fmt = on_device(weight.format)
    if fmt is None or fmt == weight.format:
        return weight
    return dataclasses.replace(
        weight, packed=from_words(to_device(dict(weight.packed))), format=fmt
    )


def _worded(weight: QuantizedWeight) -> tuple[Packed, Format]:
    """Its packed arrays as words, split over a mesh as they are, and the format of these."""
    packed, fmt = dict(weight.packed), weight.format
    if isinstance(fmt, Plain | Worded):
        return packed, fmt
    codes = max(packed.values(), key=lambda array: array.size)
    shapes = jax.eval_shape(to_words, packed)
    shardings = {name: spread(codes, array.shape) for name, array in shapes.items()}
    words = automatic(to_words, shardings, packed)
    return {n: placed_as(array, shardings[n]) for n, array in words.items()}, Worded(fmt)
