"""What memory does a training step of a 7B model take, and ten tasks on disk?

    python benchmarks/memory.py                       compiled for the platform at hand
    python benchmarks/memory.py --ahead v5e h100      and for these, ahead of time, without one
    python benchmarks/memory.py --storage             bytes on disk of real files

Llama-2-7B's shape (and Llama-3-8B's), batch 1 x 512, rank 8 on the query and value maps, layers
recomputed in the backward pass (nothing saved). Shapes alone: nothing of this size is allocated,
the numbers are XLA's own, of the compiled step (`compiled.memory_analysis()`), whose adapter and
optimizer state are donated. `weights` are the frozen arrays, `step` is arguments and temporaries
together, `peak` what XLA says of the whole. Full fine-tuning has AdamW's moments in bfloat16, as
its weights are; the well known 28 GB are its weights and gradients alone.

Ahead of time for a TPU needs `libtpu`, for a GPU the CUDA plugin of jax 0.11; neither needs the
device. XLA's CPU backend keeps bfloat16 weights in float32 as well, which no accelerator does.
`--storage` saves the real SmolLM2-135M, which `jaxpeft.assets` fetches.
"""

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import write
from flax import nnx
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxpeft as jp
from jaxpeft.models.config import from_hf
from jaxpeft.train.loss import next_token_loss

SHAPES = {
    "llama-2-7b": dict(vocab_size=32000, intermediate_size=11008, num_key_value_heads=32),
    "llama-3-8b": dict(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8),
    "tiny": dict(vocab_size=256, intermediate_size=256, num_key_value_heads=32),
}
COMMON = dict(
    model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
    max_position_embeddings=4096, rms_norm_eps=1e-5,
)  # fmt: skip
ROWS = [
    ("llama-2-7b", "qlora"), ("llama-2-7b", "lora"), ("llama-2-7b", "full"),
    ("llama-2-7b", "full, adam8bit"), ("llama-3-8b", "qlora"),
]  # fmt: skip
TOKENS, RANK = (1, 512), 8
CLAIMS = {
    "QLoRA of a 7B model": "about 8 GB",
    "torchtune, QLoRA of an 8B model": "7.4 GiB",
    "full fine-tuning of a 7B model, weights and gradients alone": "28 GB",
}
TPUS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}


def gib(size: float) -> float:
    return round(size / 2**30, 3)


def bytes_of(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def abstract(shape: str) -> tuple[Any, Any]:
    """The model and its params, as shapes."""
    config = from_hf({**COMMON, **SHAPES[shape]})
    remat = jax.checkpoint_policies.nothing_saveable
    model = nnx.eval_shape(
        lambda: jp.models.Decoder(config, dtype=jnp.bfloat16, remat=remat, rngs=nnx.Rngs(0))
    )
    return model, nnx.state(model)


def loss_of(logits: Any, tokens: Any) -> Any:
    total, count = next_token_loss(logits, tokens, jnp.ones(tokens.shape, bool))
    return total / count


def training(shape: str, kind: str) -> tuple[Any, tuple[Any, ...]]:
    """A training step `(trained, state, frozen, tokens)` and the shapes of its arguments."""
    model, params = abstract(shape)
    tokens = jax.ShapeDtypeStruct(TOKENS, jnp.int32)
    optimizer = jp.train.adam8bit(1e-4) if kind.endswith("adam8bit") else optax.adamw(1e-4)
    tuned = jp.transform(model, jp.rules(("**/{q,v}_proj/kernel", jp.lora(RANK))), strict=True)
    if kind.startswith("full"):
        trained, frozen, apply = params, (), lambda trained, _, tokens: tuned.fn(trained, tokens)
    else:
        if kind == "qlora":
            sites = tuned.sites(params, tokens)
            params = jax.eval_shape(lambda p: jp.quantize(p, jp.quant.nf4(), sites=sites), params)
        start = lambda params: tuned.init(jax.random.key(0), params, tokens)  # noqa: E731
        trained, frozen, apply = jax.eval_shape(start, params), params, tuned.apply

    def step(trained: Any, state: Any, frozen: Any, tokens: Any) -> Any:
        def loss(trained: Any) -> Any:
            return loss_of(apply(trained, frozen, tokens), tokens)

        value, gradient = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value

    return step, (trained, jax.eval_shape(optimizer.init, trained), frozen, tokens)


def device_of(name: str) -> Any:
    """A described device, none of which needs to be here."""
    if name in TPUS:
        return topologies.get_topology_desc(TPUS[name], platform="tpu").devices[0]
    config = (Path(__file__).parent / "topologies" / f"{name}.txtpb").read_text()
    found = topologies.get_topology_desc(
        name, platform="cuda", target_config=config, topology="1x1x1"
    )
    return found.devices[0]


def compiled(step: Any, arguments: Any, device: Any) -> Any:
    """The step for this platform, or for a described device with layouts that XLA chooses."""
    if device is None:
        return jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    mesh = Mesh(np.array([device]), ("all",))
    place = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments
    )
    free = Format(Layout.AUTO, place)
    jitted = jax.jit(step, donate_argnums=(0, 1), in_shardings=free, out_shardings=free)
    with jax.set_mesh(mesh):
        return jitted.lower(*placed).compile()


def measure(shape: str, kind: str, device: Any) -> dict[str, Any]:
    step, arguments = training(shape, kind)
    trained, _, frozen, _ = arguments
    try:
        found = compiled(step, arguments, device).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"does_not_fit": str(error).split(": ", 1)[1].splitlines()[0]}
    # Donated arguments and the outputs that take their places are the same memory.
    fresh = found.output_size_in_bytes - found.alias_size_in_bytes
    whole = found.argument_size_in_bytes + fresh + found.temp_size_in_bytes
    return {
        "trainable": sum(math.prod(x.shape) for x in jax.tree.leaves(trained)),
        "weights_gib": gib(bytes_of(frozen) or bytes_of(trained)),
        "arguments_gib": gib(found.argument_size_in_bytes),
        "temporary_gib": gib(found.temp_size_in_bytes),
        "step_gib": gib(whole),
        "peak_gib": gib(getattr(found, "peak_memory_in_bytes", 0)) or None,
    }


def storage(tasks: int = 10) -> dict[str, Any]:
    """Bytes on disk: a full copy for each task, against one base and an adapter for each."""
    from jaxpeft.assets import fetch

    model, params = jp.models.load(fetch("smollm2-135m-instruct"), dtype=jnp.bfloat16)
    tuned = jp.transform(model, jp.rules(("**/{q,v}_proj/kernel", jp.lora(RANK))), strict=True)
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        jp.models.save(home / "base", model, params)
        for task in range(tasks):
            key = jax.random.key(task)
            adapter = tuned.init(key, params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
            jp.hf.save_adapter(home / f"adapter-{task}", tuned, adapter)
        sizes = {path.name: _size(path) for path in home.iterdir()}
    base = sizes.pop("base")
    return {
        "model": "smollm2-135m-instruct, bfloat16",
        "tasks": tasks,
        "base_mib": round(base / 2**20, 2),
        "adapters_mib": round(sum(sizes.values()) / 2**20, 2),
        "full_copies_mib": round(tasks * base / 2**20, 2),
        "times_less": round(tasks * base / (base + sum(sizes.values())), 2),
    }


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ahead", nargs="*", default=[], help="v5e, v6e, h100")
    parser.add_argument("--no-here", action="store_true", help="only those ahead of time")
    parser.add_argument("--storage", action="store_true")
    arguments = parser.parse_args()
    if arguments.storage:
        return print(write("storage", storage()).read_text())
    here = [] if arguments.no_here else [(jax.devices()[0].device_kind, None)]
    for name, device in [*here, *((name, device_of(name)) for name in arguments.ahead)]:
        rows: dict[str, Any] = {}
        for shape, kind in ROWS:
            rows[f"{shape} {kind}"] = measure(shape, kind, device)
            print(name, shape, kind, rows[f"{shape} {kind}"], flush=True)
        kind = name if device is None else f"{device.device_kind}, ahead of time"
        result = {"compiled_for": kind, "tokens": TOKENS, "rank": RANK, "claims": CLAIMS}
        print(write(f"memory_{name}", {**result, "rows": rows}))


if __name__ == "__main__":
    main()
