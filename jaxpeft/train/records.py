"""JSONL records, and the text with its completions that each stands for."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FORMS = (
    '{"messages": [{"role": ..., "content": ...}, ...]}',
    '{"prompt": ..., "completion": ...}',
    '{"instruction": ..., "output": ...} with an optional "input"',
    '{"text": ...}',
)

_ALPACA = (
    "Below is an instruction that describes a task{paired}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{context}### Response:\n"
)


class Record(NamedTuple):
    """A JSON object and the place that it came from.

    Attributes:
      fields: the object, one of `FORMS`.
      where: `"file:line"`, for messages.
    """

    fields: Mapping[str, Any]
    where: str


class Rendered(NamedTuple):
    """A text and the parts of it that are to be learned.

    Attributes:
      text: what the tokenizer gets.
      spans: `(start, end)` character positions of the completions.
      plain: True if the tokenizer is to add its begin and end tokens; a chat template writes
        its own.
      where: `"file:line"`, for messages.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    plain: bool
    where: str


def read_jsonl(path: str | os.PathLike[str]) -> list[Record]:
    """Reads and checks a file of one JSON object a line; empty lines are passed over.

    Args:
      path: the file. Each line is one of `FORMS`; other keys beside them are ignored.

    Returns:
      The records, each with its `file:line`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: at the first line that is not JSON or not one of the forms, naming
        `file:line`, the keys found and the keys allowed.

    Example:
      >>> import tempfile, pathlib
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "data.jsonl"
      >>> _ = path.write_text('{"prompt": "2 + 2 =", "completion": " 4"}')
      >>> read_jsonl(path)[0].fields["completion"]
      ' 4'
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}. Give the path of a JSONL file.")
    lines = _text(path).split("\n")
    records = [_parse(ln, f"{path}:{i}") for i, ln in enumerate(lines, 1) if ln.strip()]
    if not records:
        raise ValueError(f"{path} holds no records. Each line is one of:\n{_allowed()}")
    return records


def _text(path: Path) -> str:
    """A file as text, without the mark that some editors put in front."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: byte 0x{raw[error.start]:02x} is no UTF-8. Save the file as UTF-8, as "
            f"with `iconv -t UTF-8 {path} > new.jsonl`."
        ) from error


def _allowed() -> str:
    return "\n".join(f"  {form}" for form in FORMS)


def _parse(line: str, where: str) -> Record:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not JSON ({error.msg} at column {error.colno}). "
            f"Each line is one object of these:\n{_allowed()}"
        ) from error
    check(fields, where)
    return Record(fields, where)


def check(fields: Any, where: str) -> None:
    """Raises a ValueError that names `where` if `fields` is none of `FORMS`."""
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: a {type(fields).__name__}, not an object of:\n{_allowed()}")
    keys = set(fields)
    if "messages" in keys:
        _check_messages(fields["messages"], where)
        return
    for source, target in (("prompt", "completion"), ("instruction", "output"), ("text", "text")):
        if keys >= {source, target}:
            optional = {"input"} if source == "instruction" and fields.get("input") else set()
            _check_strings(fields, {source, target} | optional, target, where)
            return
    raise ValueError(f"{where}: keys {sorted(keys)} are none of these:\n{_allowed()}")


def _check_strings(fields: Mapping[str, Any], keys: set[str], target: str, where: str) -> None:
    for key in sorted(keys):
        if not isinstance(fields[key], str):
            kind = type(fields[key]).__name__
            raise ValueError(f"{where}: {key!r} is a {kind}. Give a string.")
    if not fields[target]:
        raise ValueError(f"{where}: {target!r} is empty, so there is nothing to learn.")


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"{where}: 'messages' is not a list of objects. Use {FORMS[0]}.")
    for index, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or not {"content", "tool_calls"} & set(message):
            raise ValueError(
                f"{where}: message {index} has the keys {sorted(message)}; 'role' and 'content' "
                f"are needed. Use {FORMS[0]}."
            )
    roles = [m["role"] for m in messages]
    if "assistant" not in roles:
        raise ValueError(
            f"{where}: the roles are {roles}; with no 'assistant' there is nothing to learn. "
            "Add a message with the role 'assistant'."
        )
    if roles[0] == "assistant":
        raise ValueError(
            f"{where}: the first role is 'assistant', but an answer needs something before it. "
            "Begin with 'user' or 'system'."
        )


def render(record: Record, tokenizer: Any) -> list[Rendered]:
    """Writes a record as the text that the model sees, and marks the completions.

    Messages go through the tokenizer's chat template, and so do instructions if it has one (else
    they become the Alpaca prompt). The completion of an assistant's turn is all that the template
    writes after its generation prompt, up to and including the end-of-turn token. A template that
    rewrites earlier turns once later ones follow (dropping their reasoning, for instance) gives
    one text for each assistant turn, just as the model would see it then; any other gives one
    text with all the turns.

    Args:
      record: from `read_jsonl`.
      tokenizer: a Hugging Face tokenizer.

    Returns:
      One or more texts with their spans.

    Raises:
      ValueError: if there is no chat template or it rejects the messages.
    """
    fields, where = record
    if "messages" in fields:
        return _chat(fields["messages"], tokenizer, where)
    if "prompt" in fields:
        return [_plain(fields["prompt"], fields["completion"], where)]
    if "text" in fields:
        return [_plain("", fields["text"], where)]
    context = fields.get("input") or ""
    if tokenizer.chat_template:
        asked = "\n\n".join(filter(None, (fields["instruction"], context)))
        roles = ({"role": "user", "content": asked},)
        return _chat([*roles, {"role": "assistant", "content": fields["output"]}], tokenizer, where)
    prompt = _ALPACA.format(
        paired=", paired with an input that provides further context" if context else "",
        instruction=fields["instruction"],
        context=f"### Input:\n{context}\n\n" if context else "",
    )
    return [_plain(prompt, fields["output"], where)]


def _plain(prompt: str, completion: str, where: str) -> Rendered:
    text = prompt + completion
    return Rendered(text, ((len(prompt), len(text)),), True, where)


def _chat(messages: Sequence[Mapping[str, Any]], tokenizer: Any, where: str) -> list[Rendered]:
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    cuts = [_turn(messages[: i + 1], tokenizer, where) for i in turns]
    text = cuts[-1][0]
    if all(text.startswith(cut[: span[1]]) for cut, span in cuts):
        return [Rendered(text, tuple(span for _, span in cuts), False, where)]
    return [Rendered(cut, (span,), False, where) for cut, span in cuts]


def _turn(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, where: str
) -> tuple[str, tuple[int, int]]:
    """The text up to an assistant's turn and with it, and the span of that turn."""
    before = _template(messages[:-1], tokenizer, where, add_generation_prompt=True)
    text = _template(messages, tokenizer, where, add_generation_prompt=False)
    # Some generation prompts open a reasoning block that a turn without reasoning does not have.
    start = len(os.path.commonprefix([before, text]))
    _check_start(messages[-2], text[:start], where)
    end = len(text)
    stripped = text.rstrip()
    special = (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())
    if stripped.endswith(special):
        end = len(stripped)  # the template's line break after the end-of-turn token
    return text, (start, end)


def _check_start(asked: Mapping[str, Any], before: str, where: str) -> None:
    """Refuses a template that changes the question once its answer follows."""
    content = asked.get("content")
    if asked["role"] == "user" and isinstance(content, str) and content.strip() not in before:
        raise ValueError(
            f"{where}: the chat template writes the user's message in another way once an answer "
            "follows it, so where the answer begins cannot be known. Set another "
            "`tokenizer.chat_template`, or use records with 'prompt' and 'completion'."
        )


def _template(messages: Any, tokenizer: Any, where: str, *, add_generation_prompt: bool) -> str:
    from jinja2.exceptions import TemplateError  # comes with every chat template

    if not tokenizer.chat_template:
        raise ValueError(
            f"{where}: 'messages', but this tokenizer has no chat template. Set "
            "`tokenizer.chat_template`, or use records with 'prompt' and 'completion'."
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        roles = [m["role"] for m in messages]
        raise ValueError(
            f"{where}: the tokenizer's chat template rejects the roles {roles}: {error}. "
            "Reorder the messages as the template wants them."
        ) from error
