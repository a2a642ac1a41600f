"""Work on large arrays a chunk at a time, in place; the host's are fetched and put back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from jaxpeft.core.memory import as_in, on_host, to_device
from jaxpeft.core.sharding import automatic, explicit

Array = jax.Array

# Elements of a chunk on each device, of which an update holds some ten buffers; and of an array
# that is one chunk. Larger ones are at least two, because a loop works in place.
SIZE, SMALL = 2**21, 2**18
# A TPU moves whole tiles: of 8 rows of 32 bits, 16 of 16 or 32 of 8, and 128 columns.
BYTES, COLUMNS = 32, 128


def in_chunks(
    step: Callable[..., Sequence[Array]],
    arrays: Sequence[Array],
    others: Sequence[Array] = (),
    scalars: Sequence[Array] = (),
) -> list[Array]:
    """`step(arrays, others, scalars)`, of large arrays a chunk after another.

    Args:
        step: gives a new array for each of `arrays`, of its shape and dtype, where what has an
            index of the leading axes depends on nothing of another one.
        arrays: what is replaced, in its own memory where the program lets it. All have the same
            leading axes, and any last one; so have the `others`.
        others: what is read as well.
        scalars: what `step` is given whole.

    Returns:
        The new arrays, in the memory (the device's, or the host's) of the old ones.

    Example:
        >>> import jax.numpy as jnp
        >>> double = lambda arrays, others, scalars: [x * scalars[0] for x in arrays]
        >>> in_chunks(double, [jnp.ones(3)], scalars=[jnp.float32(2)])[0].tolist()
        [2.0, 2.0, 2.0]
    """
    cut = cut_of([*arrays, *others])

    def run(arrays: Any, others: Any, scalars: Any) -> Any:
        if cut is None:
            return as_in(list(step(*to_device((arrays, others)), scalars)), arrays)
        return _looped(step, cut, arrays, others, scalars)

    shardings = [explicit(x) for x in arrays]
    return automatic(run, shardings, list(arrays), list(others), list(scalars))


def cut_of(arrays: Sequence[Array]) -> Cut | None:
    """How arrays of the same leading axes are cut, which depends on where they are, too."""
    tile = BYTES // min(x.dtype.itemsize for x in arrays)
    return Cut.of(max(arrays, key=lambda x: x.size).shape, tile, exact=any(map(on_host, arrays)))


class Cut(NamedTuple):
    """How arrays are cut: into `step` rows at a time of one axis.

    Attributes:
        lead: the leading axes.
        axis: the one that is cut.
        pieces: equal parts of that axis, as many as devices can split it in. A chunk takes rows of
            each, so that none has to move to another device.
        step: rows of each piece in a chunk.
    """

    lead: tuple[int, ...]
    axis: int
    pieces: int
    step: int

    @classmethod
    def of(cls, shape: Sequence[int], tile: int = 8, *, exact: bool = False) -> Cut | None:
        """The cut of an array into chunks of whole tiles; None if it is to stay whole.

        An exact one, for arrays of the host, leaves no rest, since XLA fetches all of an array for
        a slice of it that is not in a loop.

        Example:
            >>> Cut.of((64, 768)) is None
            True
            >>> cut = Cut.of((2**18, 768), exact=True)
            >>> cut.axis, cut.rows % cut.step
            (0, 0)
        """
        devices, size, lead = jax.device_count(), math.prod(shape), tuple(shape[:-1])
        if size <= SMALL * devices:
            return None
        room = min(SIZE * devices, size // 2)
        several = [cls._at(lead, i, shape[-1], room, tile, exact) for i in range(len(lead))]
        cuts = sorted(filter(None, several), key=lambda cut: cut.size(shape))
        fitting = [cut for cut in several if cut and cut.size(shape) <= room]
        return next(iter([*fitting, *cuts]), None)

    @classmethod
    def _at(
        cls, lead: tuple[int, ...], axis: int, columns: int, room: int, tile: int, exact: bool
    ) -> Cut | None:
        """The cut of an axis into chunks as large as they may be."""
        inner = axis == len(lead) - 1
        pieces = math.gcd(lead[axis], jax.device_count())
        rows, least = lead[axis] // pieces, tile if inner else 1
        if rows <= least or (inner and columns < COLUMNS):
            return None
        row = math.prod(lead) // rows * columns
        most = min(max(room // (row * least), 1), rows // least)
        steps = range(most * least, 0, -least)
        step = next((n for n in steps if rows % n == 0), None) if exact else most * least
        return cls(lead, axis, pieces, step) if step else None

    @property
    def rows(self) -> int:
        """Rows of a piece."""
        return self.lead[self.axis] // self.pieces

    def size(self, shape: Sequence[int]) -> int:
        return math.prod(shape) // self.rows * self.step

    def split(self, x: Array) -> Array:
        """An array with its pieces, if there are several, on an axis in front of their rows'."""
        before, after = self.lead[: self.axis], self.lead[self.axis + 1 :]
        pieces = [self.pieces] if self.pieces > 1 else []
        return x.reshape(*before, *pieces, self.rows, *after, x.shape[-1])


def _looped(
    step: Any, cut: Cut, arrays: list[Array], others: list[Array], scalars: list[Array]
) -> list[Array]:
    axis = cut.axis + (cut.pieces > 1)
    read = [cut.split(x) for x in others]

    def at(start: Any, rows: int, carry: list[Array]) -> list[Array]:
        take = lambda x: lax.dynamic_slice_in_dim(x, start, rows, axis)  # noqa: E731
        old, seen = to_device(([take(x) for x in carry], [take(x) for x in read]))
        new = as_in(list(step(old, seen, scalars)), carry)
        put = lambda x, y: lax.dynamic_update_slice_in_dim(x, y, start, axis)  # noqa: E731
        return [put(x, y) for x, y in zip(carry, new, strict=True)]

    count, rest = divmod(cut.rows, cut.step)
    carry = [cut.split(x) for x in arrays]
    carry = lax.fori_loop(0, count, lambda i, carry: at(i * cut.step, cut.step, carry), carry)
    if rest:
        carry = at(cut.rows - rest, rest, carry)
    return [x.reshape(y.shape) for x, y in zip(carry, arrays, strict=True)]
