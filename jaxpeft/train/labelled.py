"""Texts with labels, from CSV, TSV and JSONL files."""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class _Tabs(csv.excel_tab):
    quoting = csv.QUOTE_NONE


class Labelled(NamedTuple):
    """A text, its label as it is written, and the place that it came from.

    Attributes:
      text: the text.
      label: such as "positive" or "3.5".
      where: `"file:line"`, for messages.
    """

    text: str
    label: str
    where: str


def read_labelled(
    path: str | os.PathLike[str], *, text: str = "text", label: str = "label"
) -> list[Labelled]:
    """Reads a file of texts with labels.

    Args:
      path: a `.csv` or `.tsv` file whose first line names the columns, or a `.jsonl` file with an
        object a line.
      text: the column, or key, of the texts.
      label: that of the labels.

    Returns:
      The rows in the order of the file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is of another kind, lacks a column, or a row lacks a value.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "data.csv"
      >>> _ = path.write_text('label,text\\nbad,dull\\ngood,"a warm, funny film"\\n')
      >>> [(row.text, row.label) for row in read_labelled(path)]
      [('dull', 'bad'), ('a warm, funny film', 'good')]
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}. Give a .csv, .tsv or .jsonl file.")
    rows = [_row(fields, text, label, where) for fields, where in _fields(path)]
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    return rows


def numbers(rows: Sequence[Labelled]) -> list[float]:
    """The labels as numbers.

    Raises:
      ValueError: one is no finite number.
    """
    return [_number(row) for row in rows]


def _number(row: Labelled) -> float:
    try:
        value = float(row.label)
        if value - value == 0:
            return value
    except ValueError:
        pass
    raise ValueError(f"{row.where}: the label {row.label!r} is no number, which regression needs.")


def _fields(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    if path.suffix == ".jsonl":
        yield from _objects(path)
        return
    if path.suffix not in (".csv", ".tsv"):
        raise ValueError(f"{path} ends in none of .csv, .tsv and .jsonl. Rename it.")
    with open(path, encoding="utf-8", newline="") as file:
        # Sentences in a TSV file may hold a lone quotation mark.
        tabs = path.suffix == ".tsv"
        reader = csv.DictReader(file, dialect=_Tabs if tabs else csv.excel)
        for fields in reader:
            yield fields, f"{path}:{reader.line_num}"


def _objects(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is no JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(
                f"{path}:{number} is a {type(fields).__name__}. Give an object a line."
            )
        yield fields, f"{path}:{number}"


def _row(fields: Mapping[str, Any], text: str, label: str, where: str) -> Labelled:
    missing = [name for name in (text, label) if fields.get(name) in (None, "")]
    if missing:
        found = ", ".join(str(name) for name in fields if name is not None)
        raise ValueError(
            f"{where} has no {missing[0]!r}; there are: {found}. Name the columns, for instance "
            "--text-column sentence --label-column class."
        )
    return Labelled(str(fields[text]), str(fields[label]), where)
