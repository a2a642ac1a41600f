"""Records to token ids, with the completions marked as targets."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpeft.train.batches import Example
from jaxpeft.train.records import Record, Rendered, render


def encode(records: Sequence[Record], tokenizer: Any, *, max_length: int) -> list[Example]:
    """Tokenizes records; only completions, with their end token, are targets.

    A token is a target if it shares a character with a completion, so one that straddles the
    border of prompt and completion counts. Plain text gets the tokenizer's own begin token and
    one end token, a target. What exceeds `max_length` is cut from the end; an example that
    loses its whole completion so is left out, with a warning that counts them.

    Args:
      records: from `read_jsonl`.
      tokenizer: a fast Hugging Face tokenizer.
      max_length: the largest number of tokens in an example.

    Returns:
      The examples: one a record, or one an assistant turn (see `render`).

    Raises:
      ValueError: if the tokenizer is slow, a record cannot be rendered, or no example is left.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} cannot tell which characters a token stands for. "
            "Use a fast tokenizer (one with a tokenizer.json)."
        )
    texts = [text for record in records for text in render(record, tokenizer)]
    examples = _tokenize(texts, tokenizer)
    examples = [Example(e.tokens[:max_length], e.targets[:max_length]) for e in examples]
    # The first token has nothing before it to be predicted from.
    empty = [i for i, e in enumerate(examples) if not e.targets[1:].any()]
    if empty:
        _report(texts[empty[0]].where, len(empty), len(examples), max_length)
    return [e for e in examples if e.targets[1:].any()]


def _report(first: str, n: int, total: int, max_length: int) -> None:
    message = (
        f"{n} of {total} examples have no completion token within max_length={max_length} "
        f"(the first is {first})"
    )
    if n == total:
        raise ValueError(f"{message}, so there is nothing to train on. Use a larger max_length.")
    warnings.warn(
        f"{message} and are left out. Use a larger max_length to keep them.", stacklevel=3
    )


def _tokenize(texts: Sequence[Rendered], tokenizer: Any) -> list[Example]:
    examples: list[Example | None] = [None] * len(texts)
    for plain in (True, False):
        chosen = [i for i, t in enumerate(texts) if t.plain == plain]
        if not chosen:
            continue
        encoded = tokenizer(
            [texts[i].text for i in chosen],
            add_special_tokens=plain,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
        )
        columns = ("input_ids", "offset_mapping", "special_tokens_mask")
        rows = zip(*(encoded[c] for c in columns), strict=True)
        for i, (ids, offsets, added) in zip(chosen, rows, strict=True):
            examples[i] = _example(texts[i], ids, offsets, added, tokenizer.eos_token_id)
    return [e for e in examples if e is not None]


def _example(text: Rendered, ids: Any, offsets: Any, added: Any, eos: int | None) -> Example:
    tokens = np.asarray(ids, np.int32)
    start, end = np.asarray(offsets, np.int32).reshape(-1, 2).T
    targets = np.zeros(len(tokens), bool)
    for first, last in text.spans:
        targets |= (end > first) & (start < last)
    if text.plain:
        targets &= ~np.asarray(added, bool)
        tokens, targets = _with_end(tokens, targets, eos)
    return Example(tokens, targets)


def _with_end(
    tokens: np.ndarray, targets: np.ndarray, eos: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Makes the last token the end token, and a target; a tokenizer without one adds none."""
    if eos is None:
        return tokens, targets
    if not len(tokens) or tokens[-1] != eos:
        tokens, targets = np.append(tokens, np.int32(eos)), np.append(targets, True)
    targets[-1] = True
    return tokens, targets
