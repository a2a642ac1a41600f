"""Prefix tuning: learned keys and values in front of those of every attention.

Attn(q, [P_K; K], [P_V; V]),   P_K, P_V: (n, heads, width)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.method import Leaves, Method, Needs
from jaxpeft.core.site import Site
from jaxpeft.core.tap import Here, kind_per_head
from jaxpeft.core.virtual import Virtual
from jaxpeft.methods.prompt import check_count

Array = jax.Array


def prefix_tuning(
    tokens: int,
    *,
    hidden: int | None = None,
    width: int | None = None,
    place: str = "",
    shift: bool | str = False,
    gate: bool = False,
    names: Mapping[str, str] | None = None,
    dtype: Any = jnp.float32,
) -> Method:
    """Prefix tuning: `tokens` learned keys and values in every attention.

    The sequence is lengthened by placeholders, so that masks, positions and caches have room, and
    in every attention the keys and values of the placeholders are the learned ones, after any
    rotary embedding (what `peft` calls past key values). Works with remat and with a cache, on any
    model whose attentions are found (`tuned.sites` lists them). A fresh prefix changes the
    outputs, as in the paper.

    Flat leaves, at the keys and at the values of each attention: `prefix` (stack..., tokens,
    heads, head width). With `hidden`, as the paper trains it, `embedding` (stack..., tokens,
    width), `down` (stack..., width, hidden), `down_bias`, `up` (stack..., hidden, heads * head
    width), `up_bias`: prefix = up(tanh(down(embedding))); `flat_prefix` turns it into the flat one.

    Args:
        tokens: length of the prefix, `n`.
        hidden: width of the hidden layer of the reparameterization; None for the flat form.
        width: of its embedding; `heads * head width` when absent.
        place: "front": the prefix takes the first positions of a longer sequence, as in `peft`,
            which is right for causal models. "back": the last ones, for encoders, whose first token
            stays the first. "beside": only the keys and values of attentions are longer, as in
            AdapterHub: for models that provide for it, such as this library's encoders, and the
            default there. By default "front" elsewhere.
        shift: where the prefix is "beside" the sequence, move tokens on by its length in positions
            all the same, as in `peft`'s files for encoders; in a T5, the tokens' keys alone, as in
            AdapterHub's, or with "queries" those of its decoder too, as in `peft`'s.
        gate: scale the prefix by `mean(sigmoid(h . g + b))` over the positions of what the
            attention is given, as in UniPELT: leaves `gate` (stack..., width) and `gate_bias`
            (stack...) more.
        names: the model's arguments where they have unusual names: keys "tokens", "mask" and
            "positions".
        dtype: of the leaves.

    Returns:
        A method for the sides ":key" and ":value" of attentions, `rules(("**/attn:{key,value}",
        prefix_tuning(30)))`. As a bare tuning it goes to all of them.

    Raises:
        ValueError: if `tokens`, `hidden` or `width` is out of range.

    Example:
        >>> import jaxpeft as jp
        >>> method = jp.prefix_tuning(30, hidden=512)

    Reference:
        Li and Liang 2021, arXiv:2101.00190.
    """
    check_count(tokens)
    for name, value in (("hidden", hidden), ("width", width)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} is not a width. Use a positive int, or None.")

    if place not in ("", "front", "back", "beside"):
        raise ValueError(f'place={place!r} is none of "front", "back" and "beside".')
    if shift not in (False, True, "queries"):
        raise ValueError(f'shift={shift!r} is none of False, True and "queries".')
    where = slice(-tokens, None) if place == "back" else slice(0, tokens)

    def start(key: Array, site: Site, weight: Any) -> Leaves:
        del weight
        *stack, heads, size = site.shape
        if hidden is None:
            shape = (*stack, tokens, heads, size)
            leaves = {"prefix": 0.02 * jax.random.normal(key, shape, dtype)}
        else:
            sizes = (tokens, width or heads * size, hidden, heads * size)
            leaves = _perceptron(key, stack, sizes, dtype)
        if gate:
            start_gate = 0.02 * jax.random.normal(key, (*stack, width or heads * size), dtype)
            leaves |= {"gate": start_gate, "gate_bias": jnp.zeros(tuple(stack), dtype)}
        return leaves

    def call(site: Site, leaves: Leaves, x: Array, here: Here) -> Array:
        prefix = leaves["prefix"] if hidden is None else _computed(leaves)
        rows = prefix.reshape(tokens, *x.shape[-2:])
        if gate:
            rows = _gate(leaves, here.sources[_given(site)])[..., None, None, None] * rows
        return x.at[..., where, :, :].set(rows.astype(x.dtype))

    options = {
        "tokens": tokens,
        "hidden": hidden,
        "width": width,
        "place": place,
        "shift": shift,
        "gate": gate,
        "names": dict(names or {}),
    }
    given = tuple(sorted((names or {}).items()))
    virtual = Virtual(tokens, names=given, both=True, place=place, shift=shift)
    return Method(
        "prefix_tuning",
        start,
        None,
        fits=is_key_or_value,
        bare=is_key_or_value,
        options=options,
        call=call,
        needs=Needs(
            virtual=(virtual,),
            reads=(lambda site: (_given(site),),) if gate else (),
            attention=True,
            everywhere=is_key_or_value,
        ),
    )


def _given(site: Site) -> str:
    """The boundary with what the attention around a key or a value is given."""
    return f"{site.path.rpartition(':')[0]}:in"


def _gate(leaves: Leaves, h: Array) -> Array:
    """One number for each sequence."""
    scores = h.astype(jnp.float32) @ leaves["gate"] + leaves["gate_bias"]
    return jax.nn.sigmoid(scores).mean(axis=-1)


def is_key_or_value(site: Site) -> bool:
    """Of any attention, "attn:key_1" of a second one in the same call as well."""
    return kind_per_head(site.path) in ("key", "value")


def _perceptron(key: Array, stack: Any, sizes: Any, dtype: Any) -> Leaves:
    tokens, width, hidden, out = sizes
    keys = jax.random.split(key, 3)
    return {
        "embedding": jax.random.normal(keys[0], (*stack, tokens, width), dtype),
        "down": jax.random.normal(keys[1], (*stack, width, hidden), dtype) / width**0.5,
        "down_bias": jnp.zeros((*stack, hidden), dtype),
        "up": jax.random.normal(keys[2], (*stack, hidden, out), dtype) / hidden**0.5,
        "up_bias": jnp.zeros((*stack, out), dtype),
    }


def _computed(leaves: Leaves) -> Array:
    """The rows `(stack..., tokens, heads * width)` that the reparameterization stands for."""
    inner = jnp.tanh(leaves["embedding"] @ leaves["down"] + leaves["down_bias"][..., None, :])
    return inner @ leaves["up"] + leaves["up_bias"][..., None, :]


def flat_prefix(leaves: Leaves, site: Site) -> Leaves:
    """The leaves of the flat form, equal to a reparameterized prefix at its site.

    Args:
        leaves: of `prefix_tuning(tokens, hidden=...)` at one site.
        site: that site.

    Returns:
        `{"prefix": ...}`, for `prefix_tuning(tokens)`.
    """
    if "prefix" in leaves:
        return leaves
    rows = _computed(leaves)
    return {"prefix": rows.reshape(*rows.shape[:-1], *site.shape[-2:])}
