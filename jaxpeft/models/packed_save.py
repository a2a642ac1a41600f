"""Packed weights as tensors of a Hugging Face directory, and the `quantization_config` of them."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpeft.models.names import LINEAR, Name
from jaxpeft.quant import QuantizedWeight
from jaxpeft.quant.formats import (
    GGUF,
    Format,
    Int4,
    Integer,
    LLMInt8,
    MixedGGUF,
    Quantized,
    to_awq,
    to_bitsandbytes,
    to_compressed_tensors,
    to_gptq,
    to_llm_int8,
)
from jaxpeft.quant.formats.host import Plain, Worded

Arrays = dict[str, np.ndarray]
METHODS = {
    "bitsandbytes": ("nf4", "fp4", "llm_int8"),
    "compressed-tensors": ("int4", "int8", "fp8", "mxfp4", "nvfp4"),
    "gptq": ("int4", "int8"),
    "awq": ("int4",),
}


class Writer(NamedTuple):
    """How packed weights are written.

    Attributes:
        config: the `quantization_config` of config.json.
        tensors: from the packed weight of a layer to arrays, by the last part of their names.
    """

    config: dict[str, Any]
    tensors: Callable[[Quantized], Arrays]


class Layers(NamedTuple):
    """The packed weights of a model, and the modules whose weights are dense."""

    packed: Sequence[tuple[Name, QuantizedWeight]]
    dense: list[str]
    dtype: str

    @property
    def formats(self) -> set[Format]:
        """Of the packed weights."""
        return {weight.format for _, weight in self.packed}


def writer(
    names: Sequence[Name], leaves: Mapping[str, Any], dtype: str, method: str | None
) -> Writer | None:
    """How to write what is packed among a model's weights.

    Args:
        names: of the weights.
        leaves: the weights by path.
        dtype: of the dense ones.
        method: one of `METHODS`; None for the usual one of their formats.

    Returns:
        None if everything is dense.

    Raises:
        ValueError: the formats do not go into one directory, or not into one of this method.
    """
    layers = Layers(
        [(n, leaves[n.path]) for n in names if isinstance(leaves[n.path], QuantizedWeight)],
        _dense_modules(names, leaves),
        dtype,
    )
    if not layers.packed:
        if method is not None:
            raise ValueError(f"quant_method={method!r}, but params hold no quantized weights.")
        return None
    write = _WRITERS[_method(layers.formats, method)]
    for name, weight in layers.packed:
        check_axes(name, weight)
        if name.axes != LINEAR:
            raise ValueError(
                f"{name.path!r} is packed, but in a directory only linear layers are. Save it "
                "dense: put weight.materialize() in its place."
            )
    return write(layers)


def layer_of(weight: QuantizedWeight, name: Name, layer: int) -> Quantized:
    """One layer of a packed weight, as numpy arrays of the kernel (in, out)."""
    arrays = {key: np.asarray(a[layer] if name.stacked else a) for key, a in weight.packed.items()}
    return Quantized(arrays, weight.format, weight.packed_shape[-2:])


def _method(formats: set[Format], method: str | None) -> str:
    kinds = sorted({fmt.name for fmt in formats})
    if {Plain.name, Worded.name} & set(kinds):
        raise ValueError(
            "params lie in host memory, where jaxpeft.offload has put them. Save the params that "
            "it was given."
        )
    if {GGUF.name, MixedGGUF.name} & set(kinds):
        raise ValueError(
            "GGUF blocks go into a .gguf file alone: save('model.gguf', model, params, "
            "tokenizer_from='original.gguf'). For a directory, load the weights dense or in "
            "another format."
        )
    if method is not None and method not in METHODS:
        raise ValueError(f"quant_method={method!r} is none of {', '.join(METHODS)}.")
    wanted = METHODS if method is None else {method: METHODS[method]}
    for found, known in wanted.items():
        if set(kinds) <= set(known):
            return found
    raise ValueError(
        f"params hold weights in {', '.join(kinds)}, which one directory"
        f"{f' of {method!r}' if method else ''} cannot hold. There are: "
        + "; ".join(f"{found} with {', '.join(known)}" for found, known in METHODS.items())
        + "."
    )


def check_axes(name: Name, weight: QuantizedWeight) -> None:
    """Refuses a packed weight whose blocks do not run along the inputs of a matrix (out, in)."""
    if weight.tail or weight.groups != name.roles(len(weight.shape)):
        raise ValueError(
            f"{name.path!r} is quantized in a way that files do not have: blocks run along the "
            f"axes {weight.groups[1]} of {weight.shape}. Save it dense: put weight.materialize() "
            "in its place."
        )


def _dense_modules(names: Sequence[Name], leaves: Mapping[str, Any]) -> list[str]:
    """Linear layers that are not packed. A tied head has no weight of its own."""
    linear = [name for name in names if name.axes == LINEAR]
    dense = [
        tensor.removesuffix(".weight")
        for name in linear
        if not isinstance(leaves[name.path], QuantizedWeight)
        for tensor in name.tensors(leaves[name.path].shape)
    ]
    heads = [name for name in linear if name.tensor == "lm_head.weight"]
    return dense if heads else [*dense, "lm_head"]


def _one(layers: Layers, what: str) -> Any:
    """The single format of all weights."""
    if len(layers.formats) > 1:
        listed = ", ".join(sorted(map(str, layers.formats)))
        raise ValueError(f"{what} has the same options for all weights, but params hold {listed}.")
    return next(iter(layers.formats))


def _bitsandbytes(layers: Layers) -> Writer:
    kinds = {(fmt.name, getattr(fmt, "threshold", None)) for fmt in layers.formats}
    if len(kinds) > 1:
        _one(layers, "a bitsandbytes directory")
    # transformers leaves these dense whatever llm_int8_skip_modules says.
    if wo := [name.path for name, _ in layers.packed if name.tensor.endswith(".wo.weight")]:
        raise ValueError(
            f"transformers reads no bitsandbytes weights in {', '.join(wo)} of a T5. Leave 'wo' "
            "dense, with rules that name the other projections, or use int8 or fp8."
        )
    fmt: Any = next(iter(layers.formats))
    eight = isinstance(fmt, LLMInt8)
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": not eight,
        "load_in_8bit": eight,
        "llm_int8_skip_modules": layers.dense,
        "llm_int8_threshold": fmt.threshold if eight else 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "bnb_4bit_compute_dtype": layers.dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4" if eight else fmt.name,
        "bnb_4bit_use_double_quant": bool(getattr(fmt, "double", False)),
    }
    if eight:
        row_by_row = {"weight_format": np.zeros((), np.uint8)}
        return Writer(config, lambda weight: to_llm_int8(weight) | row_by_row)

    def tensors(weight: Quantized) -> Arrays:
        arrays = to_bitsandbytes(weight, layers.dtype)
        return {key if key == "weight" else f"weight.{key}": a for key, a in arrays.items()}

    return Writer(config, tensors)


def _compressed(layers: Layers) -> Writer:
    """A group of modules for each set of options."""
    groups: list[dict[str, Any]] = []
    for name, weight in layers.packed:
        _, options, kind = to_compressed_tensors(layer_of(weight, name, 0))
        same = [group for group in groups if (group["weights"], group["format"]) == (options, kind)]
        if not same:
            same = [{"targets": [], "weights": options, "format": kind}]
            groups += same
        same[0]["targets"].append(_pattern(name))
    if len(groups) == 1:
        groups[0]["targets"] = ["Linear"]
    kinds = {group["format"] for group in groups}
    more = {"input_activations": None, "output_activations": None}
    config = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "config_groups": {f"group_{i}": group | more for i, group in enumerate(groups)},
        "ignore": layers.dense,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return Writer(config, lambda weight: to_compressed_tensors(weight).arrays)


def _pattern(name: Name) -> str:
    module = re.escape(name.tensor.removesuffix(".weight"))
    return "re:" + module.replace(re.escape("{layer}"), r"\d+") + "$"


def _gptq(layers: Layers) -> Writer:
    fmt: Integer = _one(layers, "a GPTQ directory")
    # GPTQModel refuses zero points in files of version 1 that others have written.
    version = 1 if fmt.symmetric else 2
    config = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "bits": fmt.bits,
        "group_size": fmt.block or -1,
        "sym": fmt.symmetric,
        "desc_act": fmt.indexed,
        "lm_head": any(name.tensor == "lm_head.weight" for name, _ in layers.packed),
        "modules_in_block_to_quantize": [_inside_blocks(layers)],
        **_left_dense(layers),
    }
    return Writer(config, lambda weight: to_gptq(weight, version=version))


def _inside_blocks(layers: Layers) -> list[str]:
    """The packed modules, as they are called in their layer: what optimum looks for."""
    modules = (name.tensor.removesuffix(".weight") for name, _ in layers.packed)
    return [module.partition("{layer}.")[2] for module in modules if "{layer}." in module]


def _left_dense(layers: Layers) -> dict[str, Any]:
    """The modules without packed weights, as GPTQModel has it and as others do."""
    return {
        "dynamic": {f"-:^{re.escape(module)}$": {} for module in layers.dense},
        "modules_to_not_convert": layers.dense,
    }


def _awq(layers: Layers) -> Writer:
    fmt: Int4 = _one(layers, "an AWQ directory")
    config = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": fmt.block or -1,
        "zero_point": not fmt.symmetric,
        **_left_dense(layers),
    }
    return Writer(config, to_awq)


_WRITERS: dict[str, Callable[[Layers], Writer]] = {
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed,
    "gptq": _gptq,
    "awq": _awq,
}
