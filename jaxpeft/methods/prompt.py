"""Prompt tuning: learned embeddings in front of the sequence.

x' = [p_1; ...; p_n; x],   p: (n, d)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.method import Leaves, Method, Needs
from jaxpeft.core.rows import Rows
from jaxpeft.core.site import Site
from jaxpeft.core.structured import Structured, dense
from jaxpeft.core.virtual import TOKENS, Virtual

Array = jax.Array


def prompt_tuning(
    tokens: int,
    *,
    init: str | Sequence[int] = "random",
    both: bool = False,
    names: Mapping[str, str] | None = None,
    dtype: Any = jnp.float32,
) -> Method:
    """Prompt tuning: `tokens` learned embeddings in front of every sequence.

    The model is called with `tokens` more ids, whose rows the embedding table does not have: they
    look up the prompt. Masks and positions are lengthened, outputs are cut, so that `apply` has
    the shapes of the model's own call. Leaves: `prompt` (tokens, d), that many parameters.

    Args:
        tokens: length of the prompt, `n`.
        init: "random": normal with the standard deviation of the table where its values are known,
            else 0.02; "vocabulary": rows of the table drawn at random; or a sequence of token ids
            (a tokenized text), whose rows are repeated to the length.
        both: prompt the tokens of a decoder behind an encoder too, with the same embeddings.
        names: the model's arguments where they have unusual names: keys "tokens", "mask" and
            "positions".
        dtype: of the leaf.

    Returns:
        A method for the table that the tokens index. As a bare tuning it goes there by itself.

    Raises:
        ValueError: if `tokens` is out of range, or `init` is unknown.

    Example:
        >>> import jaxpeft as jp
        >>> method = jp.prompt_tuning(20, init=[15496, 995])

    Reference:
        Lester et al. 2021, arXiv:2104.08691.
    """
    check_count(tokens)
    if isinstance(init, str) and init not in ("random", "vocabulary"):
        raise ValueError(f'init={init!r} is none of "random", "vocabulary" or token ids.')

    def start(key: Array, site: Site, weight: Any) -> Leaves:
        return {"prompt": first_rows(key, site, weight, tokens, init).astype(dtype)}

    options = {"tokens": tokens, "both": both, "names": dict(names or {})}
    return prompt_method(
        "prompt_tuning", start, lambda leaves: leaves["prompt"], tokens, options, both=both,
        names=names,
    )  # fmt: skip


def prompt_method(
    name: str,
    init: Callable[[Array, Site, Any], Leaves],
    rows: Callable[[Leaves], Array],
    tokens: int,
    options: Mapping[str, Any],
    *,
    tasks: int = 1,
    both: bool = False,
    names: Mapping[str, str] | None = None,
    fixed: tuple[str, ...] = (),
) -> Method:
    """A method that prompts with the rows `(tasks * tokens, d)` that its leaves stand for."""
    given = tuple(sorted((names or {}).items()))
    task = "task_ids" if tasks > 1 else ""
    virtual = Virtual(tokens, tasks * tokens, task, given, both)
    inputs = (names["tokens"],) if names and "tokens" in names else TOKENS

    def tuned(site: Site, leaves: Leaves, weight: Any, key: Any) -> Any:
        del site, key
        return Rows(weight, rows(leaves))

    return Method(
        name,
        init,
        tuned,
        fits=lambda site: site.table,
        bare=lambda site: site.table and any(_is_tokens(n, inputs) for n in site.lookups),
        options=options,
        fixed=fixed,
        needs=Needs(virtual=(virtual,), inputs=(task,) if task else ()),
    )


def _is_tokens(name: str, inputs: Sequence[str]) -> bool:
    return name in inputs or name.isdigit()


def check_count(tokens: Any) -> None:
    if not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens={tokens!r} is not a length. Use a positive int, such as 20.")


def first_rows(key: Array, site: Site, weight: Any, count: int, init: str | Sequence[int]) -> Array:
    """Embeddings `(count, d)` for a fresh prompt at the table `weight`."""
    size, width = site.shape
    known = weight is not None and not isinstance(weight, jax.ShapeDtypeStruct)
    if init == "random":
        spread = jnp.std(dense(weight, jnp.float32)) if known else 0.02
        return spread * jax.random.normal(key, (count, width), jnp.float32)
    if not known:
        raise ValueError(f"init={init!r} takes rows of {site.path!r}: pass params with values.")
    ids = jax.random.randint(key, (count,), 0, size) if init == "vocabulary" else _ids(init, count)
    table = weight if isinstance(weight, Structured) else jnp.asarray(weight)
    return dense(table, jnp.float32)[ids]


def _ids(init: Any, count: int) -> Array:
    if not len(init):
        raise ValueError("init=[] has no token ids. Give those of a text.")
    return jnp.asarray([init[i % len(init)] for i in range(count)])
