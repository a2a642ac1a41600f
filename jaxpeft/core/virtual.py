"""Virtual tokens: a call with placeholders in front of its tokens, and its outputs without them.

Prompt and prefix methods keep the model as it is. Its token ids, masks and positions are
lengthened before the call, a method gives the placeholders their meaning inside, and what the
placeholders added to the outputs is cut off again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

# Argument names of models in the wild; those of a decoder behind an encoder have a prefix.
TOKENS = ("tokens", "input_ids", "inputs", "ids", "token_ids", "input_tokens", "last_tokens", "x")
MASKS = ("mask", "attention_mask", "padding_mask", "input_mask", "attn_mask", "pad_mask")
POSITIONS = ("positions", "position_ids", "pos", "input_positions", "segment_pos")
DECODER = "decoder_"
MODES = ("cut", "keep", "held")


class Virtual(NamedTuple):
    """The virtual tokens of a method.

    Attributes:
        length: tokens in front of each sequence.
        rows: rows that the method adds to the table of the embedding: `length` a task. None for
            placeholders whose embedding does not matter.
        task: the keyword argument of `apply` that chooses among the rows, `int32[B]`; "" for none.
        names: the model's arguments, where they have unusual names: `(("tokens", name), ...)` with
            keys "tokens", "mask" and "positions".
        both: whether the tokens of a decoder behind an encoder are lengthened too.
        place: "front" of the sequence; "back", behind it; "beside" it, which leaves the sequence as
            it is: only the keys and values of attentions are longer, in models that provide for
            it; "" for "beside" in those models, and "front" in others.
        shift: whether tokens move on by as many positions where virtual tokens are "beside" them;
            "queries" where a model counts the positions of queries apart, and these move on too.
    """

    length: int
    rows: int | None = None
    task: str = ""
    names: tuple[tuple[str, str], ...] = ()
    both: bool = False
    place: str = ""
    shift: bool | str = False

    def beside(self, provided: bool) -> bool:
        """Whether the sequence stays as it is, in a model that provides for it or not."""
        wanted = self.place == "beside" or (self.place == "" and self.rows is None)
        if self.place == "beside" and not provided:
            raise ValueError(
                'place="beside" is for models whose attentions take longer keys, which this one '
                'does not declare. Use place="front", or "back" for an encoder.'
            )
        return wanted and provided


class Front(NamedTuple):
    """One block of virtual tokens in a call: its `Virtual`, and the id of the first added row."""

    virtual: Virtual
    start: int


@dataclasses.dataclass(frozen=True)
class Lengthened:
    """`fn` with virtual tokens; called with the ids' choices by name in front of the inputs."""

    fn: Callable[..., Any]
    fronts: tuple[Front, ...]
    names: tuple[str, ...]
    cut: bool

    def __call__(self, params: Any, chosen: Mapping[str, Any], *inputs: Any, **kwargs: Any) -> Any:
        positional = dict(enumerate(self.names))
        named = {positional.get(i, str(i)): value for i, value in enumerate(inputs)} | kwargs
        longer = lengthen(named, self.fronts, chosen)
        outs = self.fn(
            params,
            *(longer[positional.get(i, str(i))] for i in range(len(inputs))),
            **{name: longer[name] for name in kwargs},
        )
        if not self.cut:
            return outs
        short = jax.eval_shape(lambda p: self.fn(p, *inputs, **kwargs), params)
        return jax.tree.map(functools.partial(cut, behind=_count(self.fronts, "back")), outs, short)


def cut(long: Any, short: Any, behind: int) -> Any:
    """`long` without what it has more than `short` along its axes, `behind` of it at the end."""
    if not isinstance(long, jax.Array) or long.shape == short.shape:
        return long
    starts = [max(a - b - behind, 0) for a, b in zip(long.shape, short.shape, strict=True)]
    return long[tuple(slice(i, i + n) for i, n in zip(starts, short.shape, strict=True))]


def _count(fronts: Sequence[Front], place: str) -> int:
    """Virtual tokens behind the sequence, or in front of it."""
    counts = (f.virtual.length for f in fronts if (f.virtual.place == "back") == (place == "back"))
    return sum(counts)


def lengthen(
    named: Mapping[str, Any], fronts: Sequence[Front], chosen: Mapping[str, Any]
) -> dict[str, Any]:
    """A model's inputs by name, with the virtual tokens in front."""
    given = dict(kv for front in fronts for kv in front.virtual.names)
    first = _group(named, "", given)
    if first["tokens"] is None and _group(named, DECODER, {})["tokens"] is None:
        raise ValueError(
            f"none of the model's inputs {sorted(named)} is known to hold the tokens. Name it: "
            'names={"tokens": "..."}, and "mask" and "positions" where the model has them.'
        )
    longer = dict(named)
    for group, blocks in (
        (first, fronts),
        (_group(named, DECODER, {}), [front for front in fronts if front.virtual.both]),
    ):
        if group["tokens"] is not None and blocks:
            longer |= _lengthened(named, group, blocks, chosen)
    return longer


def tokens_of(named: Mapping[str, Any], fronts: Sequence[Front]) -> Any:
    """The token ids among a model's inputs by name, or None."""
    found = _group(named, "", dict(kv for front in fronts for kv in front.virtual.names))["tokens"]
    return None if found is None else named[found]


def _group(named: Mapping[str, Any], prefix: str, given: Mapping[str, str]) -> dict[str, Any]:
    """Which inputs are the tokens, the mask and the positions of one sequence."""
    kinds = {"tokens": TOKENS, "mask": MASKS, "positions": POSITIONS}
    found = {}
    for kind, usual in kinds.items():
        names = (given[kind],) if kind in given else tuple(prefix + name for name in usual)
        there = (name for name in names if named.get(name) is not None)
        found[kind] = next((n for n in there if kind != "tokens" or _is_ids(named[n])), None)
    if found["tokens"] is None and not prefix and "tokens" not in given:
        found["tokens"] = next((n for n, v in named.items() if n.isdigit() and _is_ids(v)), None)
    return found


def _is_ids(value: Any) -> bool:
    is_array = hasattr(value, "dtype") and hasattr(value, "shape") and len(value.shape) > 0
    return is_array and jnp.issubdtype(value.dtype, jnp.integer)


def _lengthened(
    named: Mapping[str, Any],
    group: Mapping[str, Any],
    fronts: Sequence[Front],
    chosen: Mapping[str, Any],
) -> dict[str, Any]:
    tokens = named[group["tokens"]]
    front, back = _count(fronts, "front"), _count(fronts, "back")
    longer = {group["tokens"]: _with_ids(tokens, fronts, chosen)}
    if group["mask"]:
        mask = named[group["mask"]]
        longer[group["mask"]] = lengthened_mask(mask, tokens.shape[-1], front, back)
    if group["positions"]:
        longer[group["positions"]] = _positions(named[group["positions"]], front, back)
    for name, value in named.items():
        # Segment ids and the like: whatever else has one integer a token.
        alike = _is_ids(value) and value.shape == tokens.shape and name not in group.values()
        if alike and name.startswith(DECODER) == group["tokens"].startswith(DECODER):
            longer[name] = jnp.pad(value, [(0, 0)] * (value.ndim - 1) + [(front, back)])
    return longer


def _with_ids(tokens: Array, fronts: Sequence[Front], chosen: Mapping[str, Any]) -> Array:
    blocks = [(f.virtual.place == "back", _ids(f, tokens, chosen)) for f in fronts]
    before = [ids for behind, ids in blocks if not behind]
    return jnp.concatenate([*before, tokens, *(ids for behind, ids in blocks if behind)], axis=-1)


def front_ids(fronts: Sequence[Front], batch: int, chosen: Mapping[str, Any]) -> Array:
    """The ids `int32[batch, n]` of the virtual tokens in front of sequences."""
    none = jnp.zeros((batch, 0), jnp.int32)
    blocks = [_ids(front, none, chosen) for front in fronts if front.virtual.place != "back"]
    return jnp.concatenate([*blocks, none], axis=-1)


def _ids(front: Front, tokens: Array, chosen: Mapping[str, Any]) -> Array:
    virtual, shape = front.virtual, (*tokens.shape[:-1], front.virtual.length)
    if virtual.rows is None:
        # Any will do, but for models that make a mask of the ids: the largest is no padding there.
        return jnp.broadcast_to(tokens.max(axis=-1, keepdims=True, initial=0), shape)
    ids = front.start + jnp.arange(virtual.length)
    if virtual.task:
        if chosen.get(virtual.task) is None:
            raise ValueError(
                f"the tuning has a prompt for each task: call apply(..., {virtual.task}=ids) with "
                "one task id a sequence."
            )
        ids = ids + virtual.length * jnp.asarray(chosen[virtual.task])[..., None]
    return jnp.broadcast_to(ids, shape).astype(tokens.dtype)


def lengthened_mask(mask: Array, length: int, front: int, back: int = 0) -> Array:
    """A mask of more tokens in front and behind, all of which are seen.

    A mask `(B, T)` of any type, or one `(..., T, S)` over queries and keys: True or 1 for what is
    seen, or where it is floating point, 0 (it is added to the scores).
    """
    added = mask.ndim > 2 and jnp.issubdtype(mask.dtype, jnp.floating)
    widths = [(0, 0)] * mask.ndim
    if mask.shape[-1] == length:
        widths[-1] = (front, back)
    seen = jnp.pad(mask, widths, constant_values=jnp.array(0 if added else 1, mask.dtype))
    if mask.ndim < 3 or mask.shape[-2] != length:
        return seen
    # Virtual queries see virtual keys alone, as nothing in front of them exists.
    keys = jnp.arange(seen.shape[-1])
    virtual = (keys < front) | (keys >= seen.shape[-1] - back)
    hidden = jnp.finfo(mask.dtype).min if added else 0
    rows = jnp.where(virtual, 0 if added else 1, hidden).astype(mask.dtype)
    parts = (jnp.broadcast_to(rows, (*seen.shape[:-2], n, rows.shape[-1])) for n in (front, back))
    before, behind = parts
    return jnp.concatenate([before, seen, behind], axis=-2)


def mask_of(
    named: Mapping[str, Any], names: Sequence[str], fronts: Sequence[Front]
) -> Array | None:
    """The mask of tokens `bool[B, T]` among a call's inputs, with the virtual tokens of the call.

    Raises:
        ValueError: if the input of such a name is no mask of tokens.
    """
    found = next((name for name in names if named.get(name) is not None), None)
    if found is None:
        return None
    mask = jnp.asarray(named[found])
    if mask.ndim != 2:
        raise ValueError(
            f"{found!r} of shape {mask.shape} is no mask of tokens (batch, length). Name the "
            'argument that is one, mask="...", or none, mask="".'
        )
    front, back = _count(fronts, "front"), _count(fronts, "back")
    return lengthened_mask(mask, mask.shape[-1], front, back).astype(bool)


def _positions(positions: Array, front: int, back: int) -> Array:
    def beyond(start: Any, count: int) -> Array:
        new = start + jnp.arange(count, dtype=positions.dtype)
        return jnp.broadcast_to(new, (*positions.shape[:-1], count))

    moved = positions + front
    end = moved.max(axis=-1, keepdims=True) + 1
    return jnp.concatenate([beyond(0, front), moved, beyond(end, back)], axis=-1)


def fronts(virtuals: Sequence[tuple[str, int, Virtual]]) -> tuple[Front, ...]:
    """The blocks of a call, from `(site, rows of its table, virtual)`: placeholders come first.

    Methods that need placeholders share them.
    """
    empty = {virtual for _, _, virtual in virtuals if virtual.rows is None}
    if len({virtual.length for virtual in empty}) > 1:
        counts = sorted(virtual.length for virtual in empty)
        raise ValueError(f"prefixes have {counts} virtual tokens. Give them one length.")
    blocks = [Front(virtual, 0) for virtual in sorted(empty)[:1]]
    ends: dict[str, int] = {}
    for path, size, virtual in virtuals:
        if virtual.rows is not None:
            start = ends.get(path, size)
            ends[path] = start + virtual.rows
            blocks.append(Front(virtual, start))
    return tuple(blocks)
