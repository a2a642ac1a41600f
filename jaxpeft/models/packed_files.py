"""Packed weights in Hugging Face files: which tensors hold one, and how they are read.

`quantization_config` in config.json names the method. A module that the method left alone has a
plain `weight` in the file, and stays dense.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxpeft.quant.formats import (
    Quantized,
    from_awq,
    from_bitsandbytes,
    from_compressed_tensors,
    from_fp8,
    from_gptq,
    from_llm_int8,
)

Arrays = dict[str, np.ndarray]
Shape = tuple[int, ...]
# What a converter may raise where a file says something absurd.
_DAMAGE = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, re.error,
)  # fmt: skip


class Stored(NamedTuple):
    """A tensor of a file.

    Attributes:
        shape: of the array.
        read: gives the array.
        file: where it is, for error messages.
    """

    shape: Shape
    read: Callable[[], np.ndarray]
    file: str


class Packed(NamedTuple):
    """A weight of which a file holds packed arrays.

    Attributes:
        shape: of the dense weight, as Hugging Face has it.
        read: gives the packed arrays of the kernel (in, out).
    """

    shape: Shape
    read: Callable[[], Quantized]


class Method(NamedTuple):
    """How a `quant_method` keeps the weight of a module.

    Attributes:
        parts: a regular expression for the last part of the names of its tensors.
        shape: from these tensors by that part, and the configuration, to the shape (out, in).
        convert: from their arrays, the configuration and the module's name to the packed weight.
    """

    parts: str
    shape: Callable[[Mapping[str, Stored], Mapping[str, Any]], Shape]
    convert: Callable[[Arrays, Mapping[str, Any], str], Quantized]


def find_packed(
    options: Mapping[str, Any], stored: Mapping[str, Stored]
) -> tuple[dict[str, Packed], set[str]]:
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
    method = _method(options)
    pattern = re.compile(rf"(.+?)\.(?:weight\.)?({method.parts})")
    modules: dict[str, dict[str, Stored]] = {}
    used = set()
    for tensor, value in stored.items():
        if match := pattern.fullmatch(tensor):
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


def _packed(
    method: Method, options: Mapping[str, Any], module: str, parts: Mapping[str, Stored]
) -> Packed:
    file = next(iter(parts.values())).file

    def read() -> Quantized:
        arrays = {part: stored.read() for part, stored in parts.items()}
        weight = method.convert(arrays, options, module)
        if weight.shape != shape[::-1]:
            raise ValueError(f"its arrays are of {weight.shape[::-1]}, but it says {shape}.")
        return weight

    name = f"{module}.weight"
    shape = blamed(name, file, lambda: tuple(int(n) for n in method.shape(parts, options)))
    return Packed(shape, lambda: blamed(name, file, read))


def blamed(name: str, file: str, work: Callable[[], Any]) -> Any:
    """What `work` gives, with the weight and its file named in its errors."""
    try:
        return work()
    except _DAMAGE as error:
        said = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"the packed weight {name!r} in {file}: {said}") from error


def _method(options: Mapping[str, Any]) -> Method:
    if not isinstance(options, Mapping):
        raise ValueError(
            f"quantization_config is {options!r:.80}, but should be a dict of options."
        )
    name = options.get("quant_method")
    if name is None and (options.get("load_in_4bit") or options.get("load_in_8bit")):
        name = "bitsandbytes"  # as transformers reads files from before the key
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(
            f"quantization_config with quant_method={name!r} is not supported. Supported: "
            f"{', '.join(METHODS)}; unquantized safetensors; and .gguf files."
        )
    return METHODS[name]


def _part(parts: Mapping[str, Stored], *names: str) -> Stored:
    """The first of these tensors that there is."""
    for name in names:
        if name in parts:
            return parts[name]
    raise ValueError(
        f"{' or '.join(map(repr, names))} is missing among {sorted(parts)}. "
        "Download all files of the model."
    )


def _bnb_shape(parts: Mapping[str, Stored], options: Mapping[str, Any]) -> Shape:
    states = [value for part, value in parts.items() if part.startswith("quant_state")]
    if not states:
        _part(parts, "SCB", "quant_state.bitsandbytes__nf4")
        return _part(parts, "weight").shape
    state = json.loads(states[0].read().astype(np.uint8).tobytes())
    return tuple(state["shape"])


def _bnb(arrays: Arrays, options: Mapping[str, Any], module: str) -> Quantized:
    if "SCB" not in arrays:
        return from_bitsandbytes(arrays)
    order = arrays.get("weight_format", np.zeros((), np.uint8))
    if order.any():
        raise ValueError(f"'weight_format' is {order}; only 0, row by row, is read.")
    return from_llm_int8(arrays, float(options.get("llm_int8_threshold", 6.0)))


def _gptq_shape(parts: Mapping[str, Stored], options: Mapping[str, Any]) -> Shape:
    kind = options.get("checkpoint_format") or "gptq"
    if options.get("bits") != 4 or kind not in _GPTQ_VERSIONS:
        raise ValueError(
            f"GPTQ with bits={options.get('bits')!r} and checkpoint_format={kind!r} is not "
            f"supported. Supported: 4 bits, {' and '.join(_GPTQ_VERSIONS)}."
        )
    rows, out = _part(parts, "qweight").shape
    return out, 8 * rows


_GPTQ_VERSIONS = {"gptq": 1, "gptq_v2": 2}


def _gptq(arrays: Arrays, options: Mapping[str, Any], module: str) -> Quantized:
    return from_gptq(
        arrays,
        block=_group(options["group_size"]),
        symmetric=bool(options.get("sym", True)),
        indexed=bool(options.get("desc_act", False)),
        version=_GPTQ_VERSIONS[options.get("checkpoint_format") or "gptq"],
    )


def _awq_shape(parts: Mapping[str, Stored], options: Mapping[str, Any]) -> Shape:
    bits = options.get("bits", options.get("w_bit"))
    version = str(options.get("version", options.get("format", "gemm"))).lower()
    if bits != 4 or version != "gemm":
        raise ValueError(
            f"AWQ with bits={bits!r} and version={version!r} is not supported. Supported: 4 bits, "
            "version 'gemm'."
        )
    rows, words = _part(parts, "qweight").shape
    return 8 * words, rows


def _awq(arrays: Arrays, options: Mapping[str, Any], module: str) -> Quantized:
    group = options.get("group_size", options.get("q_group_size", 128))
    return from_awq(arrays, block=_group(group), symmetric=not options.get("zero_point", True))


def _group(size: Any) -> int | None:
    return None if size in (-1, None) else int(size)


def _compressed_shape(parts: Mapping[str, Stored], options: Mapping[str, Any]) -> Shape:
    if "weight_shape" in parts:
        return tuple(parts["weight_shape"].read().tolist())
    if "weight_packed" in parts:
        out, half = parts["weight_packed"].shape
        return out, 2 * half
    return _part(parts, "weight", "weight_packed").shape


def _compressed(arrays: Arrays, options: Mapping[str, Any], module: str) -> Quantized:
    sparse = (options.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense" or options.get("transform_config"):
        raise ValueError(
            f"compressed-tensors with sparsity {sparse!r} and transform_config="
            f"{options.get('transform_config')!r} is not supported. Supported: neither of them."
        )
    group = _group_of(module, options.get("config_groups") or {})
    return from_compressed_tensors(arrays, group["weights"], group.get("format", options["format"]))


def _group_of(module: str, groups: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a module: of the group that names it, else of the one for all linear ones."""

    def names(target: str) -> bool:
        if target.startswith("re:"):
            return re.match(target.removeprefix("re:"), module) is not None
        return target == module

    for fits in (names, lambda target: target == "Linear"):
        for group in groups.values():
            if any(fits(target) for target in group["targets"]):
                return {key: value for key, value in group.items() if value is not None}
    raise ValueError(
        f"none of the config_groups {sorted(groups)} of quantization_config has {module!r} among "
        "its targets."
    )


def _fp8(arrays: Arrays, options: Mapping[str, Any], module: str) -> Quantized:
    tile = options.get("weight_block_size")
    return from_fp8(arrays, tile=None if tile is None else (int(tile[1]), int(tile[0])))


def _fp8_shape(parts: Mapping[str, Stored], options: Mapping[str, Any]) -> Shape:
    return _part(parts, "weight").shape


_WORDS = r"qweight|qzeros|scales|g_idx"
_FP8 = Method(
    r"weight_scale|weight_scale_inv|input_scale|input_scale_ub|activation_scale", _fp8_shape, _fp8
)
METHODS = {
    "bitsandbytes": Method(
        r"absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+"
        r"|SCB|weight_format",
        _bnb_shape,
        _bnb,
    ),
    "gptq": Method(_WORDS, _gptq_shape, _gptq),
    "awq": Method(_WORDS, _awq_shape, _awq),
    # Scales of activations are not used: products here have activations in floats.
    "compressed-tensors": Method(
        r"weight_(?:packed|scale|zero_point|shape|g_idx|global_scale)"
        r"|(?:input|output)_(?:scale|zero_point|global_scale|g_idx)",
        _compressed_shape,
        _compressed,
    ),
    "fp8": _FP8,
    "fbgemm_fp8": _FP8,
}
