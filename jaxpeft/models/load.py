"""Load Hugging Face weights into a Flax model."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxpeft.models.decoder import Decoder
from jaxpeft.models.files import Checkpoint, open_directory
from jaxpeft.models.gguf import find_gguf, open_gguf
from jaxpeft.models.names import Name, names

# Buffers that old checkpoints carry and that follow from config.json.
_DERIVED = ("rotary_emb.inv_freq",)


def load(
    directory: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    quantize: Any = None,
) -> tuple[Decoder, nnx.State]:
    """Load a decoder from a Hugging Face directory or a GGUF file.

    One tensor is read at a time and written straight into its place among the stacked layers, so
    that the peak is the model plus its largest stacked weight.

    Args:
        directory: holds `config.json` and safetensors (one file, or shards with their index), or
            exactly one `.gguf` file; or the path of a `.gguf` file.
        dtype: of the loaded weights.
        mesh: devices to spread the weights over. Each weight is split along its largest axis that
            the mesh's first axis divides; the stack of layers is never split.
        quantize: must be None for now.

    Returns:
        `(model, params)`: the model's leaves are `jax.ShapeDtypeStruct`s; `params` is the
        `nnx.State` with the arrays, as `nnx.split` would give it.

    Raises:
        FileNotFoundError: there is no model at this path.
        ValueError: the architecture is unknown, or a tensor is missing, left over or misshapen.

    Example:
        >>> model, params = load("path/to/SmolLM2-135M")  # doctest: +SKIP
        >>> logits = model.apply(params, tokens)  # doctest: +SKIP
    """
    if quantize is not None:
        raise ValueError(
            f"quantize={quantize!r} is not supported yet. Load with quantize=None and pass "
            "the params to a quantizer."
        )
    checkpoint = open_checkpoint(directory)
    config = checkpoint.config
    table = names(config)
    _check_names(checkpoint, table)
    model = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model))
    rows = {name.path: name for name in table}
    loaded = []
    for path, leaf in flat:
        values = _read(checkpoint, rows["/".join(map(str, path))], leaf)
        loaded.append((path, leaf.replace(_place(values, path, mesh))))
    return model, nnx.from_flat_state(loaded)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open whichever kind of model lies at `path`; see `load`."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist. Give the directory of a Hugging Face model "
            "(config.json and model.safetensors), or a .gguf file."
        )
    gguf = find_gguf(path)
    return open_directory(path) if gguf is None else open_gguf(gguf)


def tensor_names(name: Name, layers: int) -> list[str]:
    """The Hugging Face tensors that make up one weight, in layer order."""
    return [name.tensor.format(layer=i) for i in range(layers)] if name.stacked else [name.tensor]


def _check_names(checkpoint: Checkpoint, table: tuple[Name, ...]) -> None:
    config = checkpoint.config
    wanted = {t for name in table for t in tensor_names(name, config.num_hidden_layers)}
    # A tied head may be stored all the same; it equals the embedding.
    known = wanted | ({"lm_head.weight"} if config.tie_word_embeddings else set())
    found = {name for name in checkpoint.shapes if not name.endswith(_DERIVED)}
    for problem, tensors in (("lacks", wanted - found), ("has unknown", found - known)):
        if tensors:
            raise ValueError(
                f"{checkpoint.where} {problem} {len(tensors)} tensors for a {config.model_type!r} "
                f"model of {config.num_hidden_layers} layers: {_some(tensors)}. It has "
                f"{len(found)} tensors: {_some(found)}. Does config.json belong to these weights?"
            )


def _some(tensors: set[str], limit: int = 5) -> str:
    rest = f", and {len(tensors) - limit} more" if len(tensors) > limit else ""
    return ", ".join(sorted(tensors)[:limit]) + rest


def _read(checkpoint: Checkpoint, name: Name, leaf: Any) -> np.ndarray:
    shape, dtype = leaf.shape, leaf.dtype
    expected = shape[1:] if name.stacked else shape
    expected = expected[::-1] if name.transposed else expected
    result = np.empty(shape, dtype)
    rows = result if name.stacked else result[None]
    for row, tensor in zip(rows, tensor_names(name, shape[0]), strict=True):
        if checkpoint.shapes[tensor] != expected:
            raise ValueError(
                f"{tensor!r} in {checkpoint.where} has shape {checkpoint.shapes[tensor]}, "
                f"but config.json asks for {expected}. Does config.json belong to these weights?"
            )
        values = checkpoint.read(tensor)
        row[...] = values.T if name.transposed else values
    return result


def _place(values: np.ndarray, path: tuple[Any, ...], mesh: Mesh | None) -> Array:
    if mesh is None:
        return jnp.asarray(values)
    return jax.device_put(values, NamedSharding(mesh, spec(values.shape, path, mesh)))


def spec(shape: tuple[int, ...], path: tuple[Any, ...], mesh: Mesh) -> PartitionSpec:
    """Split the largest axis that the mesh's first axis divides, but not the stack of layers."""
    axis_name = mesh.axis_names[0]
    size = mesh.shape[axis_name]
    first = 1 if path[0] == "layers" else 0
    axes = [axis for axis in range(first, len(shape)) if shape[axis] % size == 0]
    if not axes:
        return PartitionSpec()
    largest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*(axis_name if i == largest else None for i in range(len(shape))))
