"""`jaxpeft plan`: what tuning a model would take, from its config.json alone."""

from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from jaxpeft.cli import models as common
from jaxpeft.cli.formats import KEEP, Quantize, quantization
from jaxpeft.cli.options import Dtype, File, Glob, Text, check_offload, check_parts, check_range
from jaxpeft.cli.tunings import (
    Narrow,
    Offload,
    Remat,
    Rule,
    in_dtype,
    is_offloaded,
    policy,
    tuning,
)


def plan(
    model: Annotated[Text, tyro.conf.arg(metavar="MODEL")],
    *,
    method: str = "lora:rank=8",
    targets: Glob = None,
    batch_size: int = 8,
    accumulate: int = 1,
    max_length: int = 512,
    optimizer: Rule = "adamw",
    adapter_dtype: Narrow = "float32",
    remat: Remat = "projections",
    offload: Offload | None = None,
    dtype: Dtype = "float32",
    quantize: Quantize = None,
    cache: File = None,
) -> None:
    """Say what tuning a model would take: parameters, and the memory of a training step.

    Nothing is loaded: the step is compiled from shapes, for the device at hand. Of the model its
    config.json is enough, so a model can be planned for before it is downloaded.

    Args:
        model: the directory of a decoder, its config.json, or a .gguf file; or
            smollm2-135m-instruct, which is fetched.
        method: as for `compare`, such as "lora:rank=8", "prefix:tokens=20" or "full".
        targets: which parameters or modules get an adapter, such as "**/{q,v}_proj/kernel".
        batch_size: examples in a step.
        accumulate: work on a batch in that many parts, one after another, to save memory.
        max_length: tokens of the longest batch.
        optimizer: the update rule; adamw8bit keeps AdamW's state in bytes.
        adapter_dtype: of the trained parameters.
        remat: what the backward pass finds kept of a layer: its projections' outputs; only the
            layer's input ("layers"), for a third more time; or everything ("none").
        offload: what waits in host memory, as for `finetune`: "weights", "optimizer" or "all".
        dtype: of the frozen weights.
        quantize: pack the linear layers, as for `finetune`, such as nf4 or int8.
        cache: where a fetched model is kept, instead of ~/.cache/jaxpeft.
    """
    import jax

    import jaxpeft as jp
    from jaxpeft import train

    sizes = {"batch_size": batch_size, "accumulate": accumulate, "max_length": max_length}
    for name, size in sizes.items():
        check_range(name, size, size >= 1, "1 or more")
    check_parts(batch_size, accumulate)
    check_offload(offload, method)
    packing = quantization(quantize)
    console = Console(highlight=False)
    path = common.locate(model, cache)
    decoder, params = common.shapes(path, dtype)
    if decoder.task != "causal-lm":
        raise ValueError(
            f"{path} is a {decoder.config.model_type} for {decoder.task}; plan knows decoders. "
            "`jaxpeft compare` measures the step of an encoder's tuning."
        )
    decoder.remat = policy(remat)
    params = _packed(params, packing)
    if is_offloaded("weights", offload):
        params = train.placed_shapes(jp.offload, params)
    tuned, adapter = _tuned(decoder, params, method, targets, adapter_dtype)
    rule = train.optimizer(1e-3, name=optimizer)
    rule = train.offload(rule) if is_offloaded("optimizer", offload) else rule
    rounded = adapter_dtype != "float32"
    with common.doing("Compiling a step"):
        shape = (batch_size, max_length)
        memory = _memory(tuned, adapter, params, rule, shape, accumulate, rounded)
    total, trained = common.count(params), common.trained(tuned, adapter)
    console.print(f"[bold]Plan[/]: {path}, {decoder.config.model_type}, {total:,} parameters")
    console.print(f"{trained:,} to train ({trained / total:.2%}) at {len(adapter)} sites\n")
    console.print(_table(memory, quantize or dtype))
    if jax.default_backend() == "cpu" and dtype != "float32" and packing is None:
        console.print(
            f"A CPU keeps float32 copies of {dtype} weights; on a GPU or TPU the step takes less."
        )


def _packed(params: Any, packing: Any) -> Any:
    """The shapes of params as they are quantized."""
    import jax

    import jaxpeft as jp

    if packing is None:
        return params
    if packing == KEEP:
        raise ValueError("--quantize keep needs the weights' files. Name their format, like nf4.")
    return jax.eval_shape(lambda params: jp.quantize(params, packing), params)


def _tuned(
    decoder: Any, params: Any, method: str, targets: str | None, dtype: str
) -> tuple[Any, Any]:
    import jax

    import jaxpeft as jp

    tuned = jp.transform(decoder, tuning(method, targets, decoder))

    def init(params: Any) -> Any:
        adapter = tuned.init(jax.random.key(0), params, *decoder.example())
        return in_dtype(tuned, adapter, dtype)

    return tuned, jax.eval_shape(init, params)


def _memory(
    tuned: Any,
    adapter: Any,
    params: Any,
    optimizer: Any,
    shape: tuple[int, int],
    accumulate: int,
    rounded: bool,
) -> Any:
    import jax

    from jaxpeft import train

    trainable, loss = tuned.trainable(adapter), train.causal_lm_loss(tuned.apply)

    def start(adapter: Any) -> Any:
        return train.init_state(adapter, optimizer, jax.random.key(0), trainable=trainable)

    step = train.make_step(
        loss,
        optimizer,
        trainable=trainable,
        micro_batches=accumulate,
        stochastic_rounding=rounded,
    )
    kinds = ("int32", "bool", "bool")
    batch = train.Batch(*(jax.ShapeDtypeStruct(shape, kind) for kind in kinds))
    return train.step_memory(step, train.placed_shapes(start, adapter), params, batch)


def _table(memory: Any, kind: str) -> Table:
    import jax

    table = Table(title=f"A step on {jax.devices()[0].device_kind}")
    table.add_column("what")
    table.add_column("memory", justify="right")
    unknown = "unknown"
    for name, size in (
        (f"weights, {kind}", memory.params),
        ("adapter", memory.adapter),
        ("optimizer", memory.optimizer),
        ("batch", memory.batch),
        ("activations, gradients, workspace", memory.temporaries),
    ):
        table.add_row(name, unknown if size is None else common.megabytes(size))
    table.add_section()
    table.add_row("all", common.megabytes(memory.total))
    if memory.host:
        table.add_section()
        table.add_row("in host memory", common.megabytes(memory.host))
    return table
