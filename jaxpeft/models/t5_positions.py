"""Relative positions of T5."""

import functools

import numpy as np


@functools.cache
def distance_buckets(buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each distance from 0 to `max_distance`: exact ones, then ever wider ones.

    With `n` buckets, distances below `m = n // 2` have their own; from there on
    `m + floor((n - m) log(d / m) / log(max_distance / m))`, at most `n - 1`.

    Args:
        buckets: how many there are for one direction.
        max_distance: the first distance that is sure to fall into the last bucket.

    Returns:
        `int32[max_distance + 1]`.

    Example:
        >>> distance_buckets(4, 8).tolist()
        [0, 1, 2, 2, 3, 3, 3, 3, 3]
    """
    exact = buckets // 2
    distance = np.arange(max_distance + 1)
    # In numpy, not on the device, whose logarithm may round a power of two to the wrong side.
    share = np.log(np.maximum(distance, exact) / exact) / np.log(max_distance / exact)
    wide = np.minimum(exact + (share * (buckets - exact)).astype(np.int32), buckets - 1)
    return np.where(distance < exact, distance, wide).astype(np.int32)
