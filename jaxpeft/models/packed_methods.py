"""The `quant_method`s of Hugging Face files: the tensors and the options of a packed weight."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxpeft.models.patterns import fits
from jaxpeft.quant.formats import (
    Quantized,
    from_awq,
    from_bitsandbytes,
    from_compressed_tensors,
    from_fp8,
    from_gptq,
    from_llm_int8,
    from_nvfp4,
)

Arrays = dict[str, np.ndarray]
Shape = tuple[int, ...]
Options = Mapping[str, Any]


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


class Method(NamedTuple):
    """How a `quant_method` keeps the weight of a module.

    Attributes:
        parts: a regular expression for the last part of the names of its tensors.
        shape: from these tensors by that part, and the options, to the shape (out, in).
        convert: from their arrays and the options to the packed weight.
        options: what the configuration says of the module of a name.
    """

    parts: str
    shape: Callable[[Mapping[str, Stored], Options], Shape]
    convert: Callable[[Arrays, Options], Quantized]
    options: Callable[[Options, str], Options] = lambda options, module: options


def method_of(options: Any) -> tuple[Method, Options]:
    """The method of a `quantization_config`, and the options in the method's own terms.

    Raises:
        ValueError: it is no dict, or of a method that is not known.
    """
    if not isinstance(options, Mapping):
        raise ValueError(
            f"quantization_config is {options!r:.80}, but should be a dict of options."
        )
    name = options.get("quant_method")
    if name is None and (options.get("load_in_4bit") or options.get("load_in_8bit")):
        name = "bitsandbytes"  # as transformers reads files from before the key
    if name in ("auto-round", "intel/auto-round"):
        return _auto_round(options)
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(
            f"quantization_config with quant_method={name!r:.80} is not supported. Supported: "
            f"{', '.join(METHODS)}, auto-round; unquantized safetensors; and .gguf files."
        )
    return METHODS[name], options


def _auto_round(options: Options) -> tuple[Method, Options]:
    """Its directories are those of other methods, by `packing_format`."""
    packing = options.get("packing_format") or "auto_round:auto_gptq"
    data = (options.get("data_type"), options.get("bits"))
    formats = [fmt for known, fmt in _FP4_DATA.items() if known == data]
    if packing == "auto_round:llm_compressor" and formats:
        group = {"targets": ["Linear"], "weights": {}, "format": formats[0]}
        return METHODS["compressed-tensors"], {"config_groups": {"group_0": group}}
    if not isinstance(packing, str) or packing not in _PACKINGS:
        raise ValueError(
            f"auto-round with packing_format={packing!r:.80}, data_type={data[0]!r:.80} and "
            f"bits={data[1]!r:.80} is not supported. Supported: {', '.join(_PACKINGS)}; "
            "auto_round:llm_compressor with mx_fp or nv_fp of 4 bits."
        )
    name, more = _PACKINGS[packing]
    return METHODS[name], {**options, "zero_point": not options.get("sym", True), **more}


_PACKINGS: dict[str, tuple[str, Options]] = {
    "auto_round:auto_gptq": ("gptq", {"checkpoint_format": "gptq"}),
    "auto_round:gptq": ("gptq", {"checkpoint_format": "gptq"}),
    "auto_round:gptqmodel": ("gptq", {"checkpoint_format": "gptq_v2"}),
    "auto_round": ("gptq", {"checkpoint_format": "gptq_v2"}),
    "auto_round:auto_awq": ("awq", {"version": "gemm"}),
    "auto_round:awq": ("awq", {"version": "gemm"}),
    "auto_round:fp8": ("fp8", {}),
    "auto_round:fp8_static": ("fp8", {}),
}


_FP4_DATA = {("mx_fp", 4): "mxfp4-pack-quantized", ("nv_fp", 4): "nvfp4-pack-quantized"}


def _part(parts: Mapping[str, Any], *names: str) -> Any:
    """The first of these tensors that there is."""
    for name in names:
        if name in parts:
            return parts[name]
    raise ValueError(
        f"{' or '.join(map(repr, names))} is missing among {sorted(parts)}. "
        "Download all files of the model."
    )


def _weight_shape(parts: Mapping[str, Stored], options: Options) -> Shape:
    return _part(parts, "weight").shape


def _bnb_shape(parts: Mapping[str, Stored], options: Options) -> Shape:
    states = [value for part, value in parts.items() if part.startswith("quant_state")]
    if not states:
        _part(parts, "SCB", "quant_state.bitsandbytes__nf4")
        return _part(parts, "weight").shape
    state = json.loads(states[0].read().astype(np.uint8).tobytes())
    return tuple(state["shape"])


def _bnb(arrays: Arrays, options: Options) -> Quantized:
    if "SCB" not in arrays:
        return from_bitsandbytes(arrays)
    order = arrays.get("weight_format", np.zeros((), np.uint8))
    if order.any():
        raise ValueError(f"'weight_format' is {order}; only 0, row by row, is read.")
    return from_llm_int8(arrays, float(options.get("llm_int8_threshold", 6.0)))


_GPTQ_VERSIONS = {"gptq": 1, "gptq_v2": 2}


def _words_options(options: Options, module: str) -> Options:
    """With what GPTQModel's `dynamic`, or auto-round's `extra_config`, says of the module."""
    named = options.get("extra_config") or {}
    if module in named:
        return {**options, **named[module]}
    dynamic = options.get("dynamic") or {}
    for pattern, said in [*dynamic.items(), *named.items()]:
        if fits(pattern.removeprefix("+:"), module):
            return {**options, **said}
    return options


def _gptq_kind(options: Options) -> str:
    """Newer files call it `format`, and some have both names."""
    return str(options.get("checkpoint_format") or options.get("format") or "gptq").lower()


def _gptq_shape(parts: Mapping[str, Stored], options: Options) -> Shape:
    bits, kind, words = options.get("bits"), _gptq_kind(options), options.get("pack_dtype", "int32")
    if bits not in (4, 8) or kind not in _GPTQ_VERSIONS or words != "int32":
        raise ValueError(
            f"GPTQ with bits={bits!r}, checkpoint_format={kind!r} and pack_dtype={words!r} is not "
            f"supported. Supported: 4 and 8 bits, {' and '.join(_GPTQ_VERSIONS)}, int32."
        )
    rows, out = _part(parts, "qweight").shape
    return out, 32 // bits * rows


def _gptq(arrays: Arrays, options: Options) -> Quantized:
    return from_gptq(
        arrays,
        block=_group(options["group_size"]),
        bits=options["bits"],
        symmetric=bool(options.get("sym", True)),
        indexed=bool(options.get("desc_act", False)),
        version=_GPTQ_VERSIONS[_gptq_kind(options)],
    )


def _awq_version(options: Options) -> str:
    keys = ("version", "checkpoint_format", "format")
    return str(next((options[key] for key in keys if options.get(key)), "gemm")).lower()


def _awq_shape(parts: Mapping[str, Stored], options: Options) -> Shape:
    bits, version = options.get("bits", options.get("w_bit")), _awq_version(options)
    if bits != 4 or version not in ("gemm", "gemv"):
        raise ValueError(
            f"AWQ with bits={bits!r} and version={version!r} is not supported. Supported: 4 bits, "
            "versions 'gemm' and 'gemv'."
        )
    rows, columns = _part(parts, "qweight").shape
    return (8 * columns, rows) if version == "gemm" else (rows, 8 * columns)


def _awq(arrays: Arrays, options: Options) -> Quantized:
    group = _group(options.get("group_size", options.get("q_group_size", 128)))
    symmetric = not options.get("zero_point", True)
    return from_awq(arrays, block=group, symmetric=symmetric, version=_awq_version(options))


def _group(size: Any) -> int | None:
    return None if size in (-1, None) else int(size)


def _compressed_shape(parts: Mapping[str, Stored], options: Options) -> Shape:
    if "weight_shape" in parts:
        return tuple(parts["weight_shape"].read().tolist())
    if "weight_packed" in parts:
        out, half = parts["weight_packed"].shape
        return out, 2 * half
    return _part(parts, "weight", "weight_packed").shape


def _compressed(arrays: Arrays, options: Options) -> Quantized:
    return from_compressed_tensors(arrays, options["weights"], options["format"])


def _compressed_options(options: Options, module: str) -> Options:
    sparse = (options.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense" or options.get("transform_config"):
        raise ValueError(
            f"compressed-tensors with sparsity {sparse!r} and transform_config="
            f"{options.get('transform_config')!r} is not supported. Supported: neither of them."
        )
    group = _group_of(module, options.get("config_groups") or {})
    return {"format": options.get("format"), **group}


def _group_of(module: str, groups: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a module: of the group that names it, else of the one for all linear ones."""

    def names(target: str) -> bool:
        if target.startswith("re:"):
            return fits(target.removeprefix("re:"), module)
        return target == module

    for named in (names, lambda target: target == "Linear"):
        for group in groups.values():
            if any(named(target) for target in group["targets"]):
                return {key: value for key, value in group.items() if value is not None}
    raise ValueError(
        f"none of the config_groups {sorted(groups)} of quantization_config has {module!r} among "
        "its targets."
    )


def _fp8(arrays: Arrays, options: Options) -> Quantized:
    tiles = options.get("weight_block_size")
    if "weight_block_size" not in options and arrays.get("weight_scale_inv", np.zeros(())).ndim > 1:
        tiles = (128, 128)  # as transformers reads files without the key
    return from_fp8(arrays, tile=None if tiles is None else (int(tiles[1]), int(tiles[0])))


def _modelopt_shape(parts: Mapping[str, Stored], options: Options) -> Shape:
    out, columns = _part(parts, "weight").shape
    return (out, 2 * columns) if "weight_scale_2" in parts else (out, columns)


def _modelopt(arrays: Arrays, options: Options) -> Quantized:
    if "pre_quant_scale" in arrays:
        raise ValueError("ModelOpt's 'pre_quant_scale' is not supported. Export without it.")
    if "weight_scale_2" in arrays:
        names = ("weight", "weight_scale", "weight_scale_2")
        return from_nvfp4(*(_part(arrays, name) for name in names))
    return from_fp8(arrays)


_WORDS = r"qweight|qzeros|scales|g_idx"
_FP8 = Method(
    r"weight_scale|weight_scale_inv|input_scale|input_scale_ub|activation_scale",
    _weight_shape,
    _fp8,
)
METHODS = {
    "bitsandbytes": Method(
        r"absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+"
        r"|SCB|weight_format",
        _bnb_shape,
        _bnb,
    ),
    "gptq": Method(_WORDS, _gptq_shape, _gptq, _words_options),
    "awq": Method(_WORDS, _awq_shape, _awq, _words_options),
    # Scales of activations are not used: products here have activations in floats.
    "compressed-tensors": Method(
        r"weight_(?:packed|scale|zero_point|shape|g_idx|global_scale)"
        r"|(?:input|output)_(?:scale|zero_point|global_scale|g_idx)",
        _compressed_shape,
        _compressed,
        _compressed_options,
    ),
    "fp8": _FP8,
    "fbgemm_fp8": _FP8,
    "modelopt": Method(
        r"weight_scale|weight_scale_2|input_scale|pre_quant_scale", _modelopt_shape, _modelopt
    ),
}
