"""Visual prompt tuning: learned rows behind the sequence, inside of an encoder.

x_i' = [x_i; P_i] at the input of layer i,   P_i: (n, d); what layer i makes of P_i is dropped
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.method import Leaves, Method, Needs
from jaxpeft.core.rules import compile_pattern
from jaxpeft.core.site import Site
from jaxpeft.core.tap import Here
from jaxpeft.methods.prompt import check_count

Array = jax.Array


def deep_prompt(
    tokens: int,
    *,
    inside: str = "**/encoder",
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Method:
    """Visual prompt tuning (VPT): `tokens` learned rows that all tokens of an encoder attend to.

    Inside the module `inside` sequences are that much longer, and its output is cut, so that the
    model around it sees nothing of the rows. At the inputs of all layers each layer has rows of
    its own: VPT-deep. At the input of the module itself the layers hand one set of rows on:
    VPT-shallow. It is for sequences without masks, such as patches; layers in front of the first
    one with a prompt see rows of zeros.

    Leaf `prompt` (stack..., tokens, d), uniform within the root of 6 / (768 + d): `tokens * d`
    parameters a layer. A fresh adapter changes the outputs, as in the paper.

    Args:
        tokens: rows of the prompt, `n`.
        inside: glob over the paths of modules: the one whose sequences are longer.
        dropout: share of the prompt's entries that a call does not see, when a key is given.
        dtype: of the leaf.

    Returns:
        A method for the inputs of modules, ":in". As a bare tuning it is shallow.

    Raises:
        ValueError: if `tokens` or `dropout` is out of range; from `init`, if `inside` fits nothing.

    Example:
        >>> import jaxpeft as jp
        >>> tuning = jp.rules(("encoder/layer:in", deep_prompt(50)), ("classifier/*", jp.full()))

    Reference:
        Jia et al. 2022, arXiv:2203.12119.
    """
    check_count(tokens)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout={dropout} is not a share. Use 0 <= dropout < 1.")
    within = compile_pattern(inside)

    def start(key: Array, site: Site, weight: Any) -> Leaves:
        del weight
        *stack, width = site.shape
        # The bound of the paper's code for patches of 16 x 16 pixels in three colours.
        bound = math.sqrt(6 / (768 + width))
        return {"prompt": jax.random.uniform(key, (*stack, tokens, width), dtype, -bound, bound)}

    def call(site: Site, leaves: Leaves, x: Array, here: Here) -> Array:
        del site
        rows = leaves["prompt"].astype(x.dtype)
        if here.key is not None and dropout:
            keep = jax.random.bernoulli(here.key, 1.0 - dropout, (*x.shape[:-2], *rows.shape))
            rows = jnp.where(keep, rows / (1.0 - dropout), 0.0)
        return x.at[..., -tokens:, :].set(rows)

    def is_module(site: Site) -> bool:
        return site.side == "in" and within(site.path.removesuffix(":in"), None)

    return Method(
        "deep_prompt",
        start,
        None,
        fits=lambda site: site.side == "in",
        bare=is_module,
        options={"tokens": tokens, "inside": inside, "dropout": dropout},
        call=call,
        needs=Needs(grows=((inside, tokens),), present=(("inside", inside),)),
    )
