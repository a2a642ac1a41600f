"""Position embeddings for images of another size than the model was trained on."""

import jax.numpy as jnp
import numpy as np
from jax import Array


def resize_grid(table: Array, size: tuple[int, int]) -> Array:
    """Bicubic interpolation of `[H, W, D]` to `[*size, D]`, as torch does it.

    Args:
        table: values on a grid, corners at the corners of the pixels (`align_corners=False`).
        size: height and width of the new grid.

    Returns:
        The new grid. The cubic kernel is that of Keys 1981 with `a = -0.75`; beyond the edges the
        outermost values go on.

    Example:
        >>> resize_grid(jnp.arange(4.0).reshape(2, 2, 1), (3, 3)).shape
        (3, 3, 1)
    """
    rows, columns = (cubic_matrix(n, m) for n, m in zip(table.shape[:2], size, strict=True))
    wide = jnp.einsum("hi,wj,ijd->hwd", rows, columns, table.astype(jnp.float32))
    return wide.astype(table.dtype)


def cubic_matrix(given: int, wanted: int) -> np.ndarray:
    """`float32[wanted, given]`, which interpolates a row of values; see `resize_grid`."""
    centers = (np.arange(wanted) + 0.5) * given / wanted - 0.5
    first = np.floor(centers).astype(int)
    matrix = np.zeros((wanted, given))
    for offset in (-1, 0, 1, 2):
        near = np.clip(first + offset, 0, given - 1)
        np.add.at(matrix, (np.arange(wanted), near), _keys(centers - first - offset))
    return matrix.astype(np.float32)


def _keys(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    t = np.abs(distance)
    inner = (a + 2) * t**3 - (a + 3) * t**2 + 1
    outer = a * (t**3 - 5 * t**2 + 8 * t - 4)
    return np.where(t <= 1, inner, np.where(t < 2, outer, 0.0))
