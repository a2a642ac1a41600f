"""Packed weights in Hugging Face files: which tensors hold one, and how they are read.

`quantization_config` in config.json names the method. A module that the method left alone has a
plain `weight` in the file, and stays dense.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxpeft.models.packed_methods import Method, Options, Shape, Stored, method_of
from jaxpeft.quant.formats import Quantized

# What a reader may raise where a file says something absurd.
DAMAGE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
# Scales of keys, values and queries in a cache, which is of floats here.
_CACHE = re.compile(r".+\.[qkv]_(?:scale|zero_point|global_scale)")


class Packed(NamedTuple):
    """A weight of which a file holds packed arrays.

    Attributes:
        shape: of the dense weight, as Hugging Face has it.
        read: gives the packed arrays of the kernel (in, out).
        kind: of its blocks, in GGUF files; empty in others.
    """

    shape: Shape
    read: Callable[[], Quantized]
    kind: str = ""


def find_packed(options: Any, stored: Mapping[str, Stored]) -> tuple[dict[str, Packed], set[str]]:
    """The packed weights among the tensors of a directory.

    Args:
        options: the `quantization_config` of its config.json.
        stored: its tensors by name.

    Returns:
        The weights by the names that they would have if they were dense, and the names of the
        tensors that they consist of.

    Raises:
        ValueError: the method is not known, or a weight lacks a tensor that tells its shape.
    """
    method, options = method_of(options)
    pattern = re.compile(rf"(.+?)\.(?:weight\.)?({method.parts})")
    modules: dict[str, dict[str, Stored]] = {}
    used = {tensor for tensor in stored if _CACHE.fullmatch(tensor)}
    for tensor, value in stored.items():
        if tensor not in used and (match := pattern.fullmatch(tensor)):
            modules.setdefault(match[1], {})[match[2]] = value
            used.add(tensor)
    packed = {}
    for module, parts in modules.items():
        name = f"{module}.weight"
        if name in stored:
            parts["weight"] = stored[name]
            used.add(name)
        packed[name] = _packed(method, options, module, parts)
    return packed, used


def _packed(method: Method, options: Options, module: str, parts: Mapping[str, Stored]) -> Packed:
    name, file = f"{module}.weight", next(iter(parts.values())).file
    said = blamed(name, file, lambda: method.options(options, module))
    shape = blamed(name, file, lambda: tuple(int(n) for n in method.shape(parts, said)))

    def read() -> Quantized:
        weight = method.convert({part: stored.read() for part, stored in parts.items()}, said)
        if weight.shape != shape[::-1]:
            raise ValueError(f"its arrays are of {weight.shape[::-1]}, but it says {shape}.")
        return weight

    return Packed(shape, lambda: blamed(name, file, read))


def blamed(name: str, file: str, work: Callable[[], Any]) -> Any:
    """What `work` gives, with the weight and its file named in its errors."""
    try:
        return work()
    except DAMAGE as error:
        said = (
            str(error)
            if isinstance(error, ValueError)
            else f"its tensors or what quantization_config says of it make no sense ({error!r}). "
            "Compare them with the original, or download them again."
        )
        raise ValueError(f"the packed weight {name!r} in {file}: {said}") from error


def sensible(path: Any, work: Callable[[], Any]) -> Any:
    """What `work` makes of a file's options, with the file named in errors that are not ours."""
    try:
        return work()
    except DAMAGE as error:
        if type(error) is ValueError:
            raise
        raise ValueError(
            f"{path} has values that make no sense ({error!r}). Compare it with the original, or "
            "download it again."
        ) from error
