"""Arrays in batches of one shape, in an order that is a function of the seed alone."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

WEIGHT = "weight"


class Rows:
    """Arrays of equally many rows as an endless sequence of batches, for `fit` and `compare`.

    `rows(position)` for `position = 0, 1, 2, ...` is a dict with `batch_size` rows of each array,
    and `weight` (batch_size,) float32, 1 for a real row. Each epoch is a new permutation, in which
    every row comes once; its last batch is filled up with rows of weight 0.

    `len(rows)` is the number of batches in an epoch; iterating gives epoch 0, once.

    Args:
      arrays: by name, each (rows, ...).
      batch_size: rows in a batch.
      seed: of the permutations; None keeps the given order, every epoch.

    Raises:
      ValueError: if there are no rows, or the arrays have different numbers of them.

    Example:
      >>> rows = Rows({"x": np.arange(5)}, batch_size=3, seed=None)
      >>> len(rows), [(batch["x"].tolist(), batch["weight"].tolist()) for batch in rows]
      (2, [([0, 1, 2], [1.0, 1.0, 1.0]), ([3, 4, 3], [1.0, 1.0, 0.0])])
    """

    def __init__(self, arrays: Mapping[str, Any], batch_size: int, *, seed: int | None = 0):
        self.arrays = {name: np.asarray(array) for name, array in arrays.items()}
        counts = {name: len(array) for name, array in self.arrays.items()}
        if len(set(counts.values())) != 1 or not min(counts.values()):
            raise ValueError(f"arrays have {counts} rows. Give all of them the same, one or more.")
        self.count, self.batch_size, self.seed = min(counts.values()), batch_size, seed

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self(i) for i in range(len(self)))

    def __call__(self, position: int) -> dict[str, np.ndarray]:
        epoch, index = divmod(position, len(self))
        order = self._order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        weight = (np.arange(self.batch_size) < len(order)).astype(np.float32)
        filled = np.append(order, np.repeat(order[:1], self.batch_size - len(order)))
        return {name: array[filled] for name, array in self.arrays.items()} | {WEIGHT: weight}

    def _order(self, epoch: int) -> np.ndarray:
        if self.seed is None:
            return np.arange(self.count)
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)

    def fingerprint(self) -> str:
        """A hash of all that the batches depend on, to tell one data set from another."""
        digest = hashlib.sha256(repr((self.batch_size, self.seed)).encode())
        for name, array in sorted(self.arrays.items()):
            digest.update(f"{name} {array.dtype} {array.shape};".encode() + array.tobytes())
        return digest.hexdigest()[:16]
