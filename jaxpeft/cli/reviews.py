"""Sentences of movie reviews with the sentiment that people saw in them."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

LABELS = ("negative", "positive")
QUESTION = "Is this review positive or negative?"


class Review(NamedTuple):
    """A sentence and its label, one of `LABELS`."""

    text: str
    label: str


def read_reviews(path: Path) -> list[Review]:
    """Reads lines of `number, mean rating from -4 to 4, sentence`, separated by tabs.

    The label is the sign of the rating; sentences rated 0 have none and are left out.

    Args:
        path: the file.

    Returns:
        The reviews, in the order of the file.

    Raises:
        ValueError: a line is not of this form.
    """
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows, 1):
        if len(row) != 3:
            raise ValueError(f"{path}:{number} has {len(row)} columns; 3 were expected.")
    rated = [(float(rating), text.strip()) for _, rating, text in rows]
    return [Review(text, LABELS[rating > 0]) for rating, text in rated if rating != 0]


def split(reviews: Sequence[Review], share: float = 0.1) -> tuple[list[Review], list[Review]]:
    """Shuffles with a fixed seed and holds the first part out.

    Args:
        reviews: all of them.
        share: how many to hold out.

    Returns:
        `(train, held_out)`.

    Example:
        >>> train, held_out = split([Review(str(i), "positive") for i in range(20)])
        >>> len(train), len(held_out)
        (18, 2)
    """
    shuffled = list(reviews)
    random.Random(0).shuffle(shuffled)
    cut = int(len(shuffled) * share)
    return shuffled[cut:], shuffled[:cut]


def made_up() -> list[Review]:
    """A few hundred sentences whose sentiment hangs on one word, for a quick try."""
    words = {
        "negative": ("dull", "bad", "tedious", "weak", "sloppy"),
        "positive": ("great", "funny", "moving", "bold", "fresh"),
    }
    things = ("film", "plot", "cast", "score", "scene", "ending", "story", "script")
    return [
        Review(f"a {word} {thing}" if short else f"the {thing} is {word}", label)
        for label in LABELS
        for word in words[label]
        for thing in things
        for short in (True, False)
    ]
