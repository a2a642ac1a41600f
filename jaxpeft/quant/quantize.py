"""`quantize`: params with quantized weights in the places of arrays."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxpeft.core.keys import site_key, typed_key
from jaxpeft.core.rules import Rules, compile_pattern, unmatched
from jaxpeft.core.sharding import automatic, fitting, known, placed_as
from jaxpeft.core.site import Site
from jaxpeft.core.structured import Structured
from jaxpeft.core.tree import leaves_with_paths
from jaxpeft.quant import formats
from jaxpeft.quant.formats import Format
from jaxpeft.quant.weight import QuantizedWeight, wrap

COMPUTE = ("auto", "xla", "pallas", "interpret")
Axes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
Leaves = Sequence[tuple[str, Any]]  # by path


def quantize(
    params: Any,
    rules: Any,
    *,
    sites: Sequence[Site] | None = None,
    dtype: DTypeLike | None = None,
    compute: str = "auto",
    key: jax.Array | None = None,
) -> Any:
    """Params with quantized structured weights: every method and model runs on them unchanged.

    One weight at a time is packed, on the devices where it is, and its packed arrays are split over
    a mesh as it is. Blocks run along its input axes.

    Args:
        params: a tree of arrays, or of their `ShapeDtypeStruct`s for shapes alone.
        rules: a format such as `jaxpeft.quant.nf4()`, for all matrices but embeddings whose inputs
            are whole blocks (others stay dense); or `rules((pattern, format), ...)`, of which the
            first that matches a path wins.
        sites: how the model uses its parameters, from `tuned.sites(params, *inputs)`; they say
            which axes are inputs. Without them the last axis is the output, the one before it the
            input, and any in front are stacks. Blocks of tables run along their features.
        dtype: that the weights show to the model, in which products are computed; their own when
            absent.
        compute: how products unpack the weight: "xla"; "pallas", fused kernels (GPU and TPU);
            "interpret", the kernels run by the interpreter, for tests; "auto", the kernels on a
            single TPU, "xla" elsewhere. Where no kernel applies it is always "xla".
        key: a PRNG key for stochastic rounding, of `int8` and `int4` alone: each code is one of the
            two next to the weight, and right on average. To the nearest when absent.

    Returns:
        A tree like `params`, where weights that a rule matches are `QuantizedWeight`s.

    Raises:
        ValueError: if nothing is packed, a rule matches nothing, a weight is not finite, the block
            of a rule's format does not divide its input axis, or a key is given to a format that
            has no stochastic rounding.
        TypeError: if `rules` holds something that is no format.

    Example:
        >>> import jaxpeft as jp
        >>> params = {"proj": {"kernel": jnp.ones((64, 32))}, "norm": {"scale": jnp.ones(64)}}
        >>> packed = quantize(params, jp.quant.nf4())
        >>> packed["proj"]["kernel"].nbytes < 64 * 32
        True

    Reference:
        Dettmers et al. 2023, arXiv:2305.14314 (QLoRA).
    """
    if compute not in COMPUTE:
        raise ValueError(f"compute={compute!r} is none of {COMPUTE}.")
    by_path = {site.path: site for site in sites or ()}
    pairs, tree = leaves_with_paths(params, is_leaf=lambda x: isinstance(x, Structured))
    chosen = choose(rules, pairs, by_path)
    if not chosen:
        raise ValueError(fits_nothing(rules, len(pairs)))

    def packed(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return leaf
        axes, own = axes_of(leaf.shape, by_path.get(path), path), key_at(key, path)
        try:
            return pack(leaf, chosen[path], axes, dtype=dtype, compute=compute, key=own)
        except ValueError as error:
            raise ValueError(f"{path!r} of shape {leaf.shape}: {error}") from error

    return tree.unflatten([packed(path, leaf) for path, leaf in pairs])


def pack(
    weight: Any,
    fmt: Format,
    axes: Axes,
    *,
    dtype: DTypeLike | None = None,
    compute: str = "auto",
    key: jax.Array | None = None,
) -> QuantizedWeight:
    """One weight, quantized; see `quantize`."""
    if isinstance(weight, jax.ShapeDtypeStruct):
        real = functools.partial(pack, fmt=fmt, axes=axes, dtype=dtype, compute=compute, key=key)
        return jax.eval_shape(real, weight)
    arrays = formats.quantize(canonical(jnp.asarray(weight), axes), fmt, key=key)
    return wrap(arrays, fmt, weight.shape, axes=axes, dtype=dtype or weight.dtype, compute=compute)


def key_at(key: jax.Array | None, path: str) -> jax.Array | None:
    """A key of its own for the weight at a path."""
    return None if key is None else site_key(typed_key(key), path)


def axes_of(shape: Sequence[int], site: Site | None, path: str = "") -> Axes:
    """Which axes of a weight are stack, input and output.

    The inputs of a table are its features, as they are to an output head that is tied to it: rows
    that are looked up can be unpacked alone.
    """
    if site is not None and site.linear:
        stack, ins, outs = site.axes("stack", "batch"), site.axes("in"), site.axes("out", "")
        return (stack, outs, ins) if site.table else (stack, ins, outs)
    n = len(shape)
    stack, first, second = tuple(range(n - 2)), (n - 2,), (n - 1,)
    return (stack, second, first) if n == 2 and _named_table(path) else (stack, first, second)


def _named_table(path: str) -> bool:
    """Whether a parameter is called as the tables of embeddings are."""
    return "embed" in path.rpartition("/")[2]


def canonical(weight: jax.Array, axes: Axes) -> jax.Array:
    """The weight as `(*stack, in, out)`, split over a mesh as its axes are."""
    stack, ins, outs = axes
    sizes = [math.prod(weight.shape[axis] for axis in group) for group in (ins, outs)]
    shape = (*(weight.shape[axis] for axis in stack), *sizes)

    def matrices(weight: jax.Array) -> jax.Array:
        return weight.transpose((*stack, *ins, *outs)).reshape(shape)

    sharding = known(weight)
    if sharding is None:
        return matrices(weight)
    spec = (*sharding.spec, *[None] * weight.ndim)
    # Of axes that become one, the first is in its parts what the one is.
    entries = [spec[group[0]] if group else None for group in (*((i,) for i in stack), ins, outs)]
    target = fitting(sharding.mesh, entries, shape)
    return placed_as(automatic(matrices, target, weight), target)


def choose(
    rules: Any,
    pairs: Leaves,
    sites: Mapping[str, Site] | None = None,
    *,
    words: Sequence[str] = (),
) -> dict[str, Any]:
    """Which format each weight is to have; see `quantize`.

    Args:
        rules: a format, or rules.
        pairs: paths and weights, of which shape and dtype are looked at.
        sites: by path, how the model uses a weight.
        words: what rules may say instead of a format.

    Returns:
        Formats (or words) by path, of the weights that are to have one.

    Raises:
        ValueError: a rule matches nothing.
        TypeError: something is no format.
    """
    sites = sites or {}
    if isinstance(rules, Format):
        return {path: rules for path, leaf in pairs if is_usual(path, leaf, rules, sites.get(path))}
    if not isinstance(rules, Rules):
        raise TypeError(_no_format(rules))
    found: dict[str, Any] = {}
    for where, fmt in rules.pairs:
        if not isinstance(fmt, Format) and fmt not in words:
            raise TypeError(f"rules pair {where!r} with what is none: {_no_format(fmt)}")
        matches: Callable[[str, Any], bool] = compile_pattern(where)
        near = [(path, leaf) for path, leaf in pairs if matches(path, leaf)]
        hits = [path for path, leaf in near if is_matrix(leaf)]
        if not hits:
            raise ValueError(_no_matrix(where, near, pairs))
        for path in hits:
            found.setdefault(path, fmt)
    return found


def fits_nothing(rules: Any, count: int) -> str:
    """Why a bare format packs nothing."""
    return (
        f"{rules} fits none of the {count} weights: it takes dense matrices whose inputs are whole "
        "blocks, and no embeddings. Give another block, or sites=tuned.sites(params, *inputs) "
        "where inputs are other axes, or jp.rules((pattern, format), ...), which says what is "
        "wrong with a weight."
    )


def _no_format(given: Any) -> str:
    name = given if isinstance(given, str) else getattr(given, "__name__", None)
    known = name if name in formats.FORMATS else "nf4"
    return (
        f"{given!r} is no format. Write jp.quant.{known}(), or "
        f"jp.rules((pattern, jp.quant.{known}()), ...)."
    )


def _no_matrix(where: Any, near: Leaves, pairs: Leaves) -> str:
    """Why a rule packs nothing: what it matched, or that it matched nothing."""
    if not near:
        return unmatched(where, [path for path, _ in pairs], "weights")
    path, leaf = near[0]
    if isinstance(leaf, Structured):
        return (
            f"where={where!r} matched {path!r}, which is {leaf} already. Quantize the dense "
            "params, or pack again with `jp.quant.merge(tuned, adapter, params, rules)`."
        )
    return (
        f"where={where!r} matched {path!r}, which is {leaf.dtype}{tuple(leaf.shape)}: only float "
        "weights of two axes or more are packed. Use another pattern."
    )


def is_matrix(leaf: Any) -> bool:
    floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    return floating and not isinstance(leaf, Structured) and len(leaf.shape) > 1


def is_usual(path: str, leaf: Any, fmt: Format, site: Site | None) -> bool:
    """Whether a bare format takes a leaf: matrices of products, of whole blocks, no tables."""
    if not is_matrix(leaf):
        return False
    if site is not None:
        return site.linear and not site.table and _fits(leaf.shape, fmt, site)
    table = _named_table(path) or path.rpartition("/")[2] in ("bias", "scale")
    return not table and _fits(leaf.shape, fmt, None)


def _fits(shape: Sequence[int], fmt: Format, site: Site | None) -> bool:
    stack, ins, outs = ([shape[axis] for axis in group] for group in axes_of(shape, site))
    return whole_blocks((*stack, math.prod(ins), math.prod(outs)), fmt)


def whole_blocks(shape: tuple[int, ...], fmt: Format) -> bool:
    """Whether a weight `(*stack, in, out)` has whole blocks of a format."""
    try:
        fmt.layout(shape)
    except ValueError:
        return False
    return True
