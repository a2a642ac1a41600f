"""Reads the tensors of a file that `torch.save` wrote, without torch and without running code.

Such a file is a pickle, which may name any function to call. Here it may name what a dictionary of
tensors needs and nothing else, and those names stand for what this file puts in their place.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxpeft.hf.files import check_file, some

# Written in front of files of torch before 1.6.
_MAGIC = 0x1950A86A20F9469CFC6C

_STORAGES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class UnsafePickleError(ValueError):
    """A pickle wants more than tensors."""


def read_pickled(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, by name.

    Args:
        path: of a state dict that `torch.save` wrote, in its form of today or that before 1.6.

    Returns:
        `{name: array}`; tensors that share memory in torch are copies of one another here.

    Raises:
        FileNotFoundError: there is no such file.
        UnsafePickleError: it holds anything but tensors by name.
        ValueError: it is damaged.
    """
    check_file(path)
    try:
        found = _zipped(path) if zipfile.is_zipfile(path) else _plain(path)
        return {str(name): np.array(view.array()) for name, view in found.items()}
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{path} is damaged or holds more than tensors: {error!r}.") from error


class _Storage(NamedTuple):
    """A block of memory; its bytes are read when the whole pickle is."""

    dtype: Any
    read: Callable[[], bytes]

    def array(self) -> np.ndarray:
        return np.frombuffer(self.read(), self.dtype)


class _View(NamedTuple):
    """A tensor: a part of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        block = self.storage.array()
        steps = [(n - 1) * step for n, step in zip(self.shape, self.strides, strict=True)]
        low = min(self.offset, *self.shape, *self.strides, 0)
        last = self.offset + sum(steps)
        if low < 0 or (0 not in self.shape and last >= block.size):
            raise ValueError(f"a tensor of shape {self.shape} lies outside of its storage")
        strides = [step * block.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(
            block[self.offset :], self.shape, strides, writeable=False
        )


class _Names(dict[str, Any]):
    """Stands for an `OrderedDict`, which takes attributes in a pickle."""

    def __setstate__(self, state: Any) -> None:
        del state


class _NewNames(NamedTuple):
    """What a pickle calls for an `OrderedDict`. A tuple, as a pickle could change a function."""

    def __call__(self) -> _Names:
        return _Names()


class _NewView(NamedTuple):
    """What a pickle calls for a tensor."""

    def __call__(
        self,
        storage: _Storage,
        offset: int,
        shape: Sequence[int],
        strides: Sequence[int],
        *rest: Any,
    ) -> _View:
        del rest
        return _View(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


class _SameView(NamedTuple):
    """What a pickle calls for a parameter that is a tensor."""

    def __call__(self, view: _View, *rest: Any) -> _View:
        del rest
        return view


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _NewNames(),
    ("torch._utils", "_rebuild_tensor_v2"): _NewView(),
    ("torch._utils", "_rebuild_parameter"): _SameView(),
    **{("torch", name): name for name in _STORAGES},
}


class _Unpickler(pickle.Unpickler):
    """A pickle machine that knows the names above alone.

    `storage` makes a storage of its type, its id and the number of its entries.
    """

    def __init__(self, file: Any, storage: Callable[[Any, str, int], _Storage]):
        super().__init__(file)
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UnsafePickleError(
                f"it names {module}.{name}, which tensors do not need and which can run code. If "
                "you trust the file, save it as safetensors with the library that made it."
            )
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid[:5]
        if kind != "storage" or (len(pid) > 5 and pid[5] is not None):
            raise UnsafePickleError(f"it refers to {kind!r}, where a storage should be.")
        return self.storage(_STORAGES[dtype], str(key), int(count))


def _zipped(path: Path) -> dict[str, _View]:
    """A zip archive: the pickle, and a member for each storage."""
    archive = zipfile.ZipFile(path)
    members = archive.namelist()
    main = [name for name in members if name.endswith("/data.pkl")]
    if len(main) != 1:
        raise ValueError(f"the archive has no one data.pkl but {some(members)}")
    root = main[0].removesuffix("data.pkl")
    order = f"{root}byteorder"
    if order in members and archive.read(order).strip() != b"little":
        raise ValueError("its numbers are big-endian")

    def storage(dtype: Any, key: str, count: int) -> _Storage:
        del count
        return _Storage(dtype, lambda: archive.read(f"{root}data/{key}"))

    return _checked(_Unpickler(io.BytesIO(archive.read(main[0])), storage).load())


def _plain(path: Path) -> dict[str, _View]:
    """Before 1.6: five pickles, and behind them the storages in the order of the last one."""
    file = io.BytesIO(path.read_bytes())
    blocks: dict[str, bytes] = {}
    sizes: dict[str, int] = {}

    def storage(dtype: Any, key: str, count: int) -> _Storage:
        sizes[key] = count * np.dtype(dtype).itemsize
        return _Storage(dtype, lambda: blocks[key])

    magic, _, _, found, keys = (_Unpickler(file, storage).load() for _ in range(5))
    if magic != _MAGIC:
        raise ValueError("it is no file of torch.save")
    for key in keys:
        file.read(8)
        blocks[str(key)] = file.read(sizes[str(key)])
    return _checked(found)


def _checked(found: Any) -> dict[str, _View]:
    if not isinstance(found, dict) or not all(isinstance(v, _View) for v in found.values()):
        raise UnsafePickleError("it holds something else than tensors by name.")
    return found
