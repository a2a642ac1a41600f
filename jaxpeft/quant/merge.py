"""`merge`: an adapter baked into weights that are packed again, one leaf after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpeft.core.adapter import Adapter
from jaxpeft.core.site import Site
from jaxpeft.core.structured import Structured, dense, unstack
from jaxpeft.core.transform import Tuned
from jaxpeft.core.tree import leaves_with_paths
from jaxpeft.quant import formats
from jaxpeft.quant.absorb import absorb
from jaxpeft.quant.formats import Error, Format, Packed
from jaxpeft.quant.formats.host import on_device
from jaxpeft.quant.offload import fetched
from jaxpeft.quant.quantize import (
    Axes,
    axes_of,
    canonical,
    choose,
    fits_nothing,
    key_at,
    whole_blocks,
)
from jaxpeft.quant.weight import QuantizedWeight, wrap


class Moved(NamedTuple):
    """How far a weight that was packed is from the exact merged one, in the units of the weight.

    Attributes:
        rms: root mean square of the difference.
        max_relative: its largest entry, relative to the largest of the weight.
        update: root mean square of what the adapter adds. Where `rms` is near it, the rounding
            takes most of the adapter's work away: choose a finer format, or keep the adapter apart.
    """

    rms: jax.Array
    max_relative: jax.Array
    update: jax.Array


class Merged(NamedTuple):
    """What `merge` returns.

    Attributes:
        params: plain params, quantized where that was asked for.
        errors: by path, how far each weight that was packed is from the exact merged one.
    """

    params: Any
    errors: dict[str, Moved]


def merge(
    tuned: Tuned,
    adapter: Adapter,
    params: Any,
    rules: Any = None,
    *,
    sites: Sequence[Site] | None = None,
    key: jax.Array | None = None,
) -> Merged:
    """Params with the adapter baked in and quantized again: `W' = pack(W + update)`.

    One leaf, and of a stack one layer, is dense at a time. Weights that the adapter leaves alone
    and whose format stays are not touched. Updates that are the same all over the blocks of an
    integer format (`jaxpeft.qalora`) are taken in by its zero points, which become float32. What
    `jaxpeft.offload` has put into host memory comes back to the device.

    Args:
        tuned: the tuned model.
        adapter: the adapter.
        params: the params that it was made for, dense or quantized.
        rules: what to pack the merged weights as. By default each gets the format that it had, and
            dense ones stay dense. A format, or `rules((pattern, format), ...)`, is understood as by
            `jaxpeft.quantize`; a bare format also takes every quantized weight with whole blocks.
        sites: as for `jaxpeft.quantize`, for weights that are dense in `params`.
        key: a PRNG key for stochastic rounding, where formats have it.

    Returns:
        `Merged(params, errors)`. An error is `Moved(rms, max_relative, update)`, the first two of
        the packed weight against the exact merged one; of a stack the second is the largest of its
        layers.

    Raises:
        ValueError: as `tuned.merge` and `jaxpeft.quantize`.
        TypeError: as `jaxpeft.quantize`.

    Example:
        >>> import jaxpeft as jp
        >>> packed = jp.quantize({"w": jnp.ones((64, 8))}, jp.quant.nf4())
        >>> tuned = jp.transform(lambda p, x: x @ p["w"], jp.lora(2))
        >>> adapter = tuned.init(jax.random.key(0), packed, jnp.ones((1, 64)))
        >>> merged, errors = jp.quant.merge(tuned, adapter, packed, jp.quant.int8())
        >>> merged["w"].format.name, float(errors["w"].max_relative) < 0.01
        ('int8', True)
    """
    by_path = {site.path: site for site in sites or ()}
    pairs, _ = leaves_with_paths(params, is_leaf=lambda x: isinstance(x, Structured))
    wanted, bases = formats_wanted(rules, pairs, by_path), dict(pairs)
    errors: dict[str, Moved] = {}

    def store(path: str, weight: Any) -> Any:
        base = bases[path]
        if path not in wanted:
            return dense(weight)
        if weight is base and isinstance(base, QuantizedWeight):
            if on_device(base.format) == wanted[path]:
                return fetched(base)
        axes = (
            base.axes
            if isinstance(base, QuantizedWeight)
            else axes_of(base.shape, by_path.get(path), path)
        )
        update = _update(weight, base, axes)
        moved = absorb(weight, base)
        if moved is not None and (rules is None or wanted[path] == moved.format):
            errors[path] = Moved(*_error_of(weight, moved), update)
            return moved
        try:
            stored, error = repack(weight, base, wanted[path], axes, key_at(key, path))
        except ValueError as problem:
            raise ValueError(f"{path!r} of shape {weight.shape}: {problem}") from problem
        errors[path] = Moved(*error, update)
        return stored

    return Merged(tuned.merge(adapter, params, store=store), errors)


def formats_wanted(rules: Any, pairs: Any, sites: Mapping[str, Site]) -> dict[str, Format]:
    """The format of each merged weight that is to be packed, by path."""
    quantized = {path: leaf for path, leaf in pairs if isinstance(leaf, QuantizedWeight)}
    there = {path: on_device(leaf.format) for path, leaf in quantized.items()}
    own = {path: fmt for path, fmt in there.items() if fmt is not None}
    if rules is None:
        return own
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in pairs}
    if not isinstance(rules, Format):
        return choose(rules, list(shapes.items()), sites)
    fitting = (path for path in own if whole_blocks(quantized[path].packed_shape, rules))
    rest = [(path, shape) for path, shape in shapes.items() if path not in own]
    found = dict.fromkeys(fitting, rules) | choose(rules, rest, sites)
    if not found:
        raise ValueError(fits_nothing(rules, len(pairs)))
    return own | found


def repack(
    weight: Any, base: Any, fmt: Format, axes: Axes, key: jax.Array | None = None
) -> tuple[QuantizedWeight, Error]:
    """A weight in the place of `base`, packed, and its error.

    Args:
        weight: an array or a structured weight.
        base: the leaf of the params, whose options a quantized one hands on.
        fmt: the format.
        axes: stack, input and output axes of a dense `base`; a quantized one knows its own.
        key: for stochastic rounding.
    """
    compute = "auto"
    if isinstance(base, QuantizedWeight):
        axes, compute = base.axes, base.compute
    layers = [n for i, n in enumerate(base.shape) if axes[0][i : i + 1] == (i,)]
    keys = key if key is None else jax.random.split(key, tuple(layers)) if layers else key
    packed, error = _each(_pack(fmt), weight, axes, keys)
    if not isinstance(error.rms, jax.core.Tracer) and not jnp.isfinite(error.rms):
        raise ValueError("the merged weight is not finite. Find the step that made it so.")
    return wrap(packed, fmt, base.shape, axes=axes, dtype=base.dtype, compute=compute), error


def _pack(fmt: Format) -> Callable[[jax.Array, Any], tuple[Packed, Error]]:
    def pack(matrix: jax.Array, key: Any) -> tuple[Packed, Error]:
        packed = formats.quantize(matrix, fmt, key=key)
        return packed, formats.error(matrix, packed, fmt)

    return pack


def _error_of(weight: Any, stored: QuantizedWeight) -> Error:
    def of_layer(matrix: jax.Array, packed: Packed) -> tuple[None, Error]:
        return None, formats.error(matrix, packed, stored.format)

    return _each(of_layer, weight, stored.axes, stored.packed)[1]


def _update(weight: Any, base: Any, axes: Axes) -> jax.Array:
    """Root mean square of what the adapter adds to a weight."""
    if isinstance(base, QuantizedWeight):
        return _error_of(weight, fetched(base)).rms

    def of_layer(matrix: jax.Array, before: jax.Array) -> tuple[None, Error]:
        off = matrix - before.astype(jnp.float32)
        return None, Error(jnp.sqrt(jnp.mean(off**2)), jnp.max(jnp.abs(off)))

    return _each(of_layer, weight, axes, canonical(jnp.asarray(base), axes))[1].rms


def _each(
    f: Callable[[jax.Array, Any], tuple[Any, Error]], weight: Any, axes: Axes, given: Any
) -> tuple[Any, Error]:
    """`f(matrix, given)` of the dense weight `(*stack, in, out)`, one layer after the other.

    Layers are slices of a stack axis that stands in front, and `given` has one entry for each.
    """
    stack, ins, outs = axes
    halves = unstack(weight) if stack[:1] == (0,) else None
    if halves is None:
        return f(canonical(dense(weight, jnp.float32), axes), given)
    arrays, layer = halves
    inner = (before(stack[1:]), before(ins), before(outs))
    found, errors = lax.map(lambda part: _each(f, layer(part[0]), inner, part[1]), (arrays, given))
    rms = jnp.sqrt(jnp.mean(errors.rms**2))
    return found, Error(rms, jnp.max(errors.max_relative))


def before(axes: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a layer, where these are of the stack."""
    return tuple(axis - 1 for axis in axes)
