"""Examples in batches of few shapes, in an order that is a function of the seed alone."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

_WINDOW = 64  # batches whose examples are sorted by length together


class Example(NamedTuple):
    """One sequence.

    Attributes:
      tokens: `[length]` int32.
      targets: `[length]` bool, True for the tokens to learn.
    """

    tokens: np.ndarray
    targets: np.ndarray


class Batch(NamedTuple):
    """Rows of equal length, padded on the right.

    Attributes:
      tokens: `[batch, length]` int32, 0 where there is padding.
      mask: `[batch, length]` bool, True for real tokens.
      targets: `[batch, length]` bool, True for the tokens to learn.
    """

    tokens: Any
    mask: Any
    targets: Any


def bucket_lengths(longest: int, n: int = 4, multiple: int = 16) -> tuple[int, ...]:
    """The few lengths that batches are padded to: `longest` halved again and again.

    Args:
      longest: the largest number of tokens in an example.
      n: at most that many lengths, each of which costs one compilation.
      multiple: each length is rounded up to a multiple of this.

    Returns:
      Increasing lengths, the last of them at least `longest`.

    Example:
      >>> bucket_lengths(500)
      (64, 128, 256, 512)
    """
    halves = (longest / 2**i for i in range(n))
    return tuple(sorted({multiple * max(1, -int(-h // multiple)) for h in halves}))


def pad(examples: Sequence[Example], length: int) -> Batch:
    """Stacks examples, padded on the right to `length`.

    Args:
      examples: none longer than `length`.
      length: number of columns.

    Returns:
      A `Batch` of numpy arrays.

    Example:
      >>> import numpy as np
      >>> batch = pad([Example(np.array([7, 8]), np.array([False, True]))], 3)
      >>> batch.tokens.tolist(), batch.mask.tolist(), batch.targets.tolist()
      ([[7, 8, 0]], [[True, True, False]], [[False, True, False]])
    """
    shape = (len(examples), length)
    batch = Batch(np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, bool))
    for row, (tokens, targets) in enumerate(examples):
        batch.tokens[row, : len(tokens)] = tokens
        batch.mask[row, : len(tokens)] = True
        batch.targets[row, : len(tokens)] = targets
    return batch


class Batches:
    """An endless sequence of batches: `batches(position)` for `position = 0, 1, 2, ...`

    A batch is a pure function of the examples, the seed and its position, so a run continues
    from a step number and nothing else. Each epoch is a new permutation in which every example
    comes once; examples of like length share a batch, to pad little. Where the batch size does
    not divide the number of examples, one batch an epoch is filled with repeated rows that have
    no target, so they weigh nothing.

    `len(batches)` is the number of batches in an epoch; iterating gives epoch 0, once.

    Args:
      examples: the examples.
      batch_size: rows in a batch.
      seed: seed of the permutations; None keeps the given order, every epoch.
      lengths: the lengths to pad to, increasing; by default `bucket_lengths` of the longest.

    Raises:
      ValueError: if there are no examples, or one is longer than the last of `lengths`.

    Example:
      >>> import numpy as np
      >>> rows = [Example(np.full(n, n), np.ones(n, bool)) for n in (3, 20, 5)]
      >>> batches = Batches(rows, batch_size=2, seed=0)
      >>> len(batches), batches(0).tokens.shape[0]
      (2, 2)
      >>> bool((batches(7).tokens == batches(7).tokens).all())
      True
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        *,
        seed: int | None = 0,
        lengths: Sequence[int] = (),
    ):
        if not examples:
            raise ValueError("there are 0 examples, so no batch can be made. Give at least one.")
        longest = max(len(e.tokens) for e in examples)
        self.lengths = tuple(lengths) or bucket_lengths(longest)
        if longest > self.lengths[-1]:
            raise ValueError(
                f"the longest example has {longest} tokens but lengths={self.lengths}. "
                f"Add a length of at least {longest}, or encode with "
                f"max_length={self.lengths[-1]}."
            )
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self._buckets = np.searchsorted(self.lengths, [len(e.tokens) for e in examples])
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return (self(i) for i in range(len(self)))

    def __call__(self, position: int) -> Batch:
        epoch, index = divmod(position, len(self))
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        rows = self._epoch[1][index]
        real = [self.examples[i] for i in rows if i >= 0]
        tokens, targets = real[0]
        filler = Example(tokens, np.zeros_like(targets))
        length = self.lengths[max(self._buckets[i] for i in rows if i >= 0)]
        return pad(real + [filler] * (len(rows) - len(real)), length)

    def _order(self, epoch: int) -> np.ndarray:
        """`[batches, batch_size]` indices of examples, -1 for filling."""
        order = np.arange(len(self.examples))
        if self.seed is None:
            return self._rows(order)
        rng = np.random.default_rng([self.seed, epoch])
        order, window = rng.permutation(order), _WINDOW * self.batch_size
        parts = np.split(order, range(window, len(order), window))
        order = np.concatenate([p[np.argsort(self._buckets[p], kind="stable")] for p in parts])
        return rng.permutation(self._rows(order))

    def _rows(self, order: np.ndarray) -> np.ndarray:
        fill = np.full(len(self) * self.batch_size - len(order), -1)
        return np.concatenate([order, fill]).reshape(-1, self.batch_size)

    def fingerprint(self) -> str:
        """A hash of all that the batches depend on, to tell one data set from another."""
        digest = hashlib.sha256(repr((self.batch_size, self.seed, self.lengths)).encode())
        for tokens, targets in self.examples:
            digest.update(np.asarray(tokens, np.int32).tobytes() + b"|")
            digest.update(np.asarray(targets, bool).tobytes() + b"|")
        return digest.hexdigest()[:16]
