"""Directories with packed weights, written by those whose formats they are."""

import dataclasses
import json
import warnings

import jax
import numpy as np
import torch
import transformers

import jaxpeft as jp
from tests.models import tiny

WIDE = dict(hidden_size=64, intermediate_size=128)  # blocks of 64 fit
TOKENS = np.random.default_rng(1).integers(3, 64, (2, 12))


def wide_model(model_type="llama", **options):
    """A random transformers model in float32."""
    config = transformers.AutoConfig.for_model(model_type, **tiny.SIZES | WIDE | options)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def by_bitsandbytes(dense, directory, **options):
    """`dense` as transformers quantizes and saves it with bitsandbytes."""
    config = transformers.BitsAndBytesConfig(**options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=config, dtype=torch.float32
    )
    model.save_pretrained(directory)


def by_compressed_tensors(model, directory, **weights):
    """A model quantized by the nearest values and written as llm-compressor does it."""
    from compressed_tensors import quantization as ct
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    group = dict(targets=["Linear"], weights=weights)
    config = ct.QuantizationConfig(
        config_groups={"group_0": group}, ignore=["lm_head"], quantization_status="initialized"
    )
    ct.apply_quantization_config(model, config)
    for module in model.modules():
        if not hasattr(module, "quantization_scheme"):
            continue
        args, w = module.quantization_scheme.weights, module.weight.data
        parts = w.reshape(1, 1, -1) if args.strategy == "tensor" else w.reshape(len(w), 1, -1)
        if args.strategy == "group":
            parts = w.reshape(len(w), -1, args.group_size)
        scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
        module.weight_scale.data = scale.reshape(module.weight_scale.shape)
        if not args.symmetric:
            module.weight_zero_point.data = zero.reshape(module.weight_zero_point.shape)
        module.quantization_status = ct.QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)


def logits_of(directory, dtype=torch.float32):
    """What transformers makes of a directory, computed in float32.

    bitsandbytes multiplies in bfloat16 where no gradient is wanted, so one is. compressed-tensors'
    weights are made dense as they are loaded, unless there are several groups of them, which
    transformers would take for one.
    """
    said = json.loads((directory / "config.json").read_text())["quantization_config"]
    options = {}
    if said["quant_method"] == "compressed-tensors" and len(said["config_groups"]) == 1:
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    if said["quant_method"] == "fp8":
        options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="eager", **options
        ).train()
        if options:
            model = model.float()
        return model(torch.tensor(TOKENS)).logits.detach().numpy()


def same(a, b):
    """Whether two trees are equal, packed arrays and all, to the bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs
    )


def formats_in(params):
    """The formats of quantized weights by path."""
    is_leaf = lambda x: isinstance(x, jp.quant.QuantizedWeight)  # noqa: E731
    pairs = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)[0]
    paths = {"/".join(str(k.key) for k in keys if hasattr(k, "key")): leaf for keys, leaf in pairs}
    return {path: leaf.format for path, leaf in paths.items() if is_leaf(leaf)}


def made_dense(params):
    """The tree with quantized weights as the arrays that they stand for."""
    is_leaf = lambda x: isinstance(x, jp.quant.QuantizedWeight)  # noqa: E731
    dense = lambda x: x.materialize() if is_leaf(x) else x  # noqa: E731
    return jax.tree.map(dense, params, is_leaf=is_leaf)


def counting(checkpoint, each):
    """The checkpoint, whose every read of a tensor first calls `each`."""

    def read(name):
        each()
        return checkpoint.read(name)

    return dataclasses.replace(checkpoint, read=read)
