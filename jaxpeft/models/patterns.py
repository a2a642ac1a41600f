"""Regular expressions that a file brings along, matched in bounded time and memory."""

import functools
import math
import re
from typing import Any

import regex

LENGTH, REPEATS, SECONDS = 1000, 1000, 0.5


def fits(pattern: Any, name: str) -> bool:
    """Whether a pattern of a configuration fits a module's name from its start, as `re.match`.

    Args:
        pattern: from a file.
        name: of a module.

    Returns:
        Whether it fits.

    Raises:
        ValueError: it is no pattern, longer than anybody writes them, or does not come to an end.

    Example:
        >>> fits(r".*self_attn\\.(q|k)_proj$", "model.layers.0.self_attn.q_proj")
        True
    """
    if not isinstance(pattern, str) or len(pattern) > LENGTH:
        raise ValueError(f"{pattern!r:.80} is no regular expression of up to {LENGTH} characters.")
    try:
        return _compiled(pattern).match(name, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise ValueError(
            f"the pattern {pattern!r:.80} takes over {SECONDS:g} seconds for {name!r:.80}. Write "
            "it without repetitions inside repetitions."
        ) from error


@functools.lru_cache
def _compiled(pattern: str) -> Any:
    """The pattern, if it is one for `re` too: others may call themselves without an end."""
    counts = (int(n) for part in re.findall(r"\{([\d,]+)\}", pattern) for n in part.split(",") if n)
    if math.prod(max(n, 1) for n in counts) > REPEATS:
        raise ValueError(f"the pattern {pattern!r:.80} repeats a part over {REPEATS} times.")
    try:
        re.compile(pattern)
        return regex.compile(pattern)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r:.80} is no regular expression: {error}.") from error
