"""Checkpoints of a run that continue it bitwise, in Orbax's format."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxpeft.core.memory import on_host

Tree = TypeVar("Tree")


def _manager(directory: Path, keep: int | None = None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=False, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager(directory.absolute(), options=options)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _raw(x: jax.Array) -> jax.Array:
    return jax.random.key_data(x) if _is_key(x) else x


def _flat(tree: Any) -> dict[str, jax.Array]:
    """`{"adapter/layers/q_proj/kernel/a": array}`: paths, not classes, so any tree is plain."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {_name(path): _raw(x) for path, x in leaves}
    if len(flat) != len(leaves):
        raise ValueError(f"two leaves have the same path among {sorted(flat)}. Rename one.")
    return flat


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _shapes(flat: Mapping[str, jax.Array]) -> dict[str, str]:
    return {path: f"{x.dtype}{list(x.shape)}" for path, x in flat.items()}


def latest_step(directory: str | os.PathLike[str]) -> int | None:
    """The step of the newest whole checkpoint in `directory`, or None if it holds none."""
    directory = Path(directory)
    if not directory.is_dir():
        return None
    with _manager(directory) as manager:
        return manager.latest_step()


def save(
    directory: str | os.PathLike[str],
    step: int,
    tree: Any,
    *,
    fingerprint: Mapping[str, Any] | None = None,
    keep: int | None = 3,
) -> None:
    """Writes a checkpoint; it is there whole or, after a crash, not at all.

    Args:
      directory: where the run's checkpoints are; made if it is missing.
      step: number of updates made. A step that is there already is left as it is.
      tree: any pytree of arrays, usually a `State`. Arrays are stored by their path, PRNG keys
        by their data.
      fingerprint: JSON values that say which run this is (model, tuning, data, ...); `restore`
        compares them.
      keep: older checkpoints than the last `keep` are deleted; None keeps all.

    Raises:
      OSError: if it cannot be written, as on a full disk; earlier ones stay.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> directory = tempfile.mkdtemp()
      >>> save(directory, 3, {"a": jnp.arange(2.0)})
      >>> latest_step(directory), restore(directory, {"a": jnp.zeros(2)})["a"].tolist()
      (3, [0.0, 1.0])
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    flat = _flat(tree)
    about = {"fingerprint": dict(fingerprint or {}), "arrays": _shapes(flat)}
    with _manager(directory, keep) as manager:
        if step in manager.all_steps():
            return
        args = {"state": ocp.args.StandardSave(flat), "about": ocp.args.JsonSave(about)}
        whole = manager.latest_step()
        try:
            manager.save(step, args=ocp.args.Composite(**args))
        except (OSError, ValueError) as error:
            kept = "There is none before it" if whole is None else f"That of step {whole} is whole"
            raise OSError(
                f"the checkpoint of step {step} could not be written to {str(directory)!r}: "
                f"{error}. {kept}. Make room on the disk, and resume."
            ) from error


def restore(
    directory: str | os.PathLike[str],
    like: Tree,
    *,
    step: int | None = None,
    fingerprint: Mapping[str, Any] | None = None,
) -> Tree:
    """Reads a checkpoint into the structure, dtypes and shardings of `like`.

    Args:
      directory: what `save` was given.
      like: a tree such as the one saved, usually a fresh `init_state(...)`.
      step: which checkpoint; by default the newest.
      fingerprint: what `save` was given; None compares nothing.

    Returns:
      The tree as it was saved, bit for bit.

    Raises:
      FileNotFoundError: if there is no such checkpoint.
      ValueError: if it was saved by a run with another fingerprint, or other paths, shapes or
        dtypes.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"no directory {str(directory)!r}, so no checkpoint in it.")
    with _manager(directory) as manager:
        steps = sorted(manager.all_steps())
        if not steps or (step is not None and step not in steps):
            raise FileNotFoundError(
                f"{str(directory)!r} has no checkpoint of step {step}; it has the steps {steps}."
                if steps
                else f"{str(directory)!r} has no checkpoints. Start the run without resuming."
            )
        step = steps[-1] if step is None else step
        about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
        _check(f"{directory}/{step}", about, like, fingerprint)
        abstract = {path: _abstract(x) for path, x in _flat(like).items()}
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        flat = manager.restore(step, args=args).state
    return _unflat(flat, like)


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


def _unflat(flat: Mapping[str, jax.Array], like: Tree) -> Tree:
    def leaf(path: Any, x: jax.Array) -> jax.Array:
        value = flat[_name(path)]
        if on_host(x):
            # Orbax gives the array in host memory a type that says device memory.
            value = jax.device_put(np.asarray(value), x.sharding)
        return jax.random.wrap_key_data(value, impl=jax.random.key_impl(x)) if _is_key(x) else value

    return jax.tree_util.tree_map_with_path(leaf, like)


def _check(
    where: str, about: Mapping[str, Any], like: Any, fingerprint: Mapping[str, Any] | None
) -> None:
    parts = []
    if fingerprint is not None:
        parts.append(("run", about["fingerprint"], dict(fingerprint)))
    parts.append(("arrays", about["arrays"], _shapes(_flat(like))))
    for what, saved, now in parts:
        differ = [k for k in sorted({*saved, *now}) if saved.get(k) != now.get(k)]
        if differ:
            lines = [f"  {k}: saved {saved.get(k)}, now {now.get(k)}" for k in differ[:8]]
            more = f"\n  and {len(differ) - 8} more" if len(differ) > 8 else ""
            raise ValueError(
                f"the checkpoint {where} belongs to another run; its {what} differ:\n"
                + "\n".join(lines)
                + f"{more}\nResume with the settings that it was saved with, or choose another "
                "directory."
            )
