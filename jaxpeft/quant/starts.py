r"""Starts of LoRA that change the base as well: PiSSA and LoftQ.

    W = Q + s A B + E        A B: the largest r singular triplets of what it is to replace

PiSSA trains the principal part of a weight and freezes the rest, `Q = W - s A B`, quantized or not.
LoftQ lets `A B` make good what quantization loses, `s A B = svd_r(W - Q)`. Both alternate between
the two equations: PiSSA starts with the factors and LoftQ with the quantized weight.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxpeft.core.adapter import Adapter, is_shared
from jaxpeft.core.labels import View
from jaxpeft.core.method import Leaves, Method, resolve
from jaxpeft.core.sharding import inherit, known
from jaxpeft.core.site import Site
from jaxpeft.core.structured import Structured
from jaxpeft.core.transform import Tuned
from jaxpeft.core.tree import leaves_with_paths
from jaxpeft.methods.lora import is_plain, unfused
from jaxpeft.quant.alternate import LOFTQ, PISSA, Layer, Scheme, alternated, by_layer
from jaxpeft.quant.formats import Format
from jaxpeft.quant.formats.host import on_device
from jaxpeft.quant.merge import formats_wanted, repack
from jaxpeft.quant.quantize import axes_of
from jaxpeft.quant.svd import Svd, exact_svd
from jaxpeft.quant.weight import QuantizedWeight, wrap


def pissa(
    tuned: Tuned,
    adapter: Adapter,
    params: Any,
    rules: Any = None,
    *,
    iterations: int = 1,
    svd: Svd = exact_svd,
    sites: Sequence[Site] | None = None,
) -> tuple[Any, Adapter]:
    """LoRA that starts at the principal part of each weight: `s A B = svd_r(W)`, `Q = W - s A B`.

    Outputs stay those of the model, to rounding, until `Q` is quantized (QPiSSA). Then
    `iterations` repeat `s A B = svd_r(W - Q)`, `Q = pack(W - s A B)`, and the closest pair is kept.

    Args:
        tuned: the tuned model. Sites of `lora` and `rslora` start anew, others stay as they are.
        adapter: a fresh one, of `tuned.init`.
        params: the params that it was made for, dense or quantized.
        rules: what to pack the base as, as for `jaxpeft.quant.merge`: by default dense weights stay
            dense, quantized ones are packed in the format that they have.
        iterations: of the alternation; 1 where the base stays dense.
        svd: how triplets are found; `jaxpeft.quant.randomized_svd()` is much faster on large
            weights, and slightly off.
        sites: as for `jaxpeft.quantize`.

    Returns:
        `(params, adapter)`: the adapter belongs to these params alone. Keep them with
        `jaxpeft.models.save`, or see `jaxpeft.hf.difference`.

    Raises:
        ValueError: if no site has LoRA, or one has it in a chain; as `jaxpeft.quantize`.

    Example:
        >>> import jax.numpy as jnp, jaxpeft as jp
        >>> params, x = {"w": jnp.diag(jnp.arange(1.0, 6.0))}, jnp.ones((1, 5))
        >>> tuned = jp.transform(lambda p, x: x @ p["w"], jp.lora(2))
        >>> rest, adapter = pissa(tuned, tuned.init(jax.random.key(0), params, x), params)
        >>> int(jnp.linalg.matrix_rank(rest["w"], rtol=1e-5))
        3

    Reference:
        Meng et al. 2024, arXiv:2404.02948.
    """
    return _start(PISSA, tuned, adapter, params, rules, iterations, svd, sites)


def loftq(
    tuned: Tuned,
    adapter: Adapter,
    params: Any,
    rules: Any,
    *,
    iterations: int = 1,
    svd: Svd = exact_svd,
    sites: Sequence[Site] | None = None,
) -> tuple[Any, Adapter]:
    """LoRA that starts at what quantization loses: `Q = pack(W - s A B)`, `s A B = svd_r(W - Q)`.

    `A B` is zero in the first of the iterations. Of all the closest `Q + s A B` is kept, so
    `|W - Q - s A B|` is never above that of plain quantization, and never grows with `iterations`.

    Args:
        tuned: the tuned model. Sites of `lora` and `rslora` start anew, others stay as they are.
        adapter: a fresh one, of `tuned.init`.
        params: the params that it was made for; those of a site as exact as they are to be had.
        rules: what to pack the base as, as for `jaxpeft.quant.merge`.
        iterations: of the alternation; the paper uses 1 to 5.
        svd: as for `pissa`.
        sites: as for `jaxpeft.quantize`.

    Returns:
        `(params, adapter)`, as of `pissa`.

    Raises:
        ValueError: as `pissa`; or if a weight has the format already, so that nothing is lost.

    Example:
        >>> import jax.numpy as jnp, jaxpeft as jp
        >>> params, x = {"w": jnp.linspace(-1, 1, 512).reshape(64, 8)}, jnp.ones((1, 64))
        >>> tuned = jp.transform(lambda p, x: x @ p["w"], jp.lora(2))
        >>> fresh = tuned.init(jax.random.key(0), params, x)
        >>> packed, adapter = loftq(tuned, fresh, params, jp.quant.nf4(), iterations=5)
        >>> off = tuned.merge(adapter, packed)["w"] - params["w"]
        >>> plain = jp.quantize(params, jp.quant.nf4())["w"].materialize() - params["w"]
        >>> bool(jnp.linalg.norm(off) < jnp.linalg.norm(plain))
        True

    Reference:
        Li et al. 2023, arXiv:2310.08659.
    """
    return _start(LOFTQ, tuned, adapter, params, rules, iterations, svd, sites)


def _start(
    scheme: Scheme, tuned: Tuned, adapter: Adapter, params: Any, rules: Any,
    iterations: int, svd: Svd, sites: Sequence[Site] | None,
) -> tuple[Any, Adapter]:  # fmt: skip
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations={iterations!r} is no count. Use 1 to 5.")
    chosen = _low_rank(tuned, adapter)
    by_path = {site.path: site for site in [*(sites or ()), *adapter.sites]}
    pairs, tree = leaves_with_paths(params, is_leaf=lambda x: isinstance(x, Structured))
    wanted = formats_wanted(rules, pairs, by_path)
    if scheme is LOFTQ:
        chosen = {path: method for path, method in chosen.items() if path in wanted}
        _check_loss(chosen, dict(pairs), wanted)
    found: dict[str, Leaves] = {}

    def begun(path: str, leaf: Any) -> Any:
        fmt, axes = wanted.get(path), axes_of(leaf.shape, by_path.get(path), path)
        if path not in chosen:
            return leaf if fmt is None or _has(leaf, fmt) else repack(leaf, leaf, fmt, axes)[0]
        axes = leaf.axes if isinstance(leaf, QuantizedWeight) else axes
        site, old = unfused(by_path[path], chosen[path].options["fused"]), adapter[path]
        layer = Layer(leaf, site, chosen[path], fmt, axes, leaf.dtype, _shapes(old), svd)
        base, new = by_layer(functools.partial(alternated, scheme, iterations=iterations), layer)
        found[path] = {name: inherit(new[name], old[name], range(old[name].ndim)) for name in old}
        return _stored(base, layer, leaf)

    started = tree.unflatten([begun(path, leaf) for path, leaf in pairs])
    return started, Adapter({**adapter, **found}, adapter.sites)


def _check_loss(
    chosen: Mapping[str, Method], leaves: Mapping[str, Any], wanted: Mapping[str, Format]
) -> None:
    """That LoftQ has errors of quantization to correct."""
    if not chosen:
        raise ValueError("rules match no site of lora(). Give a format to at least one of them.")
    for path in chosen:
        if _has(leaves[path], wanted[path]):
            raise ValueError(
                f"{path!r} is {wanted[path]} already, and quantizing it again loses nothing that "
                "`A B` could make good. Give the params that it was quantized from, or use pissa()."
            )


def _stored(base: Any, layer: Layer, leaf: Any) -> Any:
    """The new base in the place of the old leaf."""
    if layer.format is None:
        return inherit(base, leaf, range(base.ndim))
    compute = leaf.compute if isinstance(leaf, QuantizedWeight) else "auto"
    fmt, axes = layer.format, layer.axes
    weight = wrap(base, fmt, leaf.shape, axes=axes, dtype=leaf.dtype, compute=compute)
    sharding = known(leaf)
    return weight if sharding is None else weight.view(View("place", (sharding,)))


def _low_rank(tuned: Tuned, adapter: Adapter) -> dict[str, Method]:
    """The sites with LoRA, and nothing but LoRA."""
    own = [site for site in adapter.sites if not is_shared(site)]
    chosen = resolve(tuned.tuning, own, tuned.head, whole=False)
    found = {path: m for path, m in chosen.items() if "lora" in m.name.split("+")}
    for path, method in found.items():
        if not is_plain(method):
            raise ValueError(
                f"{path!r} has {method.name} {dict(method.options)}; only lora() or rslora() of "
                "all layers, alone at its site, can start from the weight."
            )
    if not found:
        names = sorted({method.name for method in chosen.values()})
        raise ValueError(f"no site has lora() or rslora(); the tuning has {names}.")
    return found


def _has(leaf: Any, fmt: Format) -> bool:
    return isinstance(leaf, QuantizedWeight) and on_device(leaf.format) == fmt


def _shapes(leaves: Leaves) -> dict[str, Any]:
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
