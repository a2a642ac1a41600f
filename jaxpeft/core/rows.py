"""A table with more rows than the model knows of, which virtual tokens look up."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core.labels import View
from jaxpeft.core.structured import Contraction, Structured, apply_view, contract, dense, node

Array = jax.Array


@node
@dataclasses.dataclass(frozen=True, eq=False)
class Rows(Structured):
    """`table`, where ids from its end on look up `rows`: id `size + i` gives `rows[i]`.

    To anything but a lookup of rows it is the table: it has the table's shape, and a tied output
    head has no logits for the added rows.
    """

    table: Any
    rows: Array

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.table.shape

    @property
    def dtype(self) -> Any:
        return self.table.dtype

    @property
    def start(self) -> int:
        """The id of the first row that was added here."""
        return self.table.end if isinstance(self.table, Rows) else self.shape[0]

    @property
    def end(self) -> int:
        return self.start + self.rows.shape[0]

    def materialize(self, dtype: Any = None) -> Array:
        return dense(self.table, dtype)

    def view(self, view: View) -> Any:
        # A view of another shape (the head's transpose) is the table's own, and may be an array.
        table = apply_view(self.table, view)
        return Rows(table, self.rows) if view.kind == "convert" and table is not None else table

    def contract(self, op: Contraction) -> Array | None:
        found = contract(self.table, op)
        if op.kind != "gather" or found is None:
            return found
        indices = op.others[0]
        _check(op, found, indices)
        which = indices[..., 0] - self.start
        rows = jnp.take(self.rows, which, axis=0, mode="clip").astype(found.dtype)
        added = (which >= 0) & (which < self.rows.shape[0])
        return jnp.where(added[..., None], rows, found)


def _check(op: Contraction, found: Array, indices: Array) -> None:
    dims = op.params["dimension_numbers"]
    row = tuple(dims.start_index_map) == (0,) and tuple(dims.collapsed_slice_dims) == (0,)
    if not row or tuple(dims.offset_dims) != (found.ndim - 1,) or indices.shape[-1] != 1:
        raise ValueError(
            "a table with virtual tokens is looked up in a way that is not one row an id. "
            "Use prefix tuning, which does not touch the embedding."
        )
