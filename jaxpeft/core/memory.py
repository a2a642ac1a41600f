"""Host memory: arrays that wait there, and are moved to the device where they are used.

The space of an array is part of its type, so that inside of `jit`, too, it is known, and a move is
part of the program.
"""

from typing import Any

import jax

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
KIND = "pinned_host"


class NoHostMemoryError(RuntimeError):
    """The devices of an array have no host memory that their programs can read."""


def on_host(x: Any) -> bool:
    """Whether an array is in host memory."""
    return jax.typeof(x).memory_space == HOST


def to_host(tree: Any) -> Any:
    """The arrays of a tree in host memory; scalars stay where they are.

    Raises:
        NoHostMemoryError: the devices of an array have none.
    """
    return jax.tree.map(_to_host, tree)


def to_device(tree: Any) -> Any:
    """The arrays of a tree in device memory."""
    return jax.tree.map(lambda x: jax.device_put(x, DEVICE) if on_host(x) else x, tree)


def as_in(tree: Any, other: Any) -> Any:
    """The arrays of a tree in the memory where those of another tree like it are."""
    return jax.tree.map(lambda x, y: to_host(x) if on_host(y) else x, tree, other)


def _to_host(x: Any) -> Any:
    if not x.ndim or on_host(x):
        return x
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        for device in x.devices():
            kinds = [memory.kind for memory in device.addressable_memories()]
            if KIND not in kinds:
                raise NoHostMemoryError(
                    f"{device} has no {KIND!r} memory; it has {kinds}. Leave the arrays on it."
                )
    return jax.device_put(x, HOST)
