"""Where methods go: ordered `(pattern, method)` rules over paths, first match wins."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

Predicate: TypeAlias = Callable[[str, Any], bool]
Where: TypeAlias = str | Predicate


class Rules(NamedTuple):
    """Ordered `(pattern, tuning)` pairs."""

    pairs: tuple[tuple[Where, Any], ...]


class Chain(NamedTuple):
    """Several tunings of the same sites, in order."""

    tunings: tuple[Any, ...]


def rules(*pairs: tuple[Where, Any]) -> Rules:
    """Says which method goes where; for each parameter the first rule that fits wins.

    A rule fits a parameter if its pattern matches the path and its method can work there (LoRA
    passes over biases, which no product uses). A rule that fits nothing is an error.

    Args:
        *pairs: `(pattern, method)`. A pattern is a glob over the parameter's path (`*` within a
            level, `**` across levels, none included, `{a,b}` for alternatives), or a predicate
            `(path, site) -> bool`.

    Returns:
        A tuning for `jaxpeft.transform`.

    Raises:
        TypeError: if a pair is not `(pattern, method)`.

    Example:
        >>> import jaxpeft as jp
        >>> tuning = jp.rules(("**/{q,v}_proj/**", jp.lora(8)), ("**/norm*/**", jp.full()))
    """
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2):
            raise TypeError(
                f"rules() takes (pattern, method) pairs, got {pair!r}. "
                'Write rules(("**/q_proj/**", lora(8)), ...).'
            )
        compile_pattern(pair[0])
    return Rules(tuple(pairs))


def chain(*tunings: Any) -> Chain:
    """Applies several tunings to the same sites: the second works on the first one's weights.

    Args:
        *tunings: methods or rules. At each site the methods that fit are applied in this order.

    Returns:
        A tuning for `jaxpeft.transform`, whose adapter has one dict a tuning: "0", "1", ...

    Example:
        >>> import jaxpeft as jp
        >>> both = jp.chain(jp.lora(8), jp.lora(2, alpha=16))
    """
    return Chain(tuple(tunings))


def compile_pattern(where: Where) -> Predicate:
    """The predicate of a glob (a predicate is returned as it is).

    >>> matches = compile_pattern("**/{q,v}_proj/**")
    >>> matches("layers/0/q_proj/kernel", None), matches("layers/0/k_proj/kernel", None)
    (True, False)
    """
    if callable(where):
        return where
    if not isinstance(where, str):
        raise TypeError(f"a pattern is a glob or a predicate (path, leaf) -> bool, got {where!r}.")
    expression = re.compile(_regex(where))
    return lambda path, leaf: expression.fullmatch(path) is not None


@functools.lru_cache(maxsize=1024)
def _regex(glob: str) -> str:
    """A glob as a regular expression over paths; `**` stands for any number of levels."""
    if not glob or glob.startswith("/"):
        raise ValueError(f"pattern {glob!r}: paths have no leading '/'. Write '**/name/**'.")
    levels = glob.split("/")
    text = ""
    for i, level in enumerate(levels):
        last = i == len(levels) - 1
        if level == "**":
            text = text.removesuffix("/") + "(?:/.*)?" if last and i else text
            text += ".*" if last and not i else "" if last else "(?:[^/]+/)*"
        else:
            text += _level(level) + ("" if last else "/")
    return text


def _level(level: str) -> str:
    parts = re.split(r"(\*|\?|\{[^{}]*\})", level)
    return "".join(_part(part) for part in parts)


def _part(part: str) -> str:
    if part == "*":
        return "[^/]*"
    if part == "?":
        return "[^/]"
    if part.startswith("{") and part.endswith("}"):
        return "(?:" + "|".join(_level(choice) for choice in part[1:-1].split(",")) + ")"
    return re.escape(part)


def first_match(
    pairs: Sequence[tuple[Where, Any]], leaves: Iterable[tuple[str, Any]]
) -> dict[str, Any]:
    """For each path the value of the first pair that matches; one that matches none is an error."""
    leaves = list(leaves)
    matchers = [(where, compile_pattern(where), value) for where, value in pairs]
    for where, matches, _ in matchers:
        if not any(matches(path, leaf) for path, leaf in leaves):
            raise ValueError(unmatched(where, [path for path, _ in leaves]))
    found = {}
    for path, leaf in leaves:
        hit = next((value for _, matches, value in matchers if matches(path, leaf)), None)
        if hit is not None:
            found[path] = hit
    return found


def unmatched(
    where: Where, paths: Sequence[str], what: str = "leaves", option: str = "where"
) -> str:
    """The message for a rule that fits nothing: what was given, what is near, what to call."""
    if not isinstance(where, str):
        return f"the predicate {where!r} matched none of the {len(paths)} {what}."
    near = nearest(where, paths)
    hint = f" Nearest: {', '.join(map(repr, near))}." if near else ""
    return (
        f"{option}={where!r} matched none of the {len(paths)} {what}.{hint} "
        "Use `tuned.sites(params, *inputs)` to list them."
    )


def nearest(where: str, paths: Sequence[str], count: int = 3) -> list[str]:
    """The paths most like a pattern, read without its wildcards."""
    plain = re.sub(r"/+", "/", re.sub(r"[*?{}]+", "", where)).strip("/")
    levels = plain.count("/") + 1

    def likeness(path: str) -> float:
        keys = path.split("/")
        ends = ("/".join(keys[i : i + levels]) for i in range(max(len(keys) - levels, 0) + 1))
        return max(difflib.SequenceMatcher(None, plain, end).ratio() for end in ends)

    return sorted(paths, key=lambda path: -likeness(path))[:count]
