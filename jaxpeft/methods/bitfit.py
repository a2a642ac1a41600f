"""Tuning the small vectors that a model has already: its biases, or the parameters of its norms.

b' = v,  v trained, starting at b
"""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp

from jaxpeft.core.method import Method
from jaxpeft.core.site import Site
from jaxpeft.methods.full import full

# Names of modules that normalize: "input_layernorm", "RMSNorm_0", "ln_f", "ln1".
_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)", re.IGNORECASE)
_OF_NORMS = ("scale", "bias", "weight", "gamma", "beta")


def bitfit(*, dtype: Any = jnp.float32) -> Method:
    """BitFit: trains the biases themselves, `b' = value`, which starts at `b`.

    A bias is a parameter whose name ends in "bias" and that no product uses, or a vector that is
    only ever added. Leaf `value` has the shape of the bias: as many parameters as there are
    biases. A fresh adapter changes nothing, and the adapter can be merged.

    Args:
        dtype: of the trained copy; it is cast to the dtype of the bias where it is used.

    Returns:
        A method. As a bare tuning it goes to every bias, those of norms included.

    Raises:
        ValueError: if `init` is given shapes only, as the start needs the values.

    Example:
        >>> import jax, jaxpeft as jp, jax.numpy as jnp
        >>> params, x = {"w": jnp.ones((4, 3)), "bias": jnp.ones(3)}, jnp.ones((2, 4))
        >>> tuned = jp.transform(lambda p, x: x @ p["w"] + p["bias"], bitfit())
        >>> list(tuned.init(jax.random.key(0), params, x))
        ['bias']

    Reference:
        Ben Zaken et al. 2021, arXiv:2106.10199.
    """
    return full(dtype=dtype)._replace(name="bitfit", fits=_is_bias, bare=_is_bias)


def norm_tuning(*, dtype: Any = jnp.float32) -> Method:
    """Trains the scales and biases of norms themselves, `w' = value`, which starts at `w`.

    Leaf `value` has the shape of the parameter: as many parameters as the norms have. A fresh
    adapter changes nothing, and the adapter can be merged.

    Args:
        dtype: of the trained copy; it is cast to the dtype of the parameter where it is used.

    Returns:
        A method. As a bare tuning it goes to the parameters of every module with "norm" or "ln" in
        its name; by rules it goes to any parameter that no product uses.

    Raises:
        ValueError: if `init` is given shapes only, as the start needs the values.

    Example:
        >>> import jaxpeft as jp
        >>> tuning = jp.rules(("**/{q,v}_proj/kernel", jp.lora(8)), ("**/*norm/*", norm_tuning()))

    Reference:
        Zhao et al. 2023, arXiv:2312.11420; PEFT's LN tuning.
    """
    return full(dtype=dtype)._replace(name="norm_tuning", fits=_is_vector, bare=_is_norm)


def _is_vector(site: Site) -> bool:
    return not (site.boundary or site.uses)


def _is_bias(site: Site) -> bool:
    # Tables of positions are added too, but have two axes.
    added = site.dense == ("add",) and len(site.shape) - len(site.axes("stack")) == 1
    return _is_vector(site) and (site.path.endswith("bias") or added)


def _is_norm(site: Site) -> bool:
    module, _, name = site.path.rpartition("/")
    named = name in _OF_NORMS and bool(_NORM.search(module.rpartition("/")[2]))
    return _is_vector(site) and named
