"""LLaMA-Adapter: attention to a learned prompt beside each attention, behind a gate.

o' = o + g * softmax(q P_K^T / sqrt(H)) P_V,   P_K = P W_k,   P_V = P W_v
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.method import Leaves, Method, Needs
from jaxpeft.core.rules import Where
from jaxpeft.core.site import Site
from jaxpeft.core.tap import Here
from jaxpeft.methods.prompt import check_count

Array = jax.Array


def llama_adapter(
    tokens: int,
    *,
    layers: int | None = None,
    width: int | None = None,
    keys: str = "k_proj",
    values: str = "v_proj",
    scale: float | None = None,
    dtype: Any = jnp.float32,
) -> Method:
    """LLaMA-Adapter, PEFT's adaption prompt: every query attends to `tokens` learned rows too.

    The rows go through the attention's own frozen projections for keys and values, without
    positions, and what is read from them is added to the result per head, in front of the output
    projection, times a gate. Key heads are repeated for the queries that share them.

    Leaves at each attention: `prompt` (stack..., tokens, width), normal, and `gate` (stack...),
    zero: `tokens * width + 1` parameters a layer. A fresh adapter changes nothing.

    Args:
        tokens: rows of the prompt.
        layers: of a stack, the number of last layers that have a prompt; all by default. The other
            layers' leaves are there, but never change. Layers outside of a scan have paths, which
            rules choose among.
        width: of the rows, which is that of the model; `heads * head width` when absent.
        keys: the module beside the attention's mark whose kernel, (width, ...), makes the keys.
        values: the one that makes the values.
        scale: of the products with the queries; one over the root of the head width when absent.
            1.0 for attentions that scale their queries beforehand, as Flax's own do.
        dtype: of the leaves.

    Returns:
        A method for the sides ":context" of attentions. As a bare tuning it goes to all of them.

    Raises:
        ValueError: if a number is out of range, or a prompt does not fit its projections.

    Example:
        >>> import jaxpeft as jp
        >>> tuning = jp.rules(("**/self_attn:context", llama_adapter(10, layers=30)))

    Reference:
        Zhang et al. 2023, arXiv:2303.16199.
    """
    check_count(tokens)
    for name, value in (("layers", layers), ("width", width)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} is out of range. Use a positive int, or None.")

    def start(key: Array, site: Site, weight: Any) -> Leaves:
        del weight
        *stack, heads, size = site.shape
        prompt = jax.random.normal(key, (*stack, tokens, width or heads * size), dtype)
        leaves = {"prompt": prompt, "gate": jnp.zeros(stack, dtype)}
        return leaves if layers is None else leaves | {"on": _last(site, layers, dtype)}

    def call(site: Site, leaves: Leaves, context: Array, here: Here) -> Array:
        queries, (*_, heads, size) = here.sources["query"], context.shape
        rows = leaves["prompt"].astype(context.dtype)
        k, v = (_projected(rows, here, name, size, site) for name in (keys, values))
        k, v = (jnp.repeat(x, heads // x.shape[-2], axis=-2) for x in (k, v))
        scores = jnp.einsum("...tnh,snh->...tns", queries, k) * (scale or 1 / math.sqrt(size))
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
        gate = leaves["gate"] * jax.lax.stop_gradient(leaves.get("on", 1.0))
        read = jnp.einsum("...tns,snh->...tnh", (gate * weights).astype(v.dtype), v)
        return context + read

    def reads(site: Site) -> tuple[Where, ...]:
        module = site.path.rpartition(":")[0]
        return tuple(_Within(f"{module}/{name}/".lstrip("/")) for name in (keys, values))

    options = {
        "tokens": tokens, "layers": layers, "width": width, "keys": keys, "values": values,
        "scale": scale,
    }  # fmt: skip
    return Method(
        "llama_adapter",
        start,
        None,
        fits=_is_context,
        bare=_is_context,
        options=options,
        fixed=("on",),
        call=call,
        needs=Needs(reads=(reads,), attention=True),
    )


@dataclasses.dataclass(frozen=True)
class _Within:
    """Matches the parameters of a module, which stand below "params" in linen."""

    module: str

    def __call__(self, path: str, site: Any) -> bool:
        return path.removeprefix("params/").startswith(self.module)


def _is_context(site: Site) -> bool:
    return site.side == "context"


def _last(site: Site, count: int, dtype: Any) -> Array:
    """One for each of the last layers of a stack, zero for those before them."""
    stack = site.sizes("stack")
    if len(stack) != 1 or count > stack[0]:
        raise ValueError(
            f"layers={count}: {site.path!r} has a stack of {stack} layers. Use a number of them, "
            "or none and rules that name the layers."
        )
    return (jnp.arange(stack[0]) >= stack[0] - count).astype(dtype)


def _projected(rows: Array, here: Here, module: str, size: int, site: Site) -> Array:
    """Keys or values `(tokens, heads, size)` of the rows, by the frozen kernel and bias."""
    found = {p: w for p, w in here.weights.items() if f"/{module}/" in f"/{p}"}
    kernel = next(w for p, w in found.items() if not p.endswith("bias"))
    kernel = kernel.reshape(kernel.shape[0], -1).astype(rows.dtype)
    if kernel.shape[0] != rows.shape[1]:
        raise ValueError(
            f"the prompt at {site.path!r} has width {rows.shape[1]}, and {module!r} takes "
            f"{kernel.shape[0]}. Use llama_adapter({rows.shape[0]}, width={kernel.shape[0]})."
        )
    bias = next((w for p, w in found.items() if p.endswith("bias")), jnp.zeros(()))
    return (rows @ kernel + bias.reshape(-1).astype(rows.dtype)).reshape(rows.shape[0], -1, size)
