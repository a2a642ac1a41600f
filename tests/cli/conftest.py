"""A tiny model directory, a data file and a short run, made once."""

import json
from types import SimpleNamespace

import pytest

from jaxpeft.cli import main
from jaxpeft.cli.reviews import made_up
from jaxpeft.cli.tiny import write_tiny_model

SHORT = ("--steps", "4", "--batch-size", "4", "--rank", "2", "--learning-rate", "0.05")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A Hugging Face directory with random weights and a byte-level tokenizer."""
    corpus = [" ".join(review) for review in made_up()]
    return write_tiny_model(tmp_path_factory.mktemp("cli") / "tiny", corpus)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Twelve chats."""
    path = tmp_path_factory.mktemp("cli-data") / "data.jsonl"
    reviews = made_up()[::14][:12]
    chats = [
        [{"role": "user", "content": r.text}, {"role": "assistant", "content": r.label}]
        for r in reviews
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


@pytest.fixture(scope="session")
def run(tiny_model, data, tmp_path_factory):
    """A finished `finetune` with a checkpoint at steps 2 and 4."""
    output = tmp_path_factory.mktemp("cli-run") / "run"
    code = main(
        ["finetune", str(tiny_model), str(data), "--output", str(output), "--save-every", "2",
         "--dropout", "0.1", "--eval-fraction", "0.2", *SHORT]
    )  # fmt: skip
    assert code == 0
    return output


@pytest.fixture
def jaxpeft(capsys):
    """`jaxpeft("inspect", path)` runs a command and gives its code, output and errors."""

    def run(*args):
        capsys.readouterr()
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        # Lines are wrapped at the width of the terminal, wherever that is.
        flat = [" ".join(text.replace("│", " ").split()) for text in (printed.out, printed.err)]
        return SimpleNamespace(code=code, out=flat[0], err=flat[1], raw=printed.out)

    return run
