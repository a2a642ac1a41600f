"""Full tuning of some leaves, beside an adapter on others: norms, heads, biases.

W' = V,  V trained, starting at W
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.method import Leaves, Method
from jaxpeft.core.site import Site
from jaxpeft.core.structured import Structured


def full(*, dtype: Any = jnp.float32) -> Method:
    """Trains the matched leaves themselves: `W' = value`, which starts at `W`.

    Args:
        dtype: of the trained copy; it is cast to the weight's dtype where it is used.

    Returns:
        A method with one leaf, `value`, of the weight's shape: as many parameters as the weight
        has. As a bare tuning it goes to every floating-point leaf: full fine-tuning.

    Raises:
        ValueError: if `init` is given shapes only, as the start needs the weight's values, or a
            quantized weight, whose codes cannot be trained.

    Example:
        >>> import jaxpeft as jp
        >>> tuning = jp.rules(("**/q_proj/kernel", jp.lora(8)), ("**/{bias,scale}", jp.full()))
    """

    def start(key: jax.Array, site: Site, weight: Any) -> Leaves:
        del key
        if isinstance(weight, Structured):
            raise ValueError(
                f"full() trains the values of a weight, but {site.path!r} is quantized: "
                f"{type(weight).__name__}{weight.shape}. Leave it dense in `jp.quantize(params, "
                "jp.rules((pattern, format)))`, tune it with lora() or ia3(), or give full() rules "
                'that leave it out, such as jp.rules(("**/norm*/**", jp.full())).'
            )
        if isinstance(weight, jax.ShapeDtypeStruct):
            raise ValueError(
                f"full() starts {site.path!r} at the weight's values, but params are shapes only. "
                "Pass real params, or call init under jax.eval_shape."
            )
        return {"value": jnp.array(weight, dtype)}

    def tuned(site: Site, leaves: Leaves, weight: Any, key: jax.Array | None) -> jax.Array:
        del site, key
        return leaves["value"].astype(weight.dtype)

    def fits(site: Site) -> bool:
        return not site.boundary

    return Method("full", start, tuned, fits, fits)
