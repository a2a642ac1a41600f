"""Multitask prompt tuning: one prompt for all tasks, times a low-rank matrix for each.

P_t = P * (U_t V_t),   P: (n, d),   U_t: (n, r),   V_t: (r, d)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.adapter import Adapter
from jaxpeft.core.method import Leaves, Method
from jaxpeft.core.site import Site
from jaxpeft.methods.prompt import check_count, first_rows, prompt_method

Array = jax.Array


def multitask_prompt_tuning(
    tokens: int,
    tasks: int,
    *,
    ranks: int = 1,
    init: str | Sequence[int] = "random",
    both: bool = False,
    names: Mapping[str, str] | None = None,
    dtype: Any = jnp.float32,
) -> Method:
    """Multitask prompt tuning: the prompt of task t is `P * (U_t V_t)`.

    With more than one task, `apply` takes `task_ids`, `int32[B]`: the task of each sequence.
    Leaves: `prompt` (n, d), `columns` (tasks, n, ranks) and `rows` (tasks, ranks, d), both normal
    with standard deviation 0.02: `n d + tasks * ranks * (n + d)` parameters. Sequences are
    lengthened as in `prompt_tuning`. A trained adapter starts one for a target task, with
    `tasks=1`: `average_source_tasks`, `exact_source_task`, `only_source_shared`.

    Args:
        tokens: length of the prompt, `n`.
        tasks: how many.
        ranks: of a task's matrix, `r`.
        init: of the common prompt, as for `prompt_tuning`.
        both: prompt the tokens of a decoder behind an encoder too, with the same embeddings.
        names: the model's arguments where they have unusual names: keys "tokens", "mask" and
            "positions".
        dtype: of the leaves.

    Returns:
        A method for the table that the tokens index. As a bare tuning it goes there by itself.

    Raises:
        ValueError: if a number is out of range, or `init` is unknown.

    Example:
        >>> import jax, jaxpeft as jp, jax.numpy as jnp
        >>> params, ids = {"table": jnp.ones((9, 4))}, jnp.array([[1, 2], [3, 4]])
        >>> tuning = multitask_prompt_tuning(3, tasks=5)
        >>> tuned = jp.transform(lambda params, tokens: params["table"][tokens], tuning)
        >>> adapter = tuned.init(jax.random.key(0), params, ids)
        >>> tuned.apply(adapter, params, ids, task_ids=jnp.array([4, 0])).shape
        (2, 2, 4)

    Reference:
        Wang et al. 2023, arXiv:2303.02861.
    """
    check_count(tokens)
    for name, value in (("tasks", tasks), ("ranks", ranks)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is out of range. Use a positive int.")
    if isinstance(init, str) and init not in ("random", "vocabulary"):
        raise ValueError(f'init={init!r} is none of "random", "vocabulary" or token ids.')

    def start(key: Array, site: Site, weight: Any) -> Leaves:
        first, second, third = jax.random.split(key, 3)
        return {
            "prompt": first_rows(first, site, weight, tokens, init).astype(dtype),
            "columns": 0.02 * jax.random.normal(second, (tasks, tokens, ranks), dtype),
            "rows": 0.02 * jax.random.normal(third, (tasks, ranks, site.shape[1]), dtype),
        }

    options = {
        "tokens": tokens, "tasks": tasks, "ranks": ranks, "both": both, "names": dict(names or {}),
    }  # fmt: skip
    return prompt_method(
        "multitask_prompt_tuning", start, _prompts, tokens, options, tasks=tasks, both=both,
        names=names,
    )  # fmt: skip


def _prompts(leaves: Leaves) -> Array:
    """The prompts of all tasks, one after the other: `(tasks * n, d)`."""
    prompts = leaves["prompt"] * (leaves["columns"] @ leaves["rows"])
    return prompts.reshape(-1, prompts.shape[-1])


def average_source_tasks(adapter: Adapter) -> Adapter:
    """A start for a target task: the common prompt, and the mean of the tasks' factors.

    Args:
        adapter: of `multitask_prompt_tuning` over source tasks, trained or loaded.

    Returns:
        An adapter of `multitask_prompt_tuning(..., tasks=1)`. Other sites stay as they are.
    """
    return _each(adapter, lambda factor: factor.mean(axis=0, keepdims=True))


def exact_source_task(adapter: Adapter, task: int) -> Adapter:
    """A start for a target task: the common prompt, and the factors of one source task.

    Args:
        adapter: of `multitask_prompt_tuning` over source tasks, trained or loaded.
        task: the source task.

    Returns:
        An adapter of `multitask_prompt_tuning(..., tasks=1)`. Other sites stay as they are.
    """
    return _each(adapter, lambda factor: factor[task][None])


def only_source_shared(adapter: Adapter, fresh: Adapter) -> Adapter:
    """A start for target tasks: the common prompt of source tasks, and fresh factors.

    Args:
        adapter: of `multitask_prompt_tuning` over source tasks, trained or loaded.
        fresh: from `init` of the target tasks' tuning.

    Returns:
        `fresh` with the prompt of `adapter`.
    """
    shared = {path: adapter[path]["prompt"] for path in _sites(adapter)}
    found = {path: {**fresh[path], "prompt": prompt} for path, prompt in shared.items()}
    return Adapter({**fresh, **found}, fresh.sites)


def _sites(adapter: Adapter) -> list[str]:
    found = [path for path, leaves in adapter.items() if {"columns", "rows"} <= set(leaves)]
    if not found:
        raise ValueError(f"the adapter has no multitask prompt at its sites {list(adapter)}.")
    return found


def _each(adapter: Adapter, f: Callable[[Array], Array]) -> Adapter:
    def changed(leaves: Leaves) -> Leaves:
        return {**leaves, **{name: f(leaves[name]) for name in ("columns", "rows")}}

    found = {path: changed(adapter[path]) for path in _sites(adapter)}
    return Adapter({**adapter, **found}, adapter.sites)
