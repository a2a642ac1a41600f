"""Products with a quantized weight, whose backward pass keeps packed arrays alone.

    y = x W',   dx = dy W'^T,   W' = decode(packed), unpacked once for each of them

The gradient to `x` needs no residual but the packed weight; there is none to the weight.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpeft.core.memory import on_host
from jaxpeft.core.sharding import explicit, vary, varying
from jaxpeft.core.structured import Contraction
from jaxpeft.quant import kernels, rows
from jaxpeft.quant.lookup import lookup
from jaxpeft.quant.weight import QuantizedWeight

Array = jax.Array

# Larger matrices are unpacked a tile of outputs at a time: bytes of a dense tile. Those of a 7B
# model's layers are smaller, since tiles cost time: their codes are copied, their products small.
TILE = 128 * 2**20


def product(weight: QuantizedWeight, op: Contraction) -> Array | None:
    """The result of a product, of any kind, with the weight on either side."""
    if op.kind == "gather":
        found = lookup(weight, op)
        return op.bind(weight.materialize()) if found is None else found
    if any(map(on_host, weight.packed.values())):
        # What the backward pass keeps has to be the arrays of the host, not their tiles here.
        return _linear(weight, op)
    fused = _fused(weight, op)
    return _unfused(weight, op) if fused is None else fused


def _fused(weight: QuantizedWeight, op: Contraction) -> Array | None:
    """The product by a fused kernel, where one applies and is wanted."""
    wanted = weight.compute != "xla" and (weight.compute != "auto" or jax.device_count() == 1)
    if not wanted or not _by_inputs(weight, op) or op.others[0].dtype != op.out.dtype:
        return None
    x = op.others[0]
    plans = kernels.plans(weight.format, weight.packed, x.size // x.shape[-1])
    if weight.compute == "interpret":
        return _by_kernel(weight, x, plans["tpu"], interpret=True) if "tpu" in plans else None
    # Those for GPUs have to be asked for until one has measured them.
    known = {name: plans[name] for name in plans if name == "tpu" or weight.compute == "pallas"}
    if not known:
        return None
    kinds: dict[str, Any] = {
        name: functools.partial(_at, weight, tile) for name, tile in known.items()
    }
    if weight.compute == "auto":
        kinds["default"] = lambda packed, x: _unfused(
            dataclasses.replace(weight, packed=packed), op.on(x)
        )
    return lax.platform_dependent(weight.packed, x, **kinds)


def _at(weight: QuantizedWeight, tile: Any, packed: Any, x: Array) -> Array:
    return _by_kernel(dataclasses.replace(weight, packed=packed), x, tile)


def _by_kernel(weight: QuantizedWeight, x: Array, tile: Any, *, interpret: bool = False) -> Array:
    *lead, inputs = x.shape
    run = functools.partial(kernels.product, weight.format, tile, interpret)
    return run(weight.packed, x.reshape(-1, inputs)).reshape(*lead, -1)


def _unfused(weight: QuantizedWeight, op: Contraction) -> Array:
    if _by_inputs(weight, op) and not _explicit(weight, op):
        x = op.others[0]
        if rows.applies(weight.format, weight.packed, x.size // x.shape[-1]):
            return _few(weight, op)
    return _dense(weight, op)


def _dense(weight: QuantizedWeight, op: Contraction) -> Array:
    tiles = _tiles(weight, op)
    return _tiled(weight, op, *tiles) if tiles else _linear(weight, op)


def _few(weight: QuantizedWeight, op: Contraction) -> Array:
    """A product with few rows, which makes no matrix where a platform has a way to do without."""

    def dense(packed: Any, x: Array) -> Array:
        return _dense(dataclasses.replace(weight, packed=packed), op.on(x))

    def run(unroll: bool, packed: Any, x: Array) -> Array:
        flat = x.reshape(-1, x.shape[-1])
        y = rows.multiply(weight.format, packed, flat, op.out.dtype, unroll=unroll)
        return y.reshape(op.out.shape)

    @jax.custom_jvp
    def call(packed: Any, x: Array) -> Array:
        cpu, cuda = functools.partial(run, False), functools.partial(run, True)
        return lax.platform_dependent(packed, x, cpu=cpu, cuda=cuda, default=dense)

    @call.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        (packed, _), (_, dx) = primals, tangents
        return call(*primals), dense(packed, dx)

    return call(dict(weight.packed), op.others[0])


def _is_plain(weight: QuantizedWeight, op: Contraction) -> bool:
    """Whether one matrix is multiplied by one array over one axis of each."""
    if op.kind != "dot_general" or weight.tail or len(op.others) != 1:
        return False
    contracting, batch = op.params["dimension_numbers"]
    matrix = not weight.groups[0] and len(weight.layout.axes) == 2
    return matrix and not any(batch) and len(contracting[0]) == 1


def _by_inputs(weight: QuantizedWeight, op: Contraction) -> bool:
    """Whether it is `x W` with the inputs last in `x`."""
    if not _is_plain(weight, op) or op.side != 1:
        return False
    ((ours, theirs), _), (x,) = op.params["dimension_numbers"], op.others
    return weight.layout.axes[theirs[0]] == weight.groups[1] and ours == (x.ndim - 1,)


def _explicit(weight: QuantizedWeight, op: Contraction) -> bool:
    return any(explicit(x) for x in (*weight.packed.values(), *op.others))


def _linear(weight: QuantizedWeight, op: Contraction) -> Array:
    """The program's own operation on the unpacked weight, which is unpacked again for each pass.

    Being rematerialized, it is an ordinary function to every transform, forward mode included, and
    the compiler may not let the passes share one unpacked weight, which would live in between. The
    passes of a loop are loops of their own. What it unpacks in one turn may be shared in that turn:
    by a layer computed again and the gradients that go through it.
    """

    def run(weight: QuantizedWeight, others: Any) -> Array:
        return op.bind(jax.tree.map(lax.stop_gradient, weight).materialize(), *others)

    # XLA has no way to say so of arrays of the host.
    apart = not weight.looped and not any(map(on_host, weight.packed.values()))
    return jax.checkpoint(run, prevent_cse=apart)(weight, op.others)


def _tiles(weight: QuantizedWeight, op: Contraction) -> tuple[int, str] | None:
    """How many tiles of outputs to take, and what they are to the product; None for one tile.

    "kept": `x W`, whose result's last axis is the outputs; "met": `g W^T`, which sums over them.
    """
    if not _is_plain(weight, op):
        return None
    _, ins, outs = weight.groups
    # Explicit meshes ask for the sharding of each product, which that of a tile is not.
    if len(outs) > 1 or _explicit(weight, op):
        return None
    (axis,) = op.params["dimension_numbers"][0][op.side]
    role = {ins: "kept", outs: "met"}.get(weight.layout.axes[axis])
    count = _count(weight)
    return (count, role) if role and count > 1 else None


def _count(weight: QuantizedWeight) -> int:
    """The least number of equal tiles whose dense arrays are no larger than `TILE`."""
    *_, ins, outs = weight.packed_shape
    least = math.ceil(ins * outs * jnp.dtype(weight.dtype).itemsize / TILE)
    return next((n for n in range(least, min(outs, 4 * least) + 1) if outs % n == 0), 1)


def _tiled(weight: QuantizedWeight, op: Contraction, count: int, role: str) -> Array:
    """A scan over tiles of the outputs; each is unpacked, multiplied and forgotten.

    A tile takes an equal part of each of as many pieces as there are devices, so that outputs that
    are split over devices are split in each tile, too, and none has to move.
    """
    outs = weight.packed_shape[-1]
    pieces = jax.device_count() if outs % (jax.device_count() * count) == 0 else 1
    packed = {name: _piled(array, -1, pieces, count) for name, array in weight.packed.items()}
    width = outs // count
    layout = weight.layout.resized(weight.groups[2][0], width)
    tile = dataclasses.replace(weight, layout=layout, looped=True)
    ((contracting, _), dtype) = op.params["dimension_numbers"], op.out.dtype
    (axis,) = contracting[1 - op.side]
    x = op.others[0]

    def part(packed: Any, x: Array) -> Array:
        piece = dataclasses.replace(tile, packed=packed)
        return _linear(piece, op._replace(others=(x,), bind=functools.partial(_dot, op)))

    if role == "kept":
        _, ys = lax.scan(lambda _, packed: (None, part(packed, x)), None, packed)
        return _joined(ys, op.out.shape, x.ndim - 1 if op.side == 1 else 0, pieces)
    xs = _piled(x, axis, pieces, count)
    wide = jnp.promote_types(dtype, jnp.float32)
    axes = frozenset().union(*map(varying, (x, *packed.values())))
    start = vary(jnp.zeros(op.out.shape, wide), tuple(axes))
    total, _ = lax.scan(
        lambda sum_, tile: (sum_ + part(*tile).astype(wide), None), start, (packed, xs)
    )
    return total.astype(dtype)


def _dot(op: Contraction, array: Array, x: Array) -> Array:
    """The program's own product of a tile."""
    operands = (array, x) if op.side == 0 else (x, array)
    numbers = op.params["dimension_numbers"]
    return lax.dot_general(
        *operands, numbers, op.params["precision"], op.params["preferred_element_type"]
    )


def _piled(array: Array, axis: int, pieces: int, count: int) -> Array:
    """Tiles of an axis, stacked in front; what is the same for all outputs is repeated."""
    if array.shape[axis] == 1:
        return jnp.broadcast_to(array, (count, *array.shape))
    axis %= array.ndim
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    split = array.reshape(*before, pieces, count, -1, *after)
    return jnp.moveaxis(split, axis + 1, 0).reshape(count, *before, -1, *after)


def _joined(ys: Array, shape: tuple[int, ...], axis: int, pieces: int) -> Array:
    """The array whose axis came in tiles, stacked in front."""
    split = ys.reshape(len(ys), *shape[:axis], pieces, -1, *shape[axis + 1 :])
    return jnp.moveaxis(split, 0, axis + 1).reshape(shape)
