"""Weights that are packed as they are loaded, or stay packed as their file has them.

One layer at a time is dense, and goes into its row of the packed stack.
"""

import functools
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft.core.tree import leaves_with_paths
from jaxpeft.models.files import Checkpoint
from jaxpeft.models.names import Name
from jaxpeft.models.packed_files import blamed
from jaxpeft.quant import QuantizedWeight, wrap
from jaxpeft.quant.formats import Format, mix
from jaxpeft.quant.quantize import axes_of, choose, pack

KEEP = "keep"
Arrays = Mapping[str, Any]


def plan(quantize: Any, params: Any, packed: Collection[str], where: str) -> dict[str, Any]:
    """What becomes of each weight: a format, or `KEEP`; those that stay dense are left out.

    Args:
        quantize: as `load` takes it.
        params: the tree of abstract weights.
        packed: paths of the weights of which the files hold packed tensors.
        where: the files.

    Returns:
        Formats or `KEEP` by path.

    Raises:
        ValueError: another word than "keep", nothing to keep, or a rule that matches nothing.
        TypeError: no format and no rules.
    """
    if quantize is None:
        return {}
    if isinstance(quantize, str):
        if quantize != KEEP:
            raise ValueError(
                f"quantize={quantize!r} is no word for it. Give a format such as jp.quant.nf4(), "
                "jp.rules((pattern, format), ...), or 'keep' for what the files hold packed."
            )
        if not packed:
            raise ValueError(
                f"quantize='keep', but {where} holds no packed weights. Give a format, or None."
            )
        return dict.fromkeys(packed, KEEP)
    chosen = choose(quantize, leaves_with_paths(params)[0], words=(KEEP,))
    return {path: how for path, how in chosen.items() if how != KEEP or path in packed}


def pack_weight(layers: Iterable[np.ndarray], fmt: Format, name: Name, leaf: Any) -> Any:
    """A weight quantized layer by layer: the arrays of `jaxpeft.quantize` for the whole one.

    Args:
        layers: dense, as they are here; a single one where the weight is not stacked.
        fmt: the format.
        name: of the weight.
        leaf: its shape and dtype.

    Returns:
        A `QuantizedWeight`, its arrays numpy's unless nothing is stacked.

    Raises:
        ValueError: a layer is not finite, or the format cannot block its shape.
    """

    def one(layer: np.ndarray) -> QuantizedWeight:
        return pack(jnp.asarray(layer, leaf.dtype), fmt, axes_of(layer.shape, None, name.path))

    try:
        if not name.stacked or len(leaf.shape) < 3:
            # Also vectors that form a matrix only together.
            return one(_whole(layers, name, leaf))
        rows = (one(layer).packed for layer in layers)
        return wrap(_stack(rows, leaf.shape[0]), fmt, leaf.shape, dtype=leaf.dtype)
    except ValueError as error:
        tensors = name.tensor.replace("{layer}", "*")
        raise ValueError(f"{name.path!r} of shape {leaf.shape}, from {tensors}: {error}") from error


def keep_weight(checkpoint: Checkpoint, tensors: Sequence[str], name: Name, leaf: Any) -> Any:
    """A weight with the packed arrays of its file, or None, with a warning, where it must be dense.

    Args:
        checkpoint: what is read.
        tensors: of the weight, in layer order, at least one of them packed.
        name: of the weight.
        leaf: its shape and dtype.

    Returns:
        A `QuantizedWeight`, or None if the layers of the stack are packed in several formats.

    Raises:
        ValueError: packed arrays are damaged.
    """
    found: dict[Any, int] = {}
    kinds = sorted({checkpoint.packed[t].kind for t in tensors if t in checkpoint.packed})

    def rows() -> Iterable[Arrays]:
        for tensor in tensors:
            weight = checkpoint.packed[tensor].read() if tensor in checkpoint.packed else None
            if weight is not None and len(kinds) > 1:
                weight = blamed(tensor, checkpoint.where, functools.partial(mix, weight, kinds))
            fmt = weight and weight.format
            found[fmt] = found.get(fmt, 0) + 1
            # After the first layer of another format only the counting goes on.
            if weight is not None and len(found) == 1:
                yield weight.packed

    packed = _stack(rows(), len(tensors)) if name.stacked else next(iter(rows()))
    if len(found) > 1:
        _warn_mixed(found, name, checkpoint.where)
        return None
    fmt = next(iter(found))
    axes = name.roles(len(leaf.shape))
    return wrap(packed, fmt, leaf.shape, axes=axes, dtype=leaf.dtype)


def _warn_mixed(found: Mapping[Any, int], name: Name, where: str) -> None:
    kinds = ", ".join(f"{fmt or 'dense'}: {count}" for fmt, count in found.items())
    warnings.warn(
        f"{name.path!r} comes in several formats over its layers in {where} ({kinds}). One stacked "
        "weight has one format, so it is loaded dense. To pack it, name a format: "
        f"quantize=jp.rules(({name.path!r}, jp.quant.gguf('q8_0')), ('**', 'keep')).",
        stacklevel=4,
    )


def _whole(layers: Iterable[np.ndarray], name: Name, leaf: Any) -> np.ndarray:
    return np.stack(list(layers)) if name.stacked else next(iter(layers))


def _stack(rows: Iterable[Arrays], count: int) -> dict[str, np.ndarray]:
    """Arrays of each layer, copied one by one into stacks of `count`."""
    stacks: dict[str, np.ndarray] = {}
    for i, row in enumerate(rows):
        for key, array in row.items():
            value = np.asarray(array)
            if key not in stacks:
                stacks[key] = np.empty((count, *value.shape), value.dtype)
            stacks[key][i] = value
    return stacks
