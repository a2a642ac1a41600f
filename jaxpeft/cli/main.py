"""The commands, and what becomes of their errors."""

import errno
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from jaxpeft.cli.compare import compare
from jaxpeft.cli.demo import demo
from jaxpeft.cli.finetune import finetune
from jaxpeft.cli.generate import generate
from jaxpeft.cli.inspect import inspect
from jaxpeft.cli.merge import merge
from jaxpeft.cli.options import with_file
from jaxpeft.cli.plan import plan
from jaxpeft.cli.quantize import quantize

COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "finetune": finetune,
    "generate": generate,
    "merge": merge,
    "inspect": inspect,
    "compare": compare,
    "plan": plan,
    "quantize": quantize,
}
_DESCRIPTION = (
    "Fine-tune language models with small adapters, in JAX. "
    "Start with `jaxpeft demo`: it downloads a small model and tunes it in about five minutes."
)
_PACKAGE = str(Path(__file__).parents[1])
_NO_MEMORY = "RESOURCE_EXHAUSTED"  # as XLA says it
_SMALLER = (
    "Use less of it: a smaller --batch-size or --max-length, --accumulate, --remat layers, "
    "--quantize nf4, --offload all. `jaxpeft plan` says what a step takes."
)
_INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command.

    What a user can mend (a file that is not there, a value that is not allowed) becomes one
    message. Anything else is a bug and keeps its traceback.

    Args:
        args: the command's name and its arguments; those of the process by default.

    Returns:
        The exit code: 0, 1 if a run failed, 2 for a user's mistake, 130 after Ctrl-C.

    Raises:
        SystemExit: with the code 2, if the arguments cannot be parsed; with 0, after `--help`.
    """
    console = Console(stderr=True, highlight=False)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _shown(console, warnings.showwarning)
            return _run(sys.argv[1:] if args is None else list(args))
    except KeyboardInterrupt as stop:
        console.print(str(stop) or "Stopped.", style="yellow", markup=False, soft_wrap=True)
        return _INTERRUPTED
    except FloatingPointError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and str(error).startswith(_NO_MEMORY):
            text = f"error: the device is out of memory ({error}). {_SMALLER}"
            console.print(text, style="red", markup=False, soft_wrap=True)
            return 1
        if not _is_message(error):
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            error = OSError(f"{error}. Free some space and try again.")
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2


def _run(args: list[str]) -> int:
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="jaxpeft", description=_DESCRIPTION, args=with_file(args), config=config
    )
    return 0


def _shown(console: Console, others: Callable[..., None]) -> Callable[..., None]:
    """What shows a warning: those of this package without the line that it comes from."""

    def show(message: Any, category: type, filename: str, *rest: Any) -> None:
        if issubclass(category, UserWarning) and filename.startswith(_PACKAGE):
            console.print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)
        else:
            others(message, category, filename, *rest)

    return show


def _is_message(error: Exception) -> bool:
    """Whether an error was raised for the user to read: by a `raise` of this package, or by the
    operating system. A ValueError from inside numpy or jax is a bug of ours."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = last.filename.startswith(_PACKAGE) and (last.line or "").startswith("raise")
    return ours or isinstance(error, OSError | UnicodeDecodeError)
