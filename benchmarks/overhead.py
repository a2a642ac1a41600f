"""What does a tuning cost before the first step, and per call outside `jit`?

    python benchmarks/overhead.py

A 32-layer Llama-like decoder, LoRA rank 8 on all linear maps, once with its layers in a scan and
once unrolled in a Python loop (linen). Ratios to the same model without an adapter: seconds to
trace and to compile the forward pass, and the forward with the backward pass (for the base: to the
activations). `eager` is a second call of `apply` outside of `jit`, beside the base's jitted call.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from common import write
from flax import nnx

import jaxpeft as jp
from jaxpeft.models import Decoder
from jaxpeft.models.config import from_hf

LAYERS, WIDTH, HEADS, HIDDEN, VOCABULARY = 32, 64, 4, 128, 128
TOKENS = jnp.zeros((2, 16), jnp.int32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def linear(size: int, name: str) -> nn.Dense:
            return nn.Dense(size, use_bias=False, name=name)

        heads = (*x.shape[:-1], HEADS, WIDTH // HEADS)
        n = nn.RMSNorm()(x)
        q, k, v = (linear(WIDTH, f"{c}_proj")(n).reshape(heads) for c in "qkv")
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + linear(WIDTH, "o_proj")(y)
        n = nn.RMSNorm()(x)
        hidden = nn.silu(linear(HIDDEN, "gate_proj")(n)) * linear(HIDDEN, "up_proj")(n)
        return x + linear(WIDTH, "down_proj")(hidden)


class Unrolled(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(VOCABULARY, WIDTH)(tokens)
        for _ in range(LAYERS):
            x = Block()(x)
        return nn.Dense(VOCABULARY)(nn.RMSNorm()(x))


def scanned() -> tuple[Any, Any]:
    sizes = dict(
        model_type="llama", vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
    )  # fmt: skip
    model = Decoder(from_hf(sizes), rngs=nnx.Rngs(0))
    return model, nnx.state(model)


def unrolled() -> tuple[Any, Any]:
    return Unrolled(), Unrolled().init(jax.random.key(0), TOKENS)


def seconds(f: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        f()
        times.append(time.process_time() - start)
    return statistics.median(times)


def milliseconds(call: Callable[[], Any]) -> float:
    """Of a call after the first."""
    jax.block_until_ready(call())
    return round(1e3 * seconds(lambda: jax.block_until_ready(call()), 10), 2)


def prepare(f: Callable[..., Any], args: Any, repeats: int) -> dict[str, float]:
    """Seconds to trace and to compile; a new function each time, so that nothing is remembered."""
    jax.clear_caches()
    trace = seconds(lambda: jax.jit(lambda *a: f(*a)).trace(*args), repeats)
    lowered = [jax.jit(lambda *a: f(*a)).trace(*args).lower() for _ in range(repeats)]
    compiling = iter(lowered)
    return {"trace": trace, "compile": seconds(lambda: next(compiling).compile(), repeats)}


def measure(model: Any, params: Any, repeats: int) -> dict[str, Any]:
    tuned = jp.transform(model, jp.lora(8), strict=True)
    adapter = tuned.init(jax.random.key(0), params, TOKENS)
    rows = jp.partition(params, "**/embedding")

    def base_step(rows: Any, rest: Any) -> Any:
        return jax.grad(lambda rows: tuned.fn(jp.combine(rows, rest), TOKENS).sum())(rows)

    def tuned_step(adapter: Any, params: Any) -> Any:
        return jax.grad(lambda adapter: tuned.apply(adapter, params, TOKENS).sum())(adapter)

    pairs = {
        "forward": ((tuned.fn, (params, TOKENS)), (tuned.apply, (adapter, params, TOKENS))),
        "step": ((base_step, rows), (tuned_step, (adapter, params))),
    }
    result: dict[str, Any] = {}
    for name, (base, ours) in pairs.items():
        base_seconds, our_seconds = prepare(*base, repeats), prepare(*ours, repeats)
        result[name] = {
            f"{phase}_{kind}": round(value, 3)
            for phase in ("trace", "compile")
            for kind, value in (
                ("base", base_seconds[phase]),
                ("tuned", our_seconds[phase]),
                ("ratio", our_seconds[phase] / base_seconds[phase]),
            )
        }
    jitted = jax.jit(tuned.fn)
    result["jitted_base_ms"] = milliseconds(lambda: jitted(params, TOKENS))
    result["eager_ms"] = milliseconds(lambda: tuned.apply(adapter, params, TOKENS))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    models = {"scanned": scanned, "unrolled": unrolled}
    result = {name: measure(*make(), repeats) for name, make in models.items()}
    print(write("overhead", {"layers": LAYERS, "unit": "CPU seconds", **result}).read_text())


if __name__ == "__main__":
    main()
