"""Token ids to text, piece by piece."""

from collections.abc import Iterable, Iterator
from typing import Any

_INCOMPLETE = "\ufffd"


def pieces(ids: Iterable[int], tokenizer: Any) -> Iterator[str]:
    """The text of a stream of tokens, each piece as soon as it is certain.

    A character of several bytes can be spread over tokens, and some tokenizers drop the space
    before the first word; so all the tokens so far are decoded each time, and what is new is given
    out. An unfinished character is held back until its last byte, or until the end.

    Args:
        ids: token ids, as they come.
        tokenizer: a Hugging Face tokenizer.

    Yields:
        Pieces that join to the whole text without special tokens.
    """
    seen: list[int] = []
    given = text = ""
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if len(text) > len(given) and not text.endswith(_INCOMPLETE):
            yield text[len(given) :]
            given = text
    if len(text) > len(given):
        yield text[len(given) :]
