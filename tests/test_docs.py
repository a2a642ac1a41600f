"""The pages say what is so: their Python runs, what they show is printed, what they name exists.

Each page's ```python blocks run in order in one namespace. A ```text block right after one is what
that block prints. Each `jaxpeft ...` line of a ```sh block names a command and flags that exist.
"""

import contextlib
import io
import re
from pathlib import Path
from typing import NamedTuple

import pytest

import jaxpeft as jp
from jaxpeft.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[1]
WHOLE = ROOT / "docs" / "all_of_jaxpeft.md"
PAGES = (ROOT / "README.md", WHOLE)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


class Block(NamedTuple):
    """Fenced code: its language, its text, and the line of the page on which the text starts."""

    language: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [Block(m[1], m[2], page.count("\n", 0, m.start(2)) + 1) for m in found]


def run(page: str, name: str) -> int:
    """Executes a page's Python and compares what it prints; the number of blocks."""
    namespace: dict[str, object] = {"__name__": "page"}
    found = blocks(page)
    for block, after in zip(found, [*found[1:], Block("", "", 0)], strict=True):
        if block.language == "python":
            # Empty lines in front, so that a traceback has the page's own line numbers.
            code = compile("\n" * (block.line - 1) + block.text, name, "exec")
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, namespace)
            shown = after.text if after.language == "text" else ""
            assert printed.getvalue().split() == shown.split(), f"{name}:{block.line}"
    return sum(block.language == "python" for block in found)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(page.read_text(), page.name)


@pytest.mark.parametrize(
    "page",
    [
        "```python\n1 / 0\n```\n",
        "```python\nx = 1\n```\nand\n```python\nassert x == 2\n```\n",
        "```python\nprint(1)\n```\n```text\n2\n```\n",
        "```python\nprint(1)\n```\n",
        "```python\nx = 1\n```\n```text\n1\n```\n",
    ],
)
def test_a_page_that_is_wrong_fails(page):
    with pytest.raises((ZeroDivisionError, AssertionError)):
        run(page, "page")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    inside = [link for link in links if "://" not in link]
    assert inside and not [link for link in inside if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_names_of_the_library_exist(page):
    names = re.compile(r"\bjp\.([a-z_.][a-z0-9_.]*[a-z0-9_])", re.IGNORECASE)
    for dotted in set(names.findall(page.read_text())):
        value = jp
        for name in dotted.split("."):
            value = getattr(value, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_that_are_named_exist(page):
    folders = "jaxpeft|docs|examples|scripts|tests|benchmarks"
    named = re.findall(rf"`((?:{folders})/[^`\s]*)`", page.read_text())
    assert named and not [path for path in named if not (ROOT / path).exists()]


def test_the_whole_library_is_on_one_page():
    text = WHOLE.read_text()
    public = [name for name in vars(jp) if not name.startswith("_")]
    parts = {"assets", "cli", "core", "flax", "methods"}
    assert not [name for name in public if name not in parts and f"`jp.{name}" not in text]
    core = [path.name for path in (ROOT / "jaxpeft" / "core").glob("*.py") if path.name[0] != "_"]
    assert not [name for name in core if f"`{name}`" not in text]


def command_lines() -> list[str]:
    shell = [b.text for page in PAGES for b in blocks(page.read_text()) if b.language == "sh"]
    lines = [line.partition("#")[0].strip() for text in shell for line in text.splitlines()]
    return [line for line in lines if line.startswith("jaxpeft ")]


def test_every_command_is_shown():
    assert {line.split()[1] for line in command_lines()} == COMMANDS.keys()


@pytest.mark.parametrize("line", sorted(set(command_lines())))
def test_commands_have_the_flags_that_are_shown(line, capsys):
    with pytest.raises(SystemExit):
        main([line.split()[1], "--help"])
    accepted = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert set(re.findall(r"--[\w-]+", line)) <= accepted


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_says_how_to_run_it(path):
    header = path.read_text().split('"""')[1]
    assert f"python examples/{path.name} " in header
    assert f"python examples/{path.name} --small " in header
