"""How fast is a QLoRA training step beside LoRA on dense weights, and bitsandbytes with PEFT?

    python benchmarks/qlora.py                 SmolLM2-135M shape, float32, 4 x 128 tokens
    python benchmarks/qlora.py --shape 1b      Llama 1B shape, bfloat16, 1 x 2048, for a GPU
    python benchmarks/qlora.py --shape 7b      Llama-2-7B shape, bfloat16, 1 x 512, for a GPU
    python benchmarks/qlora.py --shape 70b --contenders matvec copy    its matrices alone
    python benchmarks/qlora.py --contenders qlora lora kernels    any of those in WORKERS

NF4 with double quantization and rank 16 on all linear maps of the layers, AdamW, full
cross-entropy, random weights, nothing recomputed but what each library does by default. Contenders
run in processes of their own and take turns; ratios are of their fastest steps, and of the
processor's time, which says more on a CPU that others use too. `kernels` is ours with the fused
kernels (`compute="pallas"`). `matvec` multiplies one row with eight matrices of the shape's MLP and
reports the packed bytes it reads a second, beside `copy`, which copies an array and reports the
bytes it reads and writes; on a GPU both do so 50 times in one program. The jax workers' `step_mib`
is what XLA says of the compiled step: arguments and temporaries; torch's is the most it allocated
in a step (GPU only).
"""

import argparse
import os
from typing import Any

import train_step
from common import Worker, alternate, serve, write
from train_step import RANK, adapter_step, jax_parts

SHAPES = {
    **train_step.SHAPES,
    "tiny": {**train_step.SHAPES["tiny"], "hidden_size": 64, "intermediate_size": 128},
    "70b": dict(
        vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False,
        rope_theta=1e4, batch=1, length=512, dtype="bfloat16",
    ),
    "7b": dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False,
        rope_theta=1e4, batch=1, length=512, dtype="bfloat16",
    ),
}  # fmt: skip
MATRICES = 8


def ours(shape: dict[str, Any], compute: str | None) -> None:
    """Our step over packed weights, or dense ones where `compute` is None."""
    import jaxpeft as jp

    model, params, tokens = jax_parts(shape)
    tuned = jp.transform(model, jp.lora(RANK), strict=True)
    if compute is not None:
        sites = tuned.sites(params, tokens)
        params = jp.quantize(
            params, jp.rules(("layers/**/kernel", jp.quant.nf4())), sites=sites, compute=compute
        )
    compiled, once, _ = adapter_step(tuned, params, tokens)
    found = compiled.memory_analysis()
    size = found.argument_size_in_bytes + found.temp_size_in_bytes
    serve(once, lambda: {"device": _device(), "step_mib": round(size / 2**20)})


def bitsandbytes(shape: dict[str, Any]) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config, batch, length, dtype = train_step._split(shape)
    config.pop("model_type")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="sdpa"))
    base = _four_bits(base.to(getattr(torch, dtype)), getattr(torch, dtype)).to(device)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=_MAPS)
    model = get_peft_model(base, lora).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.randint(0, config["vocab_size"], (batch, length), device=device)

    def once() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    once()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def report() -> dict[str, Any]:
        peak = round(torch.cuda.max_memory_allocated() / 2**20) if device == "cuda" else None
        return {"device": device, "step_mib": peak}

    serve(once, report)


_MAPS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


def _four_bits(model: Any, dtype: Any) -> Any:
    """The model with bitsandbytes' layers for the linear maps of its layers."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, old in list(part.named_children()):
                if name not in _MAPS:
                    continue
                new = Linear4bit(
                    old.in_features, old.out_features, bias=False, compute_dtype=dtype,
                    compress_statistics=True, quant_type="nf4", device="meta",
                )  # fmt: skip
                new.weight = Params4bit(
                    old.weight.data, requires_grad=False, quant_type="nf4",
                    compress_statistics=True,
                )  # fmt: skip
                setattr(part, name, new)
    model.is_loaded_in_4bit = True
    return model


def matvec(shape: dict[str, Any], compute: str) -> None:
    import jax
    import jax.numpy as jnp

    import jaxpeft as jp

    k, n, dtype = shape["hidden_size"], shape["intermediate_size"], shape["dtype"]
    make = jax.jit(lambda key: jax.random.normal(key, (k, n), jnp.dtype(dtype)))
    everything = jp.rules((lambda *_: True, jp.quant.nf4()))
    packed = [
        jp.quantize(make(jax.random.key(i)), everything, compute=compute) for i in range(MATRICES)
    ]

    @jp.lift
    def products(packed: Any, x: jax.Array) -> jax.Array:
        ys = [x @ w for w in packed]
        # The next turn waits for this one.
        return x + 1e-30 * sum(y[:, :1] for y in ys)

    repeats = _repeats()
    run = jax.jit(
        lambda packed, x: jax.lax.fori_loop(0, repeats, lambda _, x: products(packed, x), x)
    )
    x = jnp.ones((1, k), jnp.dtype(dtype))
    compiled = run.lower(packed, x).compile()
    size = repeats * sum(w.nbytes for w in packed)
    serve(
        lambda: compiled(packed, x).block_until_ready(),
        lambda: {"device": _device(), "bytes": size},
    )


def copy(shape: dict[str, Any]) -> None:
    import jax
    import jax.numpy as jnp

    array, repeats = jnp.ones(2**26, jnp.uint32), _repeats()
    run = jax.jit(lambda x: jax.lax.fori_loop(0, repeats, lambda _, x: x + jnp.uint32(1), x))
    copied = run.lower(array).compile()
    serve(
        lambda: copied(array).block_until_ready(),
        lambda: {"device": _device(), "bytes": 2 * repeats * array.nbytes},
    )


def _repeats() -> int:
    """Turns in one program: on a GPU starting one takes as long as many a product."""
    import jax

    return 1 if jax.default_backend() == "cpu" else 50


def _device() -> str:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    return jax.devices()[0].device_kind


WORKERS = {
    "qlora": lambda shape: ours(shape, "auto"),
    "kernels": lambda shape: ours(shape, "pallas"),
    "lora": lambda shape: ours(shape, None),
    "bitsandbytes": bitsandbytes,
    "floor": train_step.floor_worker,
    "matvec": lambda shape: matvec(shape, "auto"),
    "matvec_kernels": lambda shape: matvec(shape, "pallas"),
    "copy": copy,
}
# On a GPU add the fused kernels: `kernels` and `matvec_kernels`.
USUAL = ["qlora", "lora", "bitsandbytes", "floor", "matvec", "copy"]


def summary(reports: dict[str, dict[str, Any]], shape: dict[str, Any]) -> dict[str, Any]:
    """Tokens and bytes a second, and how the contenders' fastest steps compare with QLoRA's."""
    result: dict[str, Any] = {}
    for name, report in reports.items():
        if "bytes" in report:
            report["gb_per_second"] = round(report["bytes"] / report["seconds_min"] / 1e9, 2)
        elif name != "floor":
            rate = shape["batch"] * shape["length"] / report["seconds_min"]
            report["tokens_per_second"] = round(rate, 1)
    for name, report in reports.items():
        if name.startswith("matvec") and "copy" in reports:
            share = report["gb_per_second"] / reports["copy"]["gb_per_second"]
            result[f"{name}_share_of_copy"] = round(share, 3)
        elif name not in ("qlora", "copy") and "qlora" in reports:
            for kind in ("seconds_min", "cpu_seconds_median"):
                ratio = report[kind] / reports["qlora"][kind]
                result[f"{kind}_of_{name}_over_qlora"] = round(ratio, 3)
    return {**result, "reports": reports}


def table(reports: dict[str, dict[str, Any]]) -> str:
    columns = ("seconds_min", "tokens_per_second", "gb_per_second", "step_mib", "peak_rss_mib")
    rows = [("", *columns)]
    rows += [(name, *(str(r.get(c) or "-") for c in columns)) for name, r in reports.items()]
    return "\n".join("".join(cell.ljust(19) for cell in row) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--worker", choices=WORKERS)
    parser.add_argument("--contenders", nargs="+", choices=WORKERS, default=USUAL)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.worker:
        return WORKERS[arguments.worker](shape)
    workers = [
        Worker(__file__, name, ["--shape", arguments.shape]) for name in arguments.contenders
    ]
    reports = alternate(workers, arguments.steps, warm=1)
    result = {"shape": shape, "rank": RANK, **summary(reports, shape)}
    path = write(f"qlora_{arguments.shape}", result)
    print(table(reports), path, sep="\n")


if __name__ == "__main__":
    main()
