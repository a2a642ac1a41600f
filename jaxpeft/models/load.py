"""Load Hugging Face weights into a Flax model."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxpeft.models.families import FAMILIES
from jaxpeft.models.files import Checkpoint, check_layers, open_directory
from jaxpeft.models.gguf import find_gguf, open_gguf
from jaxpeft.models.model import Model
from jaxpeft.models.names import Name
from jaxpeft.models.packed_load import KEEP, keep_weight, pack_weight, plan
from jaxpeft.quant import QuantizedWeight

Weights = dict[str, Any]


def load(
    directory: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    quantize: Any = None,
    task: str | None = None,
    labels: Sequence[str] | int | None = None,
    seed: int = 0,
) -> tuple[Any, nnx.State]:
    """Load a model from a Hugging Face directory, or a decoder from a GGUF file.

    One tensor is read at a time and written straight into its place among the stacked layers, so
    that the peak is the model plus its largest stacked weight. Quantized, it is packed before that:
    no more than one layer of one weight is dense.

    Directories may hold packed weights themselves (`quantization_config` in config.json):
    bitsandbytes, GPTQ and AWQ (4 bits, and GPTQ 8), auto-round, compressed-tensors, ModelOpt (fp8
    and NVFP4) and fp8. So may .gguf files. `quantize=None` makes them dense, `"keep"` does not. The
    layers of a stack share one format; where a file mixes them (Q4_K_M does) that weight becomes
    dense, with a warning which says how to pack it. Activations stay floats, whatever the files say
    of them.

    Args:
        directory: holds `config.json` and safetensors (one file, or shards with their index), or
            exactly one `.gguf` file; or the path of a `.gguf` file.
        dtype: of the loaded weights.
        mesh: devices to spread the weights over. Each weight is split along its largest axis that
            the mesh's first axis divides; the stack of layers is never split. Packed arrays are
            split along the same axis, as far as it divides them.
        quantize: a format such as `jaxpeft.quant.nf4()`, or `rules((pattern, format), ...)`: the
            result is that of `jaxpeft.quantize(params, quantize)`. "keep" in place of a format
            leaves weights packed as the files have them, and others dense. None for dense weights.
        task: what the model is for, such as "sequence-classification"; None for what
            `architectures` in config.json says. Which tasks there are depends on the model.
        labels: the names of a classifier's classes, or their number; None for those in config.json.
        seed: of the random weights of a head that the directory does not have, or has for another
            number of `labels`.

    Returns:
        `(model, params)`: the model's leaves are `jax.ShapeDtypeStruct`s; `params` is the
        `nnx.State` with the arrays, as `nnx.split` would give it.

    Raises:
        FileNotFoundError: there is no model at this path.
        ValueError: the architecture is unknown, it cannot do the task, or a tensor is missing, left
            over or misshapen; a packed weight is damaged, of an unknown method, or cannot be
            quantized as asked; there is nothing to "keep".

    Example:
        >>> model, params = load("path/to/SmolLM2-135M")  # doctest: +SKIP
        >>> logits = model.apply(params, tokens)  # doctest: +SKIP
        >>> model, params = load("path/to/Llama", quantize=jp.quant.nf4())  # doctest: +SKIP
        >>> model, params = load("path/to/Llama-AWQ", quantize="keep")  # doctest: +SKIP
        >>> model, params = load("path/to/bert", task="sequence-classification",
        ...                      labels=["no", "yes"])  # doctest: +SKIP
    """
    checkpoint = open_checkpoint(directory, task, labels)
    family, config = FAMILIES[checkpoint.config.model_type], checkpoint.config

    def build(key: Array) -> Model:
        return family.build(config, dtype=dtype, rngs=nnx.Rngs(key))

    model = nnx.eval_shape(build, jax.random.key(seed))
    rows = {name.path: name for name in model.names()}
    abstract = {"/".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(
        nnx.state(model))}  # fmt: skip
    shapes = {path: tuple(leaf.shape) for path, (_, leaf) in abstract.items()}
    stored = _stored(checkpoint, rows, shapes, relabelled=labels is not None)
    fresh = _fresh(build, seed, [path for path in rows if not stored[path]])
    packed = [path for path in rows if any(t in checkpoint.packed for t in stored[path])]
    hows = plan(quantize, nnx.state(model), packed, checkpoint.where)
    loaded = []
    for path, (keys, leaf) in abstract.items():
        value = fresh.get(path)
        source = _Source(checkpoint, stored[path], rows[path], leaf, value)
        loaded.append((keys, leaf.replace(_place(source.get(hows.get(path)), rows[path], mesh))))
    return model, nnx.from_flat_state(loaded)


class _Source(NamedTuple):
    """Where a weight comes from: its tensors in a checkpoint, or `fresh` values."""

    checkpoint: Checkpoint
    tensors: Sequence[str]
    name: Name
    leaf: Any
    fresh: Any

    def get(self, how: Any) -> Any:
        """The weight, dense for None, else packed in a format or as the checkpoint has it."""
        if how == KEEP:
            kept = keep_weight(self.checkpoint, self.tensors, self.name, self.leaf)
            return self.dense() if kept is None else kept
        if how is not None:
            return pack_weight(self.layers(), how, self.name, self.leaf)
        return self.dense() if self.fresh is None else self.fresh

    def layers(self) -> Iterator[np.ndarray]:
        """One layer after another."""
        if self.fresh is not None:
            yield from self.fresh if self.name.stacked else [self.fresh]
        for tensor in self.tensors:
            yield self.name.from_hf(self.checkpoint.read(tensor))

    def dense(self) -> np.ndarray:
        result = np.empty(self.leaf.shape, self.leaf.dtype)
        rows = result if self.name.stacked else result[None]
        for row, layer in zip(rows, self.layers(), strict=True):
            row[...] = layer
        return result


def open_checkpoint(
    path: str | Path, task: str | None = None, labels: Sequence[str] | int | None = None
) -> Checkpoint:
    """Open whichever kind of model lies at `path`; see `load`."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist. Give the directory of a Hugging Face model "
            "(config.json and model.safetensors), or a .gguf file."
        )
    gguf = find_gguf(path)
    if gguf is None:
        return open_directory(path, task, labels)
    if task not in (None, "causal-lm") or labels is not None:
        raise ValueError(
            f"task={task!r} with labels={labels!r} is not supported for a .gguf file. "
            "Supported: task='causal-lm', which has no labels."
        )
    return open_gguf(gguf)


def _stored(
    checkpoint: Checkpoint,
    rows: Mapping[str, Name],
    shapes: Mapping[str, tuple[int, ...]],
    relabelled: bool,
) -> dict[str, list[str]]:
    """The file's tensors for each weight, in layer order; none for a head that starts afresh."""
    layers = max((shapes[p][0] for p, name in rows.items() if name.stacked), default=0)
    check_layers(layers, checkpoint.shapes, checkpoint.where)
    canonical = FAMILIES[checkpoint.config.model_type].canonical
    found = {canonical(tensor): tensor for tensor in checkpoint.shapes}
    wanted = {p: [canonical(t) for t in name.tensors(shapes[p])] for p, name in rows.items()}
    expected = {path: name.shape(shapes[path]) for path, name in rows.items()}

    def fits(path: str) -> bool:
        held = [found[t] for t in wanted[path] if t in found]
        same = all(checkpoint.shapes[tensor] == expected[path] for tensor in held)
        return bool(held) and (same or not relabelled)

    fresh = {path for path, name in rows.items() if name.head and not fits(path)}
    _check_names(checkpoint, found, wanted, fresh)
    stored = {path: [found[t] for t in wanted[path] if path not in fresh] for path in rows}
    for path, tensors in stored.items():
        _check_shapes(checkpoint, tensors, expected[path])
    return stored


def _check_names(
    checkpoint: Checkpoint,
    found: Mapping[str, str],
    wanted: Mapping[str, list[str]],
    fresh: set[str],
) -> None:
    spare = re.compile("|".join(FAMILIES[checkpoint.config.model_type].spare) or "$")
    known = {tensor for tensors in wanted.values() for tensor in tensors}
    needed = {t for path, tensors in wanted.items() if path not in fresh for t in tensors}
    unknown = {found[t] for t in found.keys() - known if not spare.match(t)}
    for problem, tensors in (("lacks", needed - found.keys()), ("has unknown", unknown)):
        if tensors:
            raise ValueError(
                f"{checkpoint.where} {problem} {len(tensors)} tensors for a "
                f"{checkpoint.config.model_type!r} model: {_some(tensors)}. It has {len(found)} "
                f"tensors: {_some(set(found.values()))}. Does config.json belong to these weights?"
            )


def _check_shapes(
    checkpoint: Checkpoint, tensors: Sequence[str], expected: tuple[int, ...]
) -> None:
    for tensor in tensors:
        if checkpoint.shapes[tensor] != expected:
            raise ValueError(
                f"{tensor!r} in {checkpoint.where} has shape {checkpoint.shapes[tensor]}, "
                f"but config.json asks for {expected}. Does config.json belong to these weights?"
            )


def _some(tensors: set[str], limit: int = 5) -> str:
    rest = f", and {len(tensors) - limit} more" if len(tensors) > limit else ""
    return ", ".join(sorted(tensors)[:limit]) + rest


def _fresh(build: Any, seed: int, paths: Sequence[str]) -> Weights:
    """The random weights at some paths; under `jit` no other is made."""

    @jax.jit
    def init(key: Array) -> Weights:
        state = nnx.to_flat_state(nnx.state(build(key)))
        leaves = {"/".join(map(str, path)): leaf[...] for path, leaf in state}
        return {path: leaves[path] for path in paths}

    return init(jax.random.key(seed)) if paths else {}


def _place(value: Any, name: Name, mesh: Mesh | None) -> Any:
    if isinstance(value, QuantizedWeight):
        return _place_packed(value, name, mesh)
    if mesh is None:
        return jnp.asarray(value)
    return jax.device_put(value, NamedSharding(mesh, spec(value.shape, name.stacked, mesh)))


def _place_packed(weight: QuantizedWeight, name: Name, mesh: Mesh | None) -> QuantizedWeight:
    """Packed arrays `(stack..., in, out)`, split like the weight where blocks allow it."""
    if mesh is None:
        packed = {key: jnp.asarray(array) for key, array in weight.packed.items()}
        return dataclasses.replace(weight, packed=packed)
    whole = spec(weight.shape, name.stacked, mesh)
    # Labels of an unviewed weight are its axes.
    order = [axis for group in weight.groups for axis in group]
    names = [whole[axis] if axis < len(whole) else None for axis in order]
    size = mesh.shape[mesh.axis_names[0]]

    def put(array: Any) -> Array:
        axes = zip(names, array.shape, weight.packed_shape, strict=True)
        parts = [n if full % d == 0 and d % size == 0 else None for n, d, full in axes]
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*parts)))

    return dataclasses.replace(weight, packed={k: put(a) for k, a in weight.packed.items()})


def spec(shape: tuple[int, ...], stacked: bool, mesh: Mesh) -> PartitionSpec:
    """Split the largest axis that the mesh's first axis divides, but not the stack of layers."""
    axis_name = mesh.axis_names[0]
    size = mesh.shape[axis_name]
    axes = [axis for axis in range(int(stacked), len(shape)) if shape[axis] % size == 0]
    if not axes:
        return PartitionSpec()
    largest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*(axis_name if i == largest else None for i in range(len(shape))))
