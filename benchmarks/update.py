"""What does an optimizer's step take of a device's memory, with its state there or on the host?

    python benchmarks/update.py            compiled for a TPU v5e ahead of time (needs `libtpu`)

134 million float32 weights that are all trained, as 16 matrices and as one stack of them, without
a model: the step of `jaxpeft.train` is weights, their gradients (as large) and what the optimizer
takes beside them. The numbers are XLA's own, of the device's memory alone. The topology of a GPU
does not know of host memory, so that only a TPU can be asked about it without one.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import write
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from memory import device_of

from jaxpeft import train
from jaxpeft.core.memory import KIND, on_host

OPTIMIZERS = {"adamw": optax.adamw, "adam8bit": train.adam8bit, "lion": optax.lion}
LEAVES = {
    "16 matrices": {str(i): jax.ShapeDtypeStruct((4096, 2048), jnp.float32) for i in range(16)},
    "a stack": {"all": jax.ShapeDtypeStruct((16, 4096, 2048), jnp.float32)},
}


def loss(adapter: Any, params: Any, batch: Any, key: Any) -> Any:
    total = sum(jnp.sum(jnp.sin(w) * batch) for w in jax.tree.leaves(adapter))
    return total, jnp.float32(1)


def placed(make: Any, adapter: Any, device: Any) -> Any:
    """The shapes of a state on a device that is not here, in the memories where it would be."""
    mesh, hosts = Mesh(np.array([device]), ("all",)), []

    def marked(adapter: Any) -> Any:
        state = train.init_state(adapter, make, jax.random.key(0))
        hosts.extend(map(on_host, jax.tree.leaves(state)))
        return state

    def place(x: Any, host: bool) -> Any:
        kind = KIND if host else "device"
        sharding = NamedSharding(mesh, PartitionSpec(), memory_kind=kind)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    leaves, tree = jax.tree.flatten(jax.eval_shape(marked, adapter))
    return tree.unflatten([place(*pair) for pair in zip(leaves, hosts, strict=True)])


def measure(optimizer: Any, adapter: Any, device: Any) -> dict[str, float]:
    state, batch = placed(optimizer, adapter, device), jnp.zeros(2048)
    step: Any = train.make_step(loss, optimizer)
    with jax.set_mesh(Mesh(np.array([device]), ("all",))):
        found = step.lower(state, (), jax.ShapeDtypeStruct(batch.shape, batch.dtype))
        found = found.compile().memory_analysis()
    sizes = (
        found.argument_size_in_bytes,
        found.temp_size_in_bytes,
        found.host_argument_size_in_bytes,
    )
    arguments, temporary, host = (round(size / 2**20) for size in sizes)
    return {"device_mib": arguments + temporary, "temporary_mib": temporary, "host_mib": host}


def main() -> None:
    device, rows = device_of("v5e"), {}
    for name, make in OPTIMIZERS.items():
        for shape, adapter in LEAVES.items():
            for where in ("device", "host"):
                rule = make(1e-3) if where == "device" else train.offload(make(1e-3))
                key = f"{name}, {shape}, state on the {where}"
                rows[key] = measure(rule, adapter, device)
                print(key, json.dumps(rows[key]), flush=True)
    print(
        write("update_v5e", {"compiled_for": f"{device.device_kind}, ahead of time", "rows": rows})
    )


if __name__ == "__main__":
    main()
