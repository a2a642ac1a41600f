"""The two products of an attention: which operand is what, and what each of its axes is for.

The axes of the first product's result are *labels*: numbers by which an axis of any other array of
the attention is said to be the same axis. One axis may be several labels, merged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from jaxpeft.core.tap import PER_HEAD

BATCH, TIME, HEADS, GROUP, WIDTH = range(5)

Labels = tuple[int, ...]
Axes = tuple[Labels, ...]


class Order(NamedTuple):
    """How an array's axes become `(batch..., time, heads, width)`; `batch`, `time` are counts."""

    permutation: tuple[int, ...]
    batch: int
    time: int

    def arrange(self, x: jax.Array) -> jax.Array:
        moved = lax.transpose(x, self.permutation)
        first, second = self.batch, self.batch + self.time
        time, heads = math.prod(moved.shape[first:second]), math.prod(moved.shape[second:-1])
        return lax.reshape(moved, (*moved.shape[:first], time, heads, moved.shape[-1]))

    def restore(self, arranged: jax.Array, shape: Sequence[int]) -> jax.Array:
        """An arranged array as it was, when its shape was `shape`."""
        moved = lax.reshape(arranged, [shape[axis] for axis in self.permutation])
        return lax.transpose(moved, np.argsort(self.permutation))


class Attention(NamedTuple):
    """One attention.

    Attributes:
        key: which operand of the first product is the key; the other is the query.
        value: which operand of the second product is the value.
        orders: by kind, how the axes of each array become those of a mark.
        names: the marks' names, by kind.
        place: where its first product is in the program.
    """

    key: int
    value: int
    orders: dict[str, Order]
    names: dict[str, str]
    place: tuple[int, ...] = ()


class Dot(NamedTuple):
    """A `dot_general`, by operand: what it contracts, its batch axes, its other axes in the result.

    `kept` has the batch axes too; `shapes` has the result's last.
    """

    contract: Any
    batch: Any
    kept: tuple[dict[int, int], dict[int, int]]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, eqn: Any) -> Dot:
        contract, batch = eqn.params["dimension_numbers"]
        shapes = tuple(atom.aval.shape for atom in (*eqn.invars, *eqn.outvars))
        free = [
            [
                axis
                for axis in range(len(shapes[side]))
                if axis not in (*contract[side], *batch[side])
            ]
            for side in (0, 1)
        ]
        starts = len(batch[0]), len(batch[0]) + len(free[0])
        left, right = (
            dict(zip(batch[side], range(len(batch[0])), strict=True))
            | {axis: starts[side] + i for i, axis in enumerate(free[side])}
            for side in (0, 1)
        )
        return cls(contract, batch, (left, right), shapes)

    def free(self, side: int) -> list[int]:
        return sorted(axis for axis in self.kept[side] if axis not in self.batch[side])

    def labels(self, side: int) -> Axes:
        kept = self.kept[side]
        return tuple((kept[a],) if a in kept else () for a in range(len(self.shapes[side])))


def match(first: Any, second: Any, side: int, weights: Axes) -> Attention | None:
    """The attention of two products; the second's operand `side` has the axes `weights`.

    None if the second one does not contract an axis of the first, or an axis has no clear part.
    """
    scores, sums = Dot.of(first), Dot.of(second)
    value = 1 - side
    free = sums.free(value)
    if not len(scores.contract[0]) == len(sums.contract[0]) == len(free) == 1:
        return None
    label = weights[sums.contract[side][0]]
    keys = [i for i in (0, 1) if [(scores.kept[i][axis],) for axis in scores.free(i)] == [label]]
    if not keys:
        return None
    at = keys[0]
    if sums.shapes[side][sums.contract[side][0]] != scores.shapes[2][label[0]]:
        return None
    roles = _roles(scores, at)
    given, context = _second(sums, side, weights)
    orders = {
        "query": _order(
            scores.labels(1 - at), scores.contract[1 - at][0], scores.shapes[1 - at], roles
        ),
        "key": _order(scores.labels(at), scores.contract[at][0], scores.shapes[at], roles),
        "value": _order(given, free[0], sums.shapes[value], roles),
        "context": _order(context, sums.kept[value][free[0]], sums.shapes[2], roles),
    }
    clear = {kind: order for kind, order in orders.items() if order}
    return Attention(at, value, clear, {}) if len(clear) == len(PER_HEAD) else None


def _second(sums: Dot, side: int, weights: Axes) -> tuple[Axes, Axes]:
    """The labels of the second product's other operand and of its result."""
    mine, other = ((*sums.batch[i], *sums.contract[i]) for i in (side, 1 - side))
    partner = dict(zip(other, mine, strict=True))
    source = {out: axis for axis, out in sums.kept[side].items()}
    given, context = (
        tuple(weights[axes[a]] if a in axes else () for a in range(len(shape)))
        for axes, shape in ((partner, sums.shapes[1 - side]), (source, sums.shapes[2]))
    )
    return given, context


def _roles(scores: Dot, at: int) -> dict[int, int]:
    """What each label is for, as far as it is clear; operand `at` is the key.

    The heads are the key's last batch axis: of `(B, S, K, H)`, of `(B, K, S, H)`, of `(S, K, H)`.
    A batch axis in front of all else, as in `(B, S, H)`, is no heads.
    """
    roles = dict.fromkeys(range(len(scores.batch[0])), BATCH)
    time, last = scores.free(at)[0], max(scores.batch[at], default=-1)
    roles[scores.kept[at][time]] = TIME
    heads = scores.kept[at][last] if len(scores.shapes[at]) > 3 or last > time else None
    if heads is not None:
        roles[heads] = HEADS
    kept, free = scores.kept[1 - at], scores.free(1 - at)
    group = _group(scores, at, heads) if len(free) == 2 else None
    if len(free) == 1 or group is not None:
        roles |= {kept[axis]: GROUP if axis == group else TIME for axis in free}
    return roles


def _group(scores: Dot, at: int, heads: int | None) -> int | None:
    """Which of the query's two free axes is query heads: those of one key head, or all of them."""
    kept, free = scores.kept[1 - at], scores.free(1 - at)
    if heads is not None:
        after = 1 + next(axis for axis, label in kept.items() if label == heads)
        return after if after in free else None
    length = scores.shapes[at][scores.free(at)[0]]
    as_long = [scores.shapes[1 - at][axis] == length for axis in free]
    return free[0] if as_long == [False, True] else free[1]


def _order(axes: Axes, width: int, shape: Sequence[int], roles: dict[int, int]) -> Order | None:
    ranks = []
    for axis, labels in enumerate(axes):
        kinds = {roles.get(label, WIDTH) for label in labels}
        if axis == width:
            ranks.append((WIDTH, 0))
        elif not labels and shape[axis] == 1:
            ranks.append((GROUP, 0))
        elif WIDTH in kinds or not (len(kinds) == 1 or kinds == {HEADS, GROUP}):
            return None
        else:
            ranks.append((min(kinds), min(labels)))
    permutation = tuple(sorted(range(len(axes)), key=ranks.__getitem__))
    counts = [kind for kind, _ in ranks]
    return Order(permutation, counts.count(BATCH), counts.count(TIME))
