"""Reads the tensors of a file that `torch.save` wrote, without torch and without running code.

Such a file is a program that may name any function and call it. Here nothing is called: names and
calls are written down as values, and the values of a dictionary of tensors are then understood.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Callable
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
    """A pickle holds more than tensors."""


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


class _Name(NamedTuple):
    """A function or class that a pickle names."""

    module: str
    name: str


class _Call(NamedTuple):
    """A call that a pickle asks for."""

    function: Any
    args: tuple[Any, ...]


class _Id(NamedTuple):
    """What a pickle says of an object that is stored elsewhere."""

    value: Any


_MARK = object()

_VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _values(file: Any) -> Any:
    """What a pickle stands for; the file is then behind it."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for opcode, arg, _ in pickletools.genops(file):
        name = opcode.name
        if name in ("PROTO", "FRAME", "STOP"):
            continue
        if name in _VALUES:
            stack.append(arg)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if arg is None else int(arg)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[int(arg or 0)])
        else:
            _step(name, arg, stack)
    return stack.pop()


def _step(name: str, arg: Any, stack: list[Any]) -> None:
    """One operation on the stack."""
    match name:
        case "EMPTY_DICT":
            stack.append({})
        case "EMPTY_LIST":
            stack.append([])
        case "TUPLE":
            stack.append(tuple(_marked(stack)))
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            size = _TUPLES[name]
            stack[-size:] = [tuple(stack[-size:])]
        case "APPEND":
            one = stack.pop()
            stack[-1].append(one)
        case "APPENDS":
            many = _marked(stack)
            stack[-1].extend(many)
        case "SETITEM":
            pair = [stack.pop(-2), stack.pop()]
            stack[-1] |= _items(pair)
        case "SETITEMS":
            pairs = _marked(stack)
            stack[-1] |= _items(pairs)
        case "GLOBAL":
            stack.append(_Name(*arg.split(" ", 1)))
        case "STACK_GLOBAL":
            stack[-2:] = [_Name(*stack[-2:])]
        case "REDUCE":
            args = stack.pop()
            stack[-1] = {} if stack[-1] == _DICT and args == () else _Call(stack[-1], args)
        case "BINPERSID":
            stack[-1] = _Id(stack[-1])
        case "BUILD":
            stack.pop()  # attributes of a dictionary
            if not isinstance(stack[-1], dict):
                raise UnsafePickleError("it sets attributes of something else than a dictionary.")
        case _:
            raise UnsafePickleError(f"it has the operation {name}, which tensors do not need.")


def _marked(stack: list[Any]) -> list[Any]:
    """What is above the last mark, taken off with the mark."""
    at = max(i for i, value in enumerate(stack) if value is _MARK)
    found = stack[at + 1 :]
    del stack[at:]
    return found


def _items(flat: list[Any]) -> dict[Any, Any]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


_DICT = _Name("collections", "OrderedDict")
_TENSOR = _Name("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = _Name("torch._utils", "_rebuild_parameter")

_Storages = Callable[[Any, str, int], _Storage]


def _tensors(found: Any, storage: _Storages) -> dict[str, _View]:
    """The tensors in what a pickle stands for."""
    if not isinstance(found, dict):
        raise UnsafePickleError(f"it holds {_shown(found)}, where tensors by name are expected.")
    return {name: _tensor(value, storage) for name, value in found.items()}


def _tensor(value: Any, storage: _Storages) -> _View:
    match value:
        case _Call(function, (inner, *_)) if function == _PARAMETER:
            return _tensor(inner, storage)
        case _Call(function, (_Id(block), int(offset), tuple(shape), tuple(strides), *_)):
            if function == _TENSOR:
                return _View(_stored(block, storage), offset, shape, strides)
    raise UnsafePickleError(
        f"it holds {_shown(value)}, where tensors by name are expected. A pickle can run code when "
        "it is read as such: if you trust the file, save it as safetensors with the library that "
        "made it."
    )


def _stored(block: Any, storage: _Storages) -> _Storage:
    match block:
        case ("storage", _Name("torch", kind), key, _, int(count), *rest) if not any(rest):
            if kind in _STORAGES:
                return storage(_STORAGES[kind], str(key), count)
    raise UnsafePickleError(f"it refers to {_shown(block)}, where a storage should be.")


def _shown(value: Any) -> str:
    if isinstance(value, _Call):
        return f"a call of {_shown(value.function)}"
    if isinstance(value, dict) and value:
        return f"a dict of {_shown(next(iter(value.values())))}"
    if isinstance(value, _Name):
        return f"{value.module}.{value.name}"
    return f"a {type(value).__name__}"


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

    return _tensors(_values(archive.read(main[0])), storage)


def _plain(path: Path) -> dict[str, _View]:
    """Before 1.6: five pickles, and behind them the storages in the order of the last one."""
    file = io.BytesIO(path.read_bytes())
    if (first := _values(file)) != _MAGIC:
        raise UnsafePickleError(f"it holds {_shown(first)}, and was not written by torch.save.")
    _, _, found, keys = (_values(file) for _ in range(4))
    blocks: dict[str, bytes] = {}
    sizes: dict[str, int] = {}

    def storage(dtype: Any, key: str, count: int) -> _Storage:
        sizes[key] = count * np.dtype(dtype).itemsize
        return _Storage(dtype, lambda: blocks[key])

    views = _tensors(found, storage)
    for key in keys:
        file.read(8)
        blocks[str(key)] = file.read(sizes[str(key)])
    return views
