"""Methods at call boundaries: what they read, and the taps at which they work."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxpeft.core.adapter import Adapter, shared_site
from jaxpeft.core.keys import site_key, typed_key
from jaxpeft.core.method import SHARED, Method, spread
from jaxpeft.core.rules import compile_pattern, unmatched
from jaxpeft.core.site import Site
from jaxpeft.core.structured import Structured, dense
from jaxpeft.core.tap import Tap
from jaxpeft.core.tree import leaves_with_paths


def reading(site: Site, chosen: Mapping[str, Method], sites: Sequence[Site]) -> Site:
    """The site with the paths of the parameters and boundaries that its method reads."""
    method = chosen.get(site.path)
    if method is None or not method.needs.reads:
        return site
    found: list[str] = []
    for glob in (glob for read in method.needs.reads for glob in read(site)):
        matches = compile_pattern(glob)
        hits = [other.path for other in sites if matches(other.path, other)]
        if not hits:
            raise ValueError(
                f"`{method.name}` at {site.path!r} reads {glob!r}: "
                + unmatched(glob, [other.path for other in sites], "parameters and boundaries")
            )
        found += hits
    return dataclasses.replace(site, reads=tuple(dict.fromkeys(found)))


def taps_of(
    chosen: Mapping[str, Method], adapter: Adapter, params: Any, key: Any, own: Mapping[str, Any]
) -> dict[str, Tap]:
    """The methods at call boundaries, by name, with their arrays."""
    sites = [s for s in adapter.sites if s.path in chosen and chosen[s.path].call]
    read = {path for site in sites for path in site.reads}
    frozen = _read_weights(params, read) if read else {}
    taps = {path: Tap(seen=True) for path in read if path not in frozen}
    for site in sites:
        method, stack, keys = chosen[site.path], site.sizes("stack"), None
        if key is not None:
            keys = site_key(typed_key(key), site.path)
            keys = jax.random.split(keys, stack) if stack else keys
        taps[site.path] = Tap(
            spread(method, site, adapter[site.path], own),
            keys,
            {path: frozen[path] for path in site.reads if path in frozen},
            shared_leaves(method, adapter).get(SHARED, {}),
            {n: own[n] for n in (*method.needs.inputs, *(["mask"] if method.needs.mask else []))},
            site=site,
            call=method.call,
            stack=len(stack),
            reads=tuple(path for path in site.reads if path not in frozen),
            seen=site.path in read,
            states=method.needs.states,
        )
    return taps


def shared_leaves(method: Method, adapter: Adapter) -> dict[str, Any]:
    """The leaves that a method has in common with other sites, as it finds them."""
    names = method.shared
    return {SHARED: {name: adapter[shared_site(name).path] for name in names}} if names else {}


def _read_weights(params: Any, paths: Any) -> dict[str, Any]:
    pairs = leaves_with_paths(params, is_leaf=lambda x: isinstance(x, Structured))[0]
    return {path: dense(leaf) for path, leaf in pairs if path in paths}


def unmergeable(path: str, method: Method) -> str:
    """Why no weights can do what a method does, and what to do instead."""
    why = "works on activations: what it adds depends on them, and no weight holds it"
    if method.needs.virtual:
        why = "puts virtual tokens beside those of the call, which no weight holds"
    elif method.needs.states:
        why = "hands a state from layer to layer, which follows the input and no weight holds"
    return (
        f"`{method.name}` at {path!r} {why}. So it cannot be merged. Serve it as it is, with "
        "tuned.apply(adapter, params, *inputs) or jaxpeft.serve.generate(tuned.apply, (adapter, "
        "params), tokens), and keep it with jaxpeft.save. Methods on weights that are beside it in "
        "a chain or in rules are merged by a tuning of them alone."
    )
