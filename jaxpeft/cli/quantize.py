"""`jaxpeft quantize`: a model with packed weights, for any program that loads such a model."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from jaxpeft.cli import models as common
from jaxpeft.cli.formats import packed_as, quantization
from jaxpeft.cli.merge import check_output
from jaxpeft.cli.options import Dtype, File, Text


def quantize(
    model: Annotated[Text, tyro.conf.arg(metavar="MODEL")],
    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUTPUT")],
    *,
    format: Annotated[str, tyro.conf.arg(metavar="FORMAT")] = "nf4",
    method: Literal["gptq", "awq"] | None = None,
    dtype: Dtype = "float32",
    force: bool = False,
    cache: File = None,
) -> None:
    """Pack a model's linear layers.

    Writes a Hugging Face directory as bitsandbytes (nf4, fp4, llm_int8) or compressed-tensors
    (int4, int8, fp8, mxfp4, nvfp4) have it, for transformers and for --quantize keep.

    Args:
        model: a Hugging Face directory, a .gguf file, or smollm2-135m-instruct, which is fetched.
        output: the directory to write.
        format: a name with options, such as "nf4:block=128,double=false" or "int4:block=64".
        method: write int4 (or, for gptq, int8) weights as GPTQ or AWQ files have them, with scales
            in float16.
        dtype: of the other weights.
        force: write even if the output directory is not empty.
        cache: where a fetched model is kept, instead of ~/.cache/jaxpeft.
    """
    import jax.numpy as jnp

    from jaxpeft import models

    packing = quantization(format, "float16" if method else None)
    console = Console(highlight=False)
    path = common.locate(model, cache)
    check_output(output, path, force)
    with common.doing(f"Packing {path.name}"):
        loaded, params = models.load(path, dtype=jnp.dtype(dtype), quantize=packing)
        models.save(output, loaded, params, tokenizer_from=path, quant_method=method)
    number = f"{common.count(params):,} parameters"
    console.print(f"Packed {path.name}: {output}/, {number}{packed_as(params)}.", soft_wrap=True)
