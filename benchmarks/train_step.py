"""How long does a LoRA training step take beside torch with Hugging Face PEFT, and in what memory?

    python benchmarks/train_step.py              SmolLM2-135M shape, float32, 4 x 128 tokens
    python benchmarks/train_step.py --shape 1b   Llama 1B shape, bfloat16, 1 x 2048, for a GPU

Rank 16 on all linear maps of the layers, AdamW, full cross-entropy, random weights. Contenders run
in processes of their own and take turns. `floor` is the same model's forward pass and backward pass
to the activations, without an adapter. `matmul` is the rate of one large product, of which
`share_of_matmul` is what a step's products reach. On a GPU add `torch_compiled` to --contenders.
"""

import argparse
import os
from typing import Any

from common import Worker, alternate, serve, write

SHAPES = {
    "135m": dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, rope_theta=1e5,
        batch=4, length=128, dtype="float32",
    ),
    "1b": dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True, rope_theta=5e5,
        batch=1, length=2048, dtype="bfloat16",
    ),
    "tiny": dict(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, rope_theta=1e4,
        batch=2, length=16, dtype="float32",
    ),
}  # fmt: skip
RANK = 16


def _split(shape: dict[str, Any]) -> tuple[dict[str, Any], int, int, str]:
    config = {**shape, "model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
    return config, config.pop("batch"), config.pop("length"), config.pop("dtype")


def jax_parts(shape: dict[str, Any]) -> Any:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxpeft.models import Decoder
    from jaxpeft.models.config import from_hf

    config, batch, length, dtype = _split(shape)
    model = Decoder(from_hf(config), dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    params = nnx.state(model)
    tokens = jax.random.randint(jax.random.key(0), (batch, length), 0, config["vocab_size"])
    return model, params, tokens


def loss_of(logits: Any, tokens: Any) -> Any:
    import jax
    import jax.numpy as jnp

    picked = jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    return (jax.nn.logsumexp(logits[:, :-1].astype(jnp.float32), -1) - picked).mean()


def adapter_step(tuned: Any, params: Any, tokens: Any) -> Any:
    """The compiled step of AdamW, a function that makes one, and the adapter at its start."""
    import jax
    import optax

    adapter = tuned.init(jax.random.key(1), params, tokens)
    optimizer = optax.adamw(1e-4)

    def step(adapter: Any, state: Any, params: Any, tokens: Any) -> Any:
        def loss(adapter: Any) -> Any:
            return loss_of(tuned.apply(adapter, params, tokens), tokens)

        value, gradient = jax.value_and_grad(loss)(adapter)
        updates, state = optimizer.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    state = [adapter, optimizer.init(adapter)]
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*state, params, tokens).compile()

    def once() -> None:
        state[0], state[1], value = compiled(state[0], state[1], params, tokens)
        value.block_until_ready()

    return compiled, once, adapter


def jaxpeft_worker(shape: dict[str, Any]) -> None:
    import jaxpeft as jp

    model, params, tokens = jax_parts(shape)
    tuned = jp.transform(model, jp.lora(RANK), strict=True)
    compiled, once, adapter = adapter_step(tuned, params, tokens)
    serve(once, lambda: _jax_report(compiled, adapter))


def floor_worker(shape: dict[str, Any]) -> None:
    """Each token has a row of its own in the table, so the table's gradient is the activations'."""
    import jax
    import jax.numpy as jnp

    import jaxpeft as jp

    model, params, tokens = jax_parts({**shape, "tie_word_embeddings": False})
    table, rest = jp.partition(params, "embed_tokens/**")
    rows = jax.tree.map(lambda table: table[tokens.reshape(-1)], table)
    own_row = jnp.arange(tokens.size).reshape(tokens.shape)

    def step(rows: Any, rest: Any, tokens: Any) -> Any:
        def loss(rows: Any) -> Any:
            return loss_of(model.apply(jp.combine(rows, rest), own_row), tokens)

        return jax.value_and_grad(loss)(rows)

    compiled = jax.jit(step).lower(rows, rest, tokens).compile()
    serve(
        lambda: jax.block_until_ready(compiled(rows, rest, tokens)), lambda: _jax_report(compiled)
    )


def matmul_worker(shape: dict[str, Any]) -> None:
    import jax
    import jax.numpy as jnp

    size = 8192 if jax.default_backend() != "cpu" else 2048
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(shape["dtype"]))
    product = jax.jit(jnp.matmul).lower(a, a).compile()
    serve(lambda: product(a, a).block_until_ready(), lambda: {"flops": 2 * size**3})


def products(shape: dict[str, Any]) -> int:
    """Operations of a step's products: weights forward and to the activations, the adapter also to
    its own leaves. Attention's own products are left out, so the share is from below."""
    config, batch, length, _ = _split(shape)
    d, f, layers = (config[n] for n in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    maps = [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]
    weights = layers * sum(i * o for i, o in maps) + d * config["vocab_size"]
    adapter = layers * sum(RANK * (i + o) for i, o in maps)
    return batch * length * (4 * weights + 6 * adapter)


def _jax_report(compiled: Any, adapter: Any = ()) -> dict[str, Any]:
    import jax

    analysis = compiled.memory_analysis()
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "peak_device_mib": stats.get("peak_bytes_in_use", 0) // 2**20 or None,
        "device": jax.devices()[0].device_kind,
        "trainable": sum(leaf.size for leaf in jax.tree.leaves(adapter)),
        "arguments_mib": round(analysis.argument_size_in_bytes / 2**20),
        "temporary_mib": round(analysis.temp_size_in_bytes / 2**20),
    }


def torch_worker(shape: dict[str, Any], compiled: bool = False) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config, batch, length, dtype = _split(shape)
    config.pop("model_type")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="sdpa"))
    base = base.to(device, getattr(torch, dtype))
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    model = get_peft_model(base, lora).train()
    run = torch.compile(model) if compiled else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.randint(0, config["vocab_size"], (batch, length), device=device)

    def once() -> None:
        optimizer.zero_grad(set_to_none=True)
        run(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    def report() -> dict[str, Any]:
        peak = torch.cuda.max_memory_allocated() // 2**20 if device == "cuda" else None
        trainable = sum(p.numel() for p in trained)
        return {"device": device, "trainable": trainable, "peak_device_mib": peak}

    once()
    serve(once, report)


WORKERS = {
    "jaxpeft": jaxpeft_worker,
    "torch": torch_worker,
    "torch_compiled": lambda shape: torch_worker(shape, compiled=True),
    "floor": floor_worker,
    "matmul": matmul_worker,
}


def summary(reports: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """The ratios that the question asks for, then what each contender measured."""
    shape = SHAPES[name]
    seconds = {worker: report["seconds_median"] for worker, report in reports.items()}
    result: dict[str, Any] = {
        f"seconds_of_{worker}_over_ours": round(time / seconds["jaxpeft"], 3)
        for worker, time in seconds.items()
        if worker not in ("jaxpeft", "matmul")
    }
    for worker in set(seconds) - {"floor", "matmul"}:
        reports[worker]["tokens_per_second"] = round(
            shape["batch"] * shape["length"] / seconds[worker]
        )
    if "matmul" in reports:
        rate = reports["matmul"].pop("flops") / seconds["matmul"]
        reports["matmul"]["gflops"] = round(rate / 1e9)
        for worker in set(seconds) - {"floor", "matmul"}:
            share = products(shape) / seconds[worker] / rate
            reports[worker]["share_of_matmul"] = round(share, 3)
    return {**result, "reports": reports}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--worker", choices=WORKERS)
    parser.add_argument("--contenders", nargs="+", default=["jaxpeft", "torch", "floor", "matmul"])
    arguments = parser.parse_args()
    if arguments.worker:
        return WORKERS[arguments.worker](SHAPES[arguments.shape])
    workers = [
        Worker(__file__, name, ["--shape", arguments.shape]) for name in arguments.contenders
    ]
    reports = alternate(workers, arguments.steps)
    result = {"shape": SHAPES[arguments.shape], "rank": RANK, **summary(reports, arguments.shape)}
    print(write(f"train_step_{arguments.shape}", result).read_text())


if __name__ == "__main__":
    main()
