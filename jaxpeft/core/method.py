"""What a method is, and which method works at which site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxpeft.core.rules import Chain, Rules, Where, compile_pattern, unmatched
from jaxpeft.core.site import Site
from jaxpeft.core.tap import Here
from jaxpeft.core.virtual import Virtual

Array = jax.Array
Leaves = dict[str, Any]


class Needs(NamedTuple):
    """What a method wants of the call that it works in.

    Attributes:
        virtual: tokens that it puts in front of the sequence.
        inputs: keyword arguments of `apply` that are its own, such as "task_ids".
        reads: `(site) -> patterns` of frozen parameters and of other boundaries whose values `call`
            sees, as `here.weights` and `here.sources`.
        attention: it works at the queries, keys or values of attentions.
        grows: `(glob, count)`: modules inside of which sequences are `count` rows longer, the new
            rows last.
        everywhere: `(site) -> bool`: sites that must all have the method, or none.
        states: names of values that its sites hand on from one to the next, in the order of the
            program: `call` finds those of the sites in front as `here.states`, and returns `(x,
            states)` with those that it changes. A loop carries a state that began in front of it.
        mask: arguments of the model's call, of which the first that is given is the mask of its
            tokens, `bool[B, T]`: the method sees it as `here.inputs["mask"]`, None without one.
        sequence: it attends to whole sequences, so that a call with a cache is refused.
        present: `(option, glob)`: options of the method that name modules or call boundaries, of
            which the model must have one.
    """

    virtual: tuple[Virtual, ...] = ()
    inputs: tuple[str, ...] = ()
    reads: tuple[Callable[[Site], tuple[Where, ...]], ...] = ()
    attention: bool = False
    grows: tuple[tuple[str, int], ...] = ()
    everywhere: Callable[[Site], bool] | None = None
    states: tuple[str, ...] = ()
    mask: tuple[str, ...] = ()
    sequence: bool = False
    present: tuple[tuple[str, str], ...] = ()


def together(needs: Sequence[Needs]) -> Needs:
    """The needs of several methods at once."""
    return Needs(
        tuple(virtual for need in needs for virtual in need.virtual),
        tuple(dict.fromkeys(name for need in needs for name in need.inputs)),
        tuple(read for need in needs for read in need.reads),
        any(need.attention for need in needs),
        tuple(dict.fromkeys(grow for need in needs for grow in need.grows)),
        next((need.everywhere for need in needs if need.everywhere), None),
        tuple(dict.fromkeys(name for need in needs for name in need.states)),
        tuple(dict.fromkeys(name for need in needs for name in need.mask)),
        any(need.sequence for need in needs),
        tuple(dict.fromkeys(pair for need in needs for pair in need.present)),
    )


class Method(NamedTuple):
    """A way to tune one site: a small immutable value that holds pure functions.

    A method works on a parameter (`weight`) or on activations at a call boundary (`call`).

    Attributes:
        name: such as "lora".
        init: `(key, site, weight) -> leaves`, the adapter's arrays at one site. `weight` may be a
            `ShapeDtypeStruct` for methods that do not look at its values.
        weight: `(site, leaves, weight, key) -> array or Structured`, the tuned weight. `key` is a
            typed PRNG key for dropout, or None.
        call: `(site, leaves, x, here) -> x`, the tuned activations `(..., features)`; `here` is a
            `jaxpeft.core.tap.Here`. Inside a scan the leaves are those of one layer. With
            `needs.states` it returns `(x, states)`.
        fits: `(site) -> bool`, where the method can work.
        bare: `(site) -> bool`, where it goes when given to `transform` without rules.
        options: the factory's arguments, for files and reports.
        fixed: names of leaves that are not trained.
        shared: `{name: (key) -> leaves}`, leaves that all sites of all methods with this name have
            in common. They stand at "shared:name" in the adapter, and as `leaves["shared"][name]`
            in what `weight` and `call` are given.
        needs: what else it wants of the call.
        spread: `(site, leaves, inputs) -> leaves`, what `weight` and `call` are given in place of
            the adapter's leaves, before a scan takes them apart; `inputs` are the arguments of
            `apply` that `needs` names, none in `merge`.
    """

    name: str
    init: Callable[[Array, Site, Any], Leaves]
    weight: Callable[[Site, Leaves, Any, Array | None], Any] | None
    fits: Callable[[Site], bool]
    bare: Callable[[Site], bool]
    options: Mapping[str, Any] = {}
    fixed: tuple[str, ...] = ()
    call: Callable[[Site, Leaves, Any, Here], Any] | None = None
    shared: Mapping[str, Callable[[Array], Leaves]] = {}
    needs: Needs = Needs()
    spread: Callable[[Site, Leaves, Mapping[str, Any]], Leaves] | None = None


def spread(method: Method, site: Site, leaves: Leaves, inputs: Mapping[str, Any]) -> Leaves:
    """The leaves of one site as the method's functions are given them."""
    return method.spread(site, leaves, inputs) if method.spread else leaves


def spread_stages(stages: Mapping[str, Method]) -> Any:
    """`Method.spread` of a method made of others, whose leaves stand under these names."""
    if not any(method.spread for method in stages.values()):
        return None

    def spread_all(site: Site, leaves: Leaves, inputs: Mapping[str, Any]) -> Leaves:
        return leaves | {n: spread(m, site, leaves[n], inputs) for n, m in stages.items()}

    return spread_all


def tune_weight(method: Method, site: Site, leaves: Leaves, weight: Any, key: Any = None) -> Any:
    """The tuned weight of one site; an error for a method that works on activations."""
    if method.weight is None:
        raise ValueError(f"`{method.name}` works on activations, not on the weight {site.path!r}.")
    return method.weight(site, leaves, weight, key)


def resolve(
    tuning: Any, sites: Sequence[Site], head: str | None = None, *, whole: bool = True
) -> dict[str, Method]:
    """The method at each site that has one.

    Args:
        tuning: a method, `Rules` or `Chain`.
        sites: the candidates.
        head: path of the output head, which a bare method leaves alone.
        whole: `sites` are all of the model's, so that a rule which fits none is an error.

    Returns:
        Methods by path, in the order of `sites`.

    Raises:
        ValueError: if nothing is tuned, or a rule fits nothing.
        TypeError: if `tuning` is no tuning.
    """
    if whole:
        for method in methods_of(tuning):
            _check_present(method, sites)
    if isinstance(tuning, Method):
        found = {s.path: tuning for s in sites if tuning.bare(s) and s.path != head}
    elif isinstance(tuning, Rules):
        found = _first_fit(tuning, sites, whole)
    elif isinstance(tuning, Chain):
        found = _chained([resolve(t, sites, head, whole=whole) for t in tuning.tunings], sites)
    else:
        raise TypeError(f"a tuning is a method, rules(...) or chain(...), got {tuning!r}.")
    if whole and not found:
        raise ValueError(
            f"the tuning fits none of the {len(sites)} parameters: no product uses one as a linear "
            "map. Use `tuned.sites(params, *inputs)` to list them."
        )
    return found


def _first_fit(tuning: Rules, sites: Sequence[Site], whole: bool) -> dict[str, Method]:
    matchers = [(where, compile_pattern(where), method) for where, method in tuning.pairs]
    if whole:
        for where, matches, method in matchers:
            _check_rule(where, matches, method, sites)
    found = {}
    for site in sites:
        for _, matches, method in matchers:
            if matches(site.path, site) and _fits(method, site):
                found[site.path] = method
                break
    return found


def _fits(method: Any, site: Site) -> bool:
    return bool(method.fits(site))


def _check_rule(where: Any, matches: Any, method: Any, sites: Sequence[Site]) -> None:
    if not isinstance(method, Method):
        raise TypeError(f"rules: {where!r} is paired with {method!r}, which is no method.")
    matched = [site for site in sites if matches(site.path, site)]
    if not matched:
        raise ValueError(unmatched(where, [site.path for site in sites], "parameters"))
    if not any(_fits(method, site) for site in matched):
        shown = ", ".join(repr(site.path) for site in matched[:3])
        apart = method.spread and not any(site.axes("stack") for site in matched)
        why = "they are no stack of layers" if apart else "no product uses them as a linear map"
        raise ValueError(
            f"where={where!r} matched {shown}, but `{method.name}` cannot work there: {why}. Use "
            "`full()` to train them, or another pattern."
        )


def _check_present(method: Any, sites: Sequence[Site]) -> None:
    """Raises where an option of a method names modules that the model does not have."""
    for option, glob in method.needs.present if isinstance(method, Method) else ():
        boundaries = [site.path for site in sites if site.boundary]
        modules = dict.fromkeys(path.rpartition(":")[0] for path in boundaries)
        paths, matches = [*modules, *boundaries], compile_pattern(glob)
        if not any(matches(path, None) for path in paths):
            what = "modules and call boundaries"
            raise ValueError(f"`{method.name}`: {unmatched(glob, paths, what, option)}")


def _chained(found: Sequence[dict[str, Method]], sites: Sequence[Site]) -> dict[str, Method]:
    paths = [site.path for site in sites if any(site.path in methods for methods in found)]
    return {path: compose([methods.get(path) for methods in found]) for path in paths}


def compose(methods: Sequence[Method | None]) -> Method:
    """Methods one after the other at one site; the leaves of each stand under its number."""
    stages = {str(i): method for i, method in enumerate(methods) if method is not None}
    boundary = any(method.call for method in stages.values())
    needs = together([method.needs for method in stages.values()])

    def init(key: Array, site: Site, weight: Any) -> Leaves:
        return {
            name: method.init(jax.random.fold_in(key, int(name)), site, weight)
            for name, method in stages.items()
        }

    def stage(leaves: Leaves, name: str) -> Leaves:
        shared = leaves.get(SHARED)
        return leaves[name] if shared is None else leaves[name] | {SHARED: shared}

    def tuned(site: Site, leaves: Leaves, weight: Any, key: Array | None) -> Any:
        for name, method in stages.items():
            weight = tune_weight(method, site, stage(leaves, name), weight, _fold(key, name))
        return weight

    def called(site: Site, leaves: Leaves, x: Any, here: Here) -> Any:
        changed: dict[str, Any] = {}
        for name, method in stages.items():
            assert method.call is not None
            states = {**here.states, **changed}
            at_stage = here._replace(key=_fold(here.key, name), states=states)
            x = method.call(site, stage(leaves, name), x, at_stage)
            if method.needs.states:
                x, after = x
                changed |= after
        return (x, changed) if needs.states else x

    return Method(
        name="+".join(method.name for method in stages.values()),
        init=init,
        weight=None if boundary else tuned,
        fits=lambda site: all(method.fits(site) for method in stages.values()),
        bare=lambda site: True,
        options={name: method.options for name, method in stages.items()},
        fixed=tuple(f"{n}/{leaf}" for n, method in stages.items() for leaf in method.fixed),
        call=called if boundary else None,
        shared={n: start for method in stages.values() for n, start in method.shared.items()},
        needs=needs,
        spread=spread_stages(stages),
    )


SHARED = "shared"


def _fold(key: Array | None, name: str) -> Array | None:
    return None if key is None else jax.random.fold_in(key, int(name))


def methods_of(tuning: Any) -> list[Method]:
    """All methods of a tuning, in order; one that stands in several rules is there as often."""
    if isinstance(tuning, Method):
        return [tuning]
    if isinstance(tuning, Rules):
        return [method for _, part in tuning.pairs for method in methods_of(part)]
    if isinstance(tuning, Chain):
        return [method for part in tuning.tunings for method in methods_of(part)]
    return []


def at_boundaries(tuning: Any) -> bool:
    """Whether any method of a tuning works on activations, so that the model must be tapped."""
    return any(method.call is not None for method in methods_of(tuning))
