"""What must hold of a tuned model that somebody else wrote, whatever it is."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft as jp
from jaxpeft.core.tree import leaves_with_paths

RANK = 2
FORMATS = [jp.quant.nf4(32), jp.quant.int8()]
Tree = Any


@dataclasses.dataclass(frozen=True)
class Example:
    """A model and one call of it.

    Attributes:
        model: what `jp.transform` takes.
        run: the model's own call, `(params, *inputs) -> outputs`, with nothing of ours in it.
        params: its params.
        inputs: of the call.
        kwargs: of the call.
        read: picks one array of the outputs.
    """

    model: Any
    run: Callable[..., Any]
    params: Tree
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    read: Callable[[Any], jax.Array] = lambda out: out

    def base(self, params: Tree, inputs: Any) -> jax.Array:
        return self.read(self.run(params, *inputs, **self.kwargs))


def check(example: Example, tuning: Any, paths: Iterable[str]) -> Tree:
    """Holds a tuning of `example` to all of the laws; `paths` are the sites that it must find.

    `strict=True` refuses any place where a weight would become dense.
    """
    tuned = jp.transform(example.model, tuning, strict=True)
    kwargs, inputs, params = example.kwargs, example.inputs, spread(example.params)

    def apply(adapter: Tree, params: Tree, inputs: Any) -> jax.Array:
        return example.read(tuned.apply(adapter, params, *inputs, **kwargs))

    def merged(adapter: Tree, params: Tree, inputs: Any) -> jax.Array:
        return example.base(tuned.merge(adapter, params), inputs)

    fresh = tuned.init(jax.random.key(0), params, *inputs, **kwargs)
    assert sorted(fresh) == sorted(paths)
    report_trace_time(example, lambda params, inputs: apply(fresh, params, inputs))

    run, run_merged = (
        jax.jit(jax.value_and_grad(scalar(f), has_aux=True)) for f in (apply, merged)
    )
    expected = jax.jit(example.base)(params, inputs)
    close(run(fresh, params, inputs)[0][1], expected, 1e-6)

    adapter = filled(fresh)
    (_, outputs), grads = run(adapter, params, inputs)
    (_, expected_outputs), expected_grads = run_merged(adapter, params, inputs)
    assert distance(outputs, expected) > 1e-3, "the adapter changes nothing"
    close(outputs, expected_outputs, 1e-5)
    for path in grads:
        for name, grad in grads[path].items():
            assert np.abs(grad).max() > 0, f"no gradient for {path}: {name}"
            close(grad, expected_grads[path][name], 1e-4, f"{path}: {name}")
    return adapter


def check_packed(example: Example, fmt: Any, tuning: Any = None) -> list[str]:
    """Holds LoRA over packed weights to what it gives over the weights that they stand for.

    Returns the paths of the weights that were packed: all that products use, and whose inputs are
    whole blocks of the format, but tables.
    """
    tuned = jp.transform(example.model, tuning or jp.lora(RANK), strict=True)
    kwargs, inputs, params = example.kwargs, example.inputs, spread(example.params)
    packed = jp.quantize(params, fmt, sites=tuned.sites(params, *inputs, **kwargs))
    pairs, _ = leaves_with_paths(packed, is_leaf=is_packed)
    weights = {path: leaf for path, leaf in pairs if is_packed(leaf)}
    dense = jax.tree.map(dense_of, packed, is_leaf=is_packed)
    adapter = filled(tuned.init(jax.random.key(0), packed, *inputs, **kwargs))

    def apply(adapter: Tree, params: Tree) -> jax.Array:
        return example.read(tuned.apply(adapter, params, *inputs, **kwargs))

    def kept(adapter: Tree, params: Tree) -> Any:
        return jax.vjp(lambda adapter: scalar(apply)(adapter, params)[0], adapter)[1]

    @jax.jit
    def run(adapter: Tree, *bases: Tree) -> Any:
        f = jax.value_and_grad(scalar(apply), has_aux=True)
        return [f(adapter, params) for params in bases]

    ((_, got), grads), ((_, wanted), wanted_grads) = run(adapter, packed, dense)
    close(got, wanted, 1e-5)
    for path in grads:
        for name, grad in grads[path].items():
            close(grad, wanted_grads[path][name], 1e-4, f"{path}: {name}")
    merged, wanted_merged = (tuned.merge(adapter, p) for p in (packed, dense))
    for ours, theirs in zip(*map(jax.tree.leaves, (merged, wanted_merged)), strict=True):
        if jnp.issubdtype(ours.dtype, jax.dtypes.prng_key):
            continue
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    shapes = {sides(shape) for w in weights.values() for shape in (w.shape, w.packed_shape)}
    program = jax.make_jaxpr(kept)(adapter, packed).jaxpr
    made = [v.aval for v in program.outvars if v not in program.invars]
    assert not shapes & {sides(a.shape) for a in made if jnp.issubdtype(a.dtype, jnp.floating)}
    return sorted(weights)


def sides(shape: Iterable[int]) -> tuple[int, ...]:
    """What a shape and those of its transposes have in common."""
    return tuple(sorted(size for size in shape if size > 1))


def is_packed(leaf: Any) -> bool:
    return isinstance(leaf, jp.quant.QuantizedWeight)


def dense_of(leaf: Any) -> Any:
    return leaf.materialize() if is_packed(leaf) else leaf


def scalar(f: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The mean of the outputs, each with a weight of its own."""

    def loss(*args: Any) -> tuple[jax.Array, jax.Array]:
        out = f(*args)
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return (weights * out).mean(), out

    return loss


def filled(adapter: Tree) -> Tree:
    """The adapter with every leaf random, so that it changes the outputs."""
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten(
        [0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    )


def spread(params: Tree) -> Tree:
    """Params away from where they start: no zero biases, and weights that the outputs show."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape, leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else leaf
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return tree.unflatten(noisy)


def distance(got: Any, expected: Any) -> float:
    """The largest difference, relative to the largest value."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def close(got: Any, expected: Any, tolerance: float, what: str = "outputs") -> None:
    assert np.isfinite(np.asarray(got)).all()
    assert distance(got, expected) < tolerance, what


def report_trace_time(example: Example, apply: Callable[..., Any]) -> None:
    """Prints how much longer the tuned model takes to trace than the model alone.

    In turns, and the best of several, because early traces also fill JAX's caches.
    """
    args = example.params, example.inputs
    times = [[seconds(f, args) for f in (example.base, apply)] for _ in range(5)]
    base, tuned = (min(column) for column in zip(*times, strict=True))
    print(f"\n  trace: {1e3 * base:.0f} ms, tuned {1e3 * tuned:.0f} ms, ratio {tuned / base:.1f}")


def seconds(f: Callable[..., Any], args: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    jax.make_jaxpr(lambda *args: f(*args))(*args)
    return time.perf_counter() - start
