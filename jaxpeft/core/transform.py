"""`Tuned`: a model with a tuning, as pure functions of an adapter and the frozen params."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxpeft.core import lift as lifting
from jaxpeft.core import virtual as virtuals
from jaxpeft.core.adapter import Adapter as Adapter
from jaxpeft.core.adapter import Sites as Sites
from jaxpeft.core.adapter import is_shared, shared_inits, shared_site
from jaxpeft.core.arguments import Names, argument_names
from jaxpeft.core.boundary import reading, shared_leaves, taps_of, unmergeable
from jaxpeft.core.first import warn_of_first
from jaxpeft.core.keys import site_key, typed_key
from jaxpeft.core.method import (
    Method,
    Needs,
    methods_of,
    resolve,
    spread,
    together,
    tune_weight,
)
from jaxpeft.core.report import refuse, warn
from jaxpeft.core.rules import nearest
from jaxpeft.core.site import Site
from jaxpeft.core.sites import discover
from jaxpeft.core.structured import Structured, Sum, dense
from jaxpeft.core.tree import leaves_with_paths

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A tuned model: what `transform` returns. All of its functions are pure.

    Attributes:
        fn: the model as a function of `(params, *inputs, **kwargs)`.
        tuning: a method, `rules(...)` or `chain(...)`.
        strict: raise where a weight would be materialized.
        head: path of the output head where the model says which one it is, else None.
        names: `(kwargs) -> names` of the positional arguments of the model's call after params.
        beside: whether the model's attentions take keys and values that a prefix made longer.
    """

    fn: Callable[..., Any]
    tuning: Any
    strict: bool = False
    head: str | None = None
    names: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda kwargs: ()
    beside: bool = False

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
        if not self.beside:
            _check_everywhere(chosen, sites)
        weights = dict(leaves_with_paths(params, is_leaf=_is_structured)[0])
        by_path = {site.path: reading(site, chosen, sites) for site in sites}
        leaves = {
            path: method.init(site_key(key, path), by_path[path], weights.get(path))
            for path, method in chosen.items()
        }
        shared = {path: f(site_key(key, path)) for path, f in shared_inits(chosen).items()}
        common = [shared_site(path.partition(":")[2]) for path in shared]
        adapter = Adapter(leaves | shared, [by_path[path] for path in chosen] + common)
        self._check_first(chosen, adapter, params, inputs, kwargs)
        return adapter

    def apply(
        self,
        adapter: Adapter,
        params: Any,
        *inputs: Any,
        dropout_key: Any = None,
        virtual: str = "cut",
        **kwargs: Any,
    ) -> Any:
        """The model's own call with the adapter in it: same arguments, same outputs.

        Args:
            adapter: from `init`, or trained, loaded, averaged, ...
            params: the frozen params, arrays or structured weights.
            *inputs: the model's inputs.
            dropout_key: PRNG key of the adapter's dropout; None means no dropout.
            virtual: where the virtual tokens of prompts and prefixes are. "cut": put in front of
                these tokens and cut from the outputs. "keep": put in front, and the outputs keep
                them. "held": the cache that this call continues holds them already.
            **kwargs: keyword arguments of the model's call, and of methods (`task_ids`).

        Returns:
            What the model returns.

        Raises:
            ValueError: if the adapter does not belong to these params.
        """
        chosen = self._methods(adapter)
        needs = together([method.needs for method in chosen.values()])
        own = {name: kwargs.pop(name, None) for name in needs.inputs}
        weights = self._weights(chosen, adapter, params, dropout_key, own)
        fn, front = self._lengthened(chosen, adapter, virtual, own, kwargs)
        own["mask"] = self._mask(chosen, adapter, needs, inputs, kwargs) if needs.mask else None
        taps = taps_of(chosen, adapter, params, dropout_key, own)
        kwargs = self._shift(needs) | kwargs
        report = refuse if self.strict else warn
        # A method of the model other than its call may well pass by some of the boundaries.
        whole = kwargs.get("method") is None and virtual == "cut"
        return lifting.call(fn, weights, (*front, *inputs), kwargs, report, taps, params, whole)

    def decode(self, adapter: Adapter, params: Any, *inputs: Any, **kwargs: Any) -> Any:
        """`apply` for tokens that continue a cache: virtual tokens are in front of it already."""
        return self.apply(adapter, params, *inputs, virtual="held", **kwargs)

    def virtual_ids(self, adapter: Adapter, batch: int, **own: Any) -> Array:
        """The ids that stand for the virtual tokens, for models that decode one token at a time.

        Feed them first, with `decode`, then the tokens: a cache then holds what `apply` puts there.

        Args:
            adapter: the adapter.
            batch: number of sequences.
            **own: keyword arguments of methods (`task_ids`).

        Returns:
            `int32[batch, virtual_tokens]`.
        """
        return virtuals.front_ids(self._fronts(self._methods(adapter), adapter), batch, own)

    @property
    def virtual_tokens(self) -> int:
        """Virtual tokens in front of a sequence, which take slots of a cache."""
        needs = together([method.needs for method in methods_of(self.tuning)])
        found = dict.fromkeys(v for v in needs.virtual if not v.beside(self.beside))
        prefix = max((virtual.length for virtual in found if virtual.rows is None), default=0)
        return prefix + sum(virtual.length for virtual in found if virtual.rows is not None)

    def merge(
        self,
        adapter: Adapter,
        params: Any,
        *,
        store: Callable[[str, Any], Any] = lambda path, weight: dense(weight),
    ) -> Any:
        """Plain params for the plain model, with the adapter baked in.

        Sums are made in float32 and rounded once to the dtype of the base: with a bfloat16 base the
        error of a merged weight is at most half a unit in its last place, 2**-8 relative.

        Args:
            adapter: the adapter.
            params: the params that it was made for.
            store: `(path, weight) -> leaf`, called with one leaf after the other. `weight` is an
                array, or a structured weight that nothing has made dense yet, as this does by
                default. `jaxpeft.quant.merge` packs it.

        Returns:
            A tree like `params`, of arrays.

        Raises:
            ValueError: if a method works on activations, or the adapter belongs to other params.
        """
        chosen = self._methods(adapter)
        for path, method in chosen.items():
            if method.call or method.needs.virtual:
                raise ValueError(unmergeable(path, method))
        weights = self._weights(chosen, adapter, params, None, {})
        pairs, tree = leaves_with_paths(weights, is_leaf=_is_structured)
        return tree.unflatten([store(path, weight) for path, weight in pairs])

    def trainable(self, adapter: Adapter) -> Adapter:
        """A mask over the adapter, False at parts that stay fixed; for `optax.masked`."""
        chosen = self._methods(adapter)
        fixed = {leaf for method in chosen.values() for leaf in method.fixed}
        marks = {
            path: _marks(leaves, chosen[path].fixed if path in chosen else fixed, f"{path}/")
            for path, leaves in adapter.items()
        }
        return Adapter(marks, adapter.sites)

    def sites(self, params: Any, *inputs: Any, **kwargs: Any) -> Sites:
        """Every parameter and how the model uses it. Print it to see the paths that rules match."""
        own = together([method.needs for method in methods_of(self.tuning)]).inputs
        kwargs = {name: value for name, value in kwargs.items() if name not in own}
        return Sites(discover(self.fn, params, inputs, kwargs, self.names(kwargs)))

    def _methods(self, adapter: Any) -> dict[str, Method]:
        """The method at each of the adapter's sites."""
        if not isinstance(adapter, Adapter):
            raise TypeError(
                f"expected an adapter of `tuned.init` or `load_adapter`, got "
                f"{type(adapter).__name__}. The call is tuned.apply(adapter, params, *inputs)."
            )
        sites = [site for site in adapter.sites if not is_shared(site)]
        chosen = resolve(self.tuning, sites, self.head, whole=False)
        common = shared_inits(chosen)
        foreign = [path for path in adapter if path not in chosen and path not in common]
        if foreign:
            raise ValueError(
                f"the adapter has {foreign[0]!r}, which this tuning leaves alone. Was the tuning "
                "changed between `init` and `apply`?"
            )
        return chosen

    def _weights(
        self, chosen: dict[str, Method], adapter: Adapter, params: Any, key: Any, own: Any
    ) -> Any:
        """`params` with tuned weights in their places."""
        pairs, tree = leaves_with_paths(params, is_leaf=_is_structured)
        sites = {s.path: s for s in adapter.sites if s.path in chosen and not chosen[s.path].call}
        _check(sites, dict(pairs))

        def tuned(path: str, leaf: Any) -> Any:
            if path not in sites:
                return leaf
            at_site = None if key is None else site_key(typed_key(key), path)
            leaves = spread(chosen[path], sites[path], adapter[path], own)
            leaves = leaves | shared_leaves(chosen[path], adapter)
            return named(tune_weight(chosen[path], sites[path], leaves, leaf, at_site), path)

        return tree.unflatten([tuned(path, leaf) for path, leaf in pairs])

    def _shift(self, needs: Needs) -> dict[str, int]:
        """The offsets of positions that a prefix beside the sequence asks for."""
        moved = [v for v in needs.virtual if v.shift and v.beside(self.beside)]
        offset = max((v.length for v in moved), default=0)
        queries = any(v.shift == "queries" for v in moved)
        names = ["position_offset"] * bool(moved) + ["query_offset"] * queries
        return dict.fromkeys(names, offset)

    def _lengthened(
        self, chosen: dict[str, Method], adapter: Adapter, mode: str, own: Any, kwargs: Any
    ) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The model with virtual tokens in front, and what it takes in front of its inputs."""
        if mode not in virtuals.MODES:
            raise ValueError(f"virtual={mode!r} is none of {virtuals.MODES}.")
        blocks = self._fronts(chosen, adapter)
        if not blocks or mode == "held":
            return self.fn, ()
        fn = virtuals.Lengthened(self.fn, blocks, self.names(kwargs), mode == "cut")
        return fn, ({front.virtual.task: own.get(front.virtual.task) for front in blocks},)

    def _check_first(
        self, chosen: dict[str, Method], adapter: Adapter, params: Any, inputs: Any, kwargs: Any
    ) -> None:
        own = together([method.needs for method in chosen.values()]).inputs
        kwargs = {name: value for name, value in kwargs.items() if name not in own}
        named = self.named_inputs(inputs, kwargs)
        warn_of_first(self.fn, params, named, self._fronts(chosen, adapter), (inputs, kwargs))

    def named_inputs(self, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of a call by the names of the model's arguments."""
        names = dict(enumerate(self.names(kwargs)))
        return {names.get(i, str(i)): value for i, value in enumerate(inputs)} | dict(kwargs)

    def _mask(
        self, chosen: dict[str, Method], adapter: Adapter, needs: Needs, inputs: Any, kwargs: Any
    ) -> Array | None:
        """The mask of the call's tokens, for methods that attend to them."""
        if needs.sequence and kwargs.get("cache") is not None:
            names = ", ".join(sorted({m.name for m in chosen.values() if m.needs.sequence}))
            raise ValueError(
                f"`{names}` attends to whole sequences, of which a call with a cache has a part. "
                "Call without a cache."
            )
        fronts = self._fronts(chosen, adapter)
        return virtuals.mask_of(self.named_inputs(inputs, kwargs), needs.mask, fronts)

    def _fronts(self, chosen: dict[str, Method], adapter: Adapter) -> tuple[virtuals.Front, ...]:
        """The blocks of virtual tokens around a sequence."""
        return virtuals.fronts(
            [
                (site.path, site.shape[0] if site.shape else 0, virtual)
                for site in adapter.sites
                if site.path in chosen
                for virtual in chosen[site.path].needs.virtual
                if not virtual.beside(self.beside)
            ]
        )


def _is_structured(leaf: Any) -> bool:
    return isinstance(leaf, Structured)


def _check_everywhere(chosen: Mapping[str, Method], sites: Sequence[Site]) -> None:
    everywhere = together([method.needs for method in chosen.values()]).everywhere
    without = [s.path for s in sites if everywhere and everywhere(s) and s.path not in chosen]
    if without:
        raise ValueError(
            f"{without[0]!r} has no method, though others like it have. The placeholders in front "
            "of the sequence would be seen there as tokens. Let the rules match all of them."
        )


def named(weight: Any, path: str) -> Any:
    return Sum((weight,), path) if isinstance(weight, Structured) else weight


def _marks(leaves: Any, fixed: Any, path: str, prefix: str = "") -> Any:
    """True at the leaves to train; `fixed` has names of leaves, or of those at shared sites."""
    if isinstance(leaves, Mapping):
        return {
            name: _marks(leaf, fixed, path, f"{prefix}/{name}") for name, leaf in leaves.items()
        }
    name = prefix.lstrip("/")
    return name not in fixed and path + name not in fixed


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
    fn: Callable[..., Any],
    tuning: Any,
    *,
    strict: bool = False,
    head: str | None = None,
    names: Callable[[Mapping[str, Any]], tuple[str, ...]] | None = None,
    beside: bool = False,
) -> Tuned:
    """A tuned version of a pure function of `(params, *inputs)`; see `jaxpeft.transform`."""
    return Tuned(fn, tuning, strict, head, names or Names(argument_names(fn)[1:]), beside)
