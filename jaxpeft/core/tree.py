"""Trees in parts: `partition` and its inverse `combine`, masks and labels, and paths.

A path is the keys from the root to a leaf joined by "/": `layers/0/attn/kernel`. Flax's own
wrappers around a leaf (the `.value` of an nnx variable, the box of linen metadata) add no key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxpeft.core.rules import Where, compile_pattern, first_match

KeyPath = tuple[Any, ...]


@jax.tree_util.register_static
class Hole:
    """What stands where a leaf went to another part. Not `None`, which may be data."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hole)

    def __hash__(self) -> int:
        return hash(Hole)

    def __repr__(self) -> str:
        return "HOLE"


HOLE = Hole()


def path_of(keys: KeyPath) -> str:
    """A key path as text.

    >>> path_of((jax.tree_util.DictKey("layers"), jax.tree_util.SequenceKey(0)))
    'layers/0'
    """
    if keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
        keys = keys[:-1]
    return "/".join(_key_name(key) for key in keys)


def _key_name(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def leaves_with_paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """`([(path, leaf), ...], treedef)`."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(path_of(keys), leaf) for keys, leaf in pairs], treedef


def map_with_path(f: Callable[[str, Any], Any], tree: Any) -> Any:
    """`f(path, leaf)` at every leaf."""
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: f(path_of(keys), leaf), tree)


def mask(tree: Any, where: Where) -> Any:
    """A tree of booleans: whether each leaf is matched, for `optax.masked`.

    Args:
        tree: any pytree.
        where: a glob over paths ("**/bias"), or a predicate `(path, leaf) -> bool`.

    Returns:
        The same tree with a bool at every leaf.

    Example:
        >>> mask({"kernel": 1.0, "bias": 2.0}, "**/bias")
        {'bias': True, 'kernel': False}
    """
    matches = compile_pattern(where)
    return map_with_path(lambda path, leaf: bool(matches(path, leaf)), tree)


def labels(tree: Any, rules: Iterable[tuple[Where, str]], default: str = "default") -> Any:
    """A tree of labels for `optax.partition`: that of the first rule that matches each leaf.

    Args:
        tree: any pytree, such as an adapter.
        rules: ordered `(pattern, label)` pairs.
        default: the label of leaves that no rule matches.

    Returns:
        The same tree with a string at every leaf.

    Raises:
        ValueError: if a rule matches no leaf.

    Example: LoRA+ trains `b` with a larger step than `a` (Hayou et al. 2024, arXiv:2402.12354).

        >>> labels({"q": {"a": 0.0, "b": 0.0}}, [("**/b", "fast")], default="slow")
        {'q': {'a': 'slow', 'b': 'fast'}}
    """
    pairs, treedef = leaves_with_paths(tree)
    found = first_match(list(rules), pairs)
    return treedef.unflatten([found.get(path, default) for path, _ in pairs])


def partition(tree: Any, where: Where) -> tuple[Any, Any]:
    """Splits a tree in two: `(matched, rest)`, each with `HOLE` where the other has the leaf.

    The inverse of `combine`: `combine(*partition(tree, where))` is `tree`.

    Args:
        tree: any pytree.
        where: a glob over paths, or a predicate `(path, leaf) -> bool`.

    Returns:
        Two trees. A hole is not a leaf, so `jax.grad` and optax see the kept leaves only.

    Example:
        >>> biases, rest = partition({"kernel": 1.0, "bias": 2.0}, "**/bias")
        >>> biases, rest
        ({'bias': 2.0, 'kernel': HOLE}, {'bias': HOLE, 'kernel': 1.0})
        >>> combine(biases, rest)
        {'bias': 2.0, 'kernel': 1.0}
    """
    matches = compile_pattern(where)

    def pick(wanted: bool) -> Any:
        return map_with_path(
            lambda path, leaf: leaf if bool(matches(path, leaf)) is wanted else HOLE, tree
        )

    return pick(True), pick(False)


def combine(*parts: Any) -> Any:
    """Puts the parts of a tree together again, filling the holes. The inverse of `partition`.

    Args:
        *parts: trees of one structure, of which exactly one has a leaf at each place.

    Returns:
        The whole tree.

    Raises:
        ValueError: if a place has no leaf, or more than one.
    """
    if not parts:
        raise ValueError(
            "combine() needs at least one part, as partition(tree, where) returns them."
        )
    return jax.tree_util.tree_map_with_path(_fill, *parts, is_leaf=_is_hole)


def _is_hole(value: Any) -> bool:
    return isinstance(value, Hole)


def _fill(keys: KeyPath, *values: Any) -> Any:
    found = [value for value in values if not _is_hole(value)]
    if len(found) == 1:
        return found[0]
    what = "no part has a leaf" if not found else f"{len(found)} parts have a leaf"
    raise ValueError(f"combine: {what} at {path_of(keys)!r}. Pass the parts of one partition().")
