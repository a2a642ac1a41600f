"""Models, tokenizers and adapters as the commands name them."""

import math
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

FETCHABLE = ("smollm2-135m-instruct",)
DTYPES = ("float32", "bfloat16", "float16")


def locate(model: str, cache: Path | None = None, fetchable: Sequence[str] = FETCHABLE) -> Path:
    """Where a model is: a path, or the name of one that can be fetched.

    Args:
        model: a directory, a GGUF file, or one of `fetchable`.
        cache: where fetched models are kept; see `jaxpeft.assets.fetch`.
        fetchable: names of assets.

    Returns:
        An existing path.

    Raises:
        FileNotFoundError: there is nothing of that name.
    """
    if model in fetchable and not Path(model).exists():
        from jaxpeft.assets import fetch

        return fetch(model, cache=cache)
    path = Path(model).expanduser()
    if not path.exists():
        names = ", ".join(fetchable)
        raise FileNotFoundError(
            f"there is no model at {model!r}. Give the directory of a Hugging Face model "
            f"(config.json and model.safetensors), a .gguf file, or a name: {names}."
        )
    return path


def shapes(path: Path, dtype: str = "float32") -> tuple[Any, Any]:
    """A model and its params without their values, for which its config.json is enough.

    Args:
        path: a directory, a config.json, or a GGUF file.
        dtype: of the weights.

    Returns:
        `(model, params)`, whose leaves are `jax.ShapeDtypeStruct`s.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: the model is not supported.
    """
    from jaxpeft.models.families import read_config
    from jaxpeft.models.files import read_json
    from jaxpeft.models.gguf import find_gguf
    from jaxpeft.models.load import open_checkpoint

    file = path if path.name == "config.json" else path / "config.json"
    gguf = path != file and find_gguf(path)
    config = open_checkpoint(path).config if gguf else read_config(read_json(file))
    return skeleton(config, dtype)


def skeleton(config: Any, dtype: str = "float32") -> tuple[Any, Any]:
    """`shapes` of a config that has been read."""
    import jax.numpy as jnp
    from flax import nnx

    from jaxpeft.models import FAMILIES

    build = FAMILIES[config.model_type].build
    model = nnx.eval_shape(lambda: build(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
    return model, nnx.state(model)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer that lies beside a model.

    Raises:
        FileNotFoundError: a directory holds no tokenizer, or no model.
    """
    from jaxpeft import models

    if path.is_dir() and not (path / "config.json").is_file() and not any(path.glob("*.gguf")):
        raise FileNotFoundError(
            f"{path} holds no model: neither config.json nor a .gguf file. Give the directory of a "
            "Hugging Face model, or a .gguf file."
        )
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    if (path / "config.json").is_file() and not any((path / file).is_file() for file in files):
        raise FileNotFoundError(
            f"{path} has no tokenizer: none of {', '.join(files)}. Copy them there from the "
            "model's repository, or save them with `tokenizer.save_pretrained(directory)`."
        )
    return models.load_tokenizer(path)


@contextmanager
def doing(text: str) -> Iterator[None]:
    """Says on standard error what takes its time: while it does on a terminal, else in a line."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console.print(f"{text} ...", markup=False, soft_wrap=True)
        yield
        return
    with console.status(text):
        yield


def check_writable(directory: Path, option: str) -> None:
    """Tries whether files can be written, before what takes time; leaves nothing behind.

    Args:
        directory: which need not be there yet.
        option: its name, for the message.

    Raises:
        OSError: they cannot.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"0")
    except OSError as error:
        raise OSError(
            f"{option} {directory} cannot be written: {error.strerror}. Give another directory."
        ) from error
    finally:
        for path in made:
            if path.is_dir():
                path.rmdir()


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def count(tree: Any) -> int:
    """Number of parameters in a tree of arrays; a quantized weight counts as if it were dense."""
    return sum(math.prod(leaf.shape) for leaf in weights(tree))


def trained(tuned: Any, adapter: Any) -> int:
    """Number of an adapter's parameters that do not stay fixed."""
    import jax

    marks = jax.tree.leaves(tuned.trainable(adapter))
    pairs = zip(jax.tree.leaves(adapter), marks, strict=True)
    return sum(leaf.size for leaf, mark in pairs if mark)


def weights(tree: Any) -> list[Any]:
    """The leaves of a tree, quantized ones whole."""
    import jax

    from jaxpeft.quant import QuantizedWeight

    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, QuantizedWeight))


def megabytes(size: float) -> str:
    """A size in bytes for people.

    Example:
        >>> megabytes(98_362_432), megabytes(4_200), megabytes(7.5e9)
        ('98.4 MB', '4.2 kB', '7.5 GB')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size:.0f} B"


def command(*words: object) -> str:
    """A command line that a shell takes as it is.

    Example:
        >>> command("jaxpeft", "generate", "--prompt", "a fine film")
        "jaxpeft generate --prompt 'a fine film'"
    """
    return shlex.join(str(word) for word in words)


def chat(question: str, system: str | None) -> Sequence[dict[str, str]]:
    """The messages that ask one question."""
    roles = [{"role": "user", "content": question}]
    return [{"role": "system", "content": system}, *roles] if system else roles
