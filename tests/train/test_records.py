import json

import pytest

from jaxpeft import train


def write(path, *rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def test_reads_every_form_and_passes_over_empty_lines(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "", "completion": "b", "id": 3},
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "input": "c", "output": "b"},
        {"text": "line\u2028separator"},
    ]
    path = write(tmp_path / "d.jsonl", rows[0], "", *rows[1:], "")
    records = train.read_jsonl(path)
    assert [r.fields for r in records] == rows
    assert [r.where.rsplit(":", 1)[1] for r in records] == ["1", "3", "4", "5", "6"]


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"text": "a"', "not JSON .*column"),
        ("[1]", "a list, not an object"),
        ({"question": "a", "answer": "b"}, r"keys \['answer', 'question'\] are none of these"),
        ({"prompt": "a", "completion": 3}, "'completion' is a int. Give a string"),
        ({"instruction": "a", "input": 1, "output": "b"}, "'input' is a int"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"instruction": "a", "input": "b", "output": ""}, "'output' is empty"),
        ({"messages": "hello"}, "'messages' is not a list of objects"),
        ({"messages": [{"from": "user", "value": "a"}]}, r"message 0 has the keys \['from'"),
        ({"messages": [{"role": "user", "content": "a"}]}, "Add a message with the role 'assis"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "Begin with 'user' or 'system'"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, message):
    path = write(tmp_path / "bad.jsonl", {"text": "good"}, row)
    with pytest.raises(ValueError, match=message) as error:
        train.read_jsonl(path)
    assert str(error.value).startswith(f"{path}:2: ")


def test_errors_of_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        train.read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match='holds no records.*\n.*"messages"'):
        train.read_jsonl(write(tmp_path / "empty.jsonl", "", ""))


def test_every_form_is_shown_in_the_message(tmp_path):
    with pytest.raises(ValueError) as error:
        train.read_jsonl(write(tmp_path / "bad.jsonl", {}))
    for key in ("messages", "prompt", "completion", "instruction", "input", "output", "text"):
        assert f'"{key}"' in str(error.value)


def test_a_file_in_another_encoding_names_the_line(tmp_path):
    path = tmp_path / "d.jsonl"
    good = '{"text": "für \u2028 🚀"}'
    path.write_bytes(b"\xef\xbb\xbf" + good.encode())  # as some editors begin UTF-8
    assert train.read_jsonl(path)[0].fields["text"] == "für \u2028 🚀"
    path.write_bytes(good.encode() + b"\n" + '{"text": "für"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"d.jsonl:2: byte 0xfc is no UTF-8.*iconv"):
        train.read_jsonl(path)
