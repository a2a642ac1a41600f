"""How a method is made of others, whose leaves stand under their numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxpeft.core.method import SHARED, Leaves, Method, compose, spread_stages, together
from jaxpeft.core.rules import Chain
from jaxpeft.core.site import Site
from jaxpeft.core.tap import Here
from jaxpeft.methods.parts import folded

Array = jax.Array
Stages = Mapping[str, Method]
Call = Callable[[Stages, Site, Leaves, Array, Here], Array]


def made_of(
    name: str,
    methods: Sequence[Any],
    call: Call,
    options: dict[str, Any],
    own: Callable[[Array, Site], Leaves] = lambda key, site: {},
) -> Method:
    """A method whose leaves are those of others, under their numbers, and `own` ones."""
    stages = {str(i): as_method(m, name) for i, m in enumerate(methods) if m is not None}

    def init(key: Array, site: Site, weight: Any) -> Leaves:
        keys = {n: jax.random.fold_in(key, int(n)) for n in stages}
        leaves = {n: m.init(keys[n], site, weight) for n, m in stages.items()}
        return leaves | own(jax.random.fold_in(key, len(methods)), site)

    found = [stages.get(str(i)) for i in range(len(methods))]
    described = [m and {"name": m.name, "options": dict(m.options)} for m in found]
    return Method(
        name,
        init,
        None,
        fits=lambda site: all(m.fits(site) for m in stages.values()),
        bare=lambda site: all(m.bare(site) for m in stages.values()),
        options={"methods": described, **options},
        fixed=tuple(f"{n}/{leaf}" for n, m in stages.items() for leaf in m.fixed),
        call=lambda site, leaves, x, here: call(stages, site, leaves, x, here),
        shared={n: start for m in stages.values() for n, start in m.shared.items()},
        needs=together([m.needs for m in stages.values()]),
        spread=spread_stages(stages),
    )


def as_method(tuning: Any, name: str) -> Method:
    """A method, or a chain of methods as one."""
    found = tuning
    if isinstance(tuning, Chain) and all(isinstance(m, Method) for m in tuning.tunings):
        found = compose(tuning.tunings)
    if isinstance(found, Method) and found.call is not None and not found.needs.states:
        return found
    shown = tuning.name if isinstance(tuning, Method) else tuning
    raise TypeError(
        f"{name}() is made of methods at call boundaries that hand on no state, not of {shown!r}."
    )


def stage(leaves: Leaves, name: str, here: Here) -> tuple[Leaves, Here]:
    """What one of the methods finds: its leaves and a key of its own."""
    own = leaves[name] | ({SHARED: leaves[SHARED]} if SHARED in leaves else {})
    return own, here._replace(key=folded(here.key, int(name)))


def run(method: Method, name: str, site: Site, leaves: Leaves, x: Array, here: Here) -> Array:
    """One of the methods at its site."""
    assert method.call is not None
    own, there = stage(leaves, name, here)
    return method.call(site, own, x, there)
