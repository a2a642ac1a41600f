"""`Tuned`: a model with a tuning, as pure functions of an adapter and the frozen params."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core import lift as lifting
from jaxpeft.core.method import Leaves, Method, resolve, tune_weight
from jaxpeft.core.report import refuse, warn
from jaxpeft.core.rules import nearest
from jaxpeft.core.sites import Site, discover, listing
from jaxpeft.core.structured import Structured, Sum, dense
from jaxpeft.core.tap import Tap
from jaxpeft.core.tree import leaves_with_paths

Array = jax.Array


class Sites(tuple[Site, ...]):
    """The sites of an adapter. Hashed once, as it is looked at in every call of a jitted step."""

    def __hash__(self) -> int:
        if not hasattr(self, "_hash"):
            self._hash = super().__hash__()
        return self._hash

    def __str__(self) -> str:
        return listing(self)


@jax.tree_util.register_pytree_with_keys_class
class Adapter(Mapping[str, Leaves]):
    """The trainable partition: `{site path: {leaf name: array}}`, a pytree of arrays.

    What is known of each site travels along as static metadata, `adapter.sites`, so that `merge`
    and files need no example inputs.
    """

    def __init__(self, leaves: Mapping[str, Leaves], sites: Sequence[Site]):
        self._leaves = dict(sorted(leaves.items()))
        self.sites = sites if isinstance(sites, Sites) else Sites(sites)

    def __getitem__(self, path: str) -> Leaves:
        return self._leaves[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)

    def __repr__(self) -> str:
        count = sum(getattr(leaf, "size", 0) for leaf in jax.tree.leaves(self))
        return f"Adapter({len(self)} sites, {count:,} parameters)"

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        keyed = [(jax.tree_util.DictKey(path), leaves) for path, leaves in self._leaves.items()]
        return keyed, (tuple(self._leaves), self.sites)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Adapter:
        paths, sites = static
        return cls(dict(zip(paths, children, strict=True)), sites)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A tuned model: what `transform` returns. All of its functions are pure.

    Attributes:
        fn: the model as a function of `(params, *inputs, **kwargs)`.
        tuning: a method, `rules(...)` or `chain(...)`.
        strict: raise where a weight would be materialized.
        head: path of the output head where the model says which one it is, else None.
    """

    fn: Callable[..., Any]
    tuning: Any
    strict: bool = False
    head: str | None = None

    def init(self, key: Array, params: Any, *inputs: Any, **kwargs: Any) -> Adapter:
        """A fresh adapter, which changes nothing yet.

        Args:
            key: a PRNG key.
            params: the model's params; `ShapeDtypeStruct`s will do where no method looks at values.
            *inputs: example inputs, arrays or `ShapeDtypeStruct`s; traced, never computed with.
            **kwargs: keyword arguments of the model's call.

        Returns:
            An `Adapter` with float32 leaves, sharded like the weights that they sit on.

        Raises:
            ValueError: if a rule fits nothing or a method cannot work at its site.
        """
        key = typed_key(key)
        sites = self.sites(params, *inputs, **kwargs)
        chosen = resolve(self.tuning, sites, self.head)
        weights = dict(leaves_with_paths(params)[0])
        by_path = {site.path: site for site in sites}
        leaves = {
            path: method.init(site_key(key, path), by_path[path], weights.get(path))
            for path, method in chosen.items()
        }
        return Adapter(leaves, [by_path[path] for path in chosen])

    def apply(
        self, adapter: Adapter, params: Any, *inputs: Any, dropout_key: Any = None, **kwargs: Any
    ) -> Any:
        """The model's own call with the adapter in it: same arguments, same outputs.

        Args:
            adapter: from `init`, or trained, loaded, averaged, ...
            params: the frozen params, arrays or structured weights.
            *inputs: the model's inputs.
            dropout_key: PRNG key of the adapter's dropout; None means no dropout.
            **kwargs: keyword arguments of the model's call.

        Returns:
            What the model returns.

        Raises:
            ValueError: if the adapter does not belong to these params.
        """
        chosen = self._methods(adapter)
        weights = self._weights(chosen, adapter, params, dropout_key)
        taps = self._taps(chosen, adapter, dropout_key)
        report = refuse if self.strict else warn
        return lifting.call(self.fn, weights, inputs, kwargs, report, taps, params)

    def merge(self, adapter: Adapter, params: Any) -> Any:
        """Plain params for the plain model, with the adapter baked in.

        Sums are made in float32 and rounded once to the dtype of the base: with a bfloat16 base the
        error of a merged weight is at most half a unit in its last place, 2**-8 relative.

        Args:
            adapter: the adapter.
            params: the params that it was made for.

        Returns:
            A tree like `params`, of arrays.

        Raises:
            ValueError: if a method works on activations, or the adapter belongs to other params.
        """
        chosen = self._methods(adapter)
        for path, method in chosen.items():
            if method.call:
                raise ValueError(
                    f"`{method.name}` at {path!r} is not a weight change and cannot be merged. "
                    "Serve it with `apply`, or drop it from the rules before `merge`."
                )
        weights = self._weights(chosen, adapter, params, None)
        return jax.tree.map(dense, weights, is_leaf=lambda x: isinstance(x, Structured))

    def trainable(self, adapter: Adapter) -> Adapter:
        """A mask over the adapter, False at parts that stay fixed; for `optax.masked`."""
        chosen = self._methods(adapter)
        marks = {path: _marks(leaves, chosen[path]) for path, leaves in adapter.items()}
        return Adapter(marks, adapter.sites)

    def sites(self, params: Any, *inputs: Any, **kwargs: Any) -> Sites:
        """Every parameter and how the model uses it. Print it to see the paths that rules match."""
        return Sites(discover(self.fn, params, inputs, kwargs))

    def _methods(self, adapter: Any) -> dict[str, Method]:
        """The method at each of the adapter's sites."""
        if not isinstance(adapter, Adapter):
            raise TypeError(
                f"expected an adapter of `tuned.init` or `load_adapter`, got "
                f"{type(adapter).__name__}. The call is tuned.apply(adapter, params, *inputs)."
            )
        chosen = resolve(self.tuning, adapter.sites, self.head, whole=False)
        foreign = [path for path in adapter if path not in chosen]
        if foreign:
            raise ValueError(
                f"the adapter has {foreign[0]!r}, which this tuning leaves alone. Was the tuning "
                "changed between `init` and `apply`?"
            )
        return chosen

    def _weights(self, chosen: dict[str, Method], adapter: Adapter, params: Any, key: Any) -> Any:
        """`params` with tuned weights in their places."""
        pairs, tree = leaves_with_paths(params, is_leaf=lambda x: isinstance(x, Structured))
        sites = {site.path: site for site in adapter.sites if not chosen[site.path].call}
        _check(sites, dict(pairs))

        def tuned(path: str, leaf: Any) -> Any:
            if path not in sites:
                return leaf
            at_site = None if key is None else site_key(typed_key(key), path)
            return named(tune_weight(chosen[path], sites[path], adapter[path], leaf, at_site), path)

        return tree.unflatten([tuned(path, leaf) for path, leaf in pairs])

    def _taps(self, chosen: dict[str, Method], adapter: Adapter, key: Any) -> dict[str, Tap]:
        """The methods at call boundaries, by name, with their arrays."""
        taps = {}
        for site in adapter.sites:
            if call := chosen[site.path].call:
                stack, keys = site.sizes("stack"), None
                if key is not None:
                    keys = site_key(typed_key(key), site.path)
                    keys = jax.random.split(keys, stack) if stack else keys
                taps[site.path] = Tap(adapter[site.path], keys, site, call, len(stack))
        return taps


def named(weight: Any, path: str) -> Any:
    return Sum((weight,), path) if isinstance(weight, Structured) else weight


def typed_key(key: Any) -> Array:
    if not hasattr(key, "dtype"):
        raise TypeError(
            f"expected a PRNG key such as jax.random.key(0), got {type(key).__name__}. "
            "The call is tuned.init(key, params, *inputs)."
        )
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if is_typed else jax.random.wrap_key_data(key)


def site_key(key: Array, path: str) -> Array:
    """A key of its own for each site, the same in every process."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)


def _marks(leaves: Any, method: Method, prefix: str = "") -> Any:
    if isinstance(leaves, Mapping):
        return {name: _marks(leaf, method, f"{prefix}/{name}") for name, leaf in leaves.items()}
    return prefix.lstrip("/") not in method.fixed


def _check(sites: Mapping[str, Site], weights: Mapping[str, Any]) -> None:
    missing = [path for path in sites if path not in weights]
    if missing:
        near = nearest(missing[0], list(weights))
        raise ValueError(
            f"adapter was made for {len(sites)} sites, but {len(missing)} are not in params; "
            f"missing: {', '.join(map(repr, missing[:3]))}. "
            f"Nearest: {', '.join(map(repr, near))}. "
            "Pass the params of the model that the adapter was made for."
        )
    for path, site in sites.items():
        shape = tuple(weights[path].shape)
        if shape != site.shape:
            raise ValueError(
                f"adapter was made for {path!r} of shape {site.shape}, params have {shape}. "
                "Pass the params of the model that the adapter was made for."
            )


def transform(
    fn: Callable[..., Any], tuning: Any, *, strict: bool = False, head: str | None = None
) -> Tuned:
    """A tuned version of a pure function of `(params, *inputs)`; see `jaxpeft.transform`."""
    return Tuned(fn, tuning, strict, head)
