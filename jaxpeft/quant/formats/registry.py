"""Formats by name, to and from JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxpeft.quant.formats.base import Format
from jaxpeft.quant.formats.codebook import FP4, NF4
from jaxpeft.quant.formats.float8 import Float8
from jaxpeft.quant.formats.ggml import GGUF
from jaxpeft.quant.formats.ggml_mixed import MixedGGUF
from jaxpeft.quant.formats.integer import Int4, Int8
from jaxpeft.quant.formats.llm_int8 import LLMInt8
from jaxpeft.quant.formats.micro import MXFP4, NVFP4

_KINDS: tuple[type[Format], ...] = (
    *(NF4, FP4, Int8, Int4, LLMInt8, Float8, MXFP4, NVFP4),
    *(GGUF, MixedGGUF),
)
FORMATS = {kind.name: kind for kind in _KINDS}


def to_json(fmt: Format) -> dict[str, Any]:
    """The format's name and options, as JSON holds them.

    Example:
        >>> from jaxpeft.quant.formats import nf4
        >>> to_json(nf4())
        {'name': 'nf4', 'block': 64, 'double': True}
    """
    options = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(fmt).items()
    }
    return {"name": fmt.name, **options}


def from_json(options: Mapping[str, Any]) -> Format:
    """The inverse of `to_json`.

    Raises:
        ValueError: a name or an option that no format has, or a value that it refuses.

    Example:
        >>> from_json({"name": "nf4", "block": 128, "double": False})
        NF4(block=128, double=False)
    """
    values = dict(options)
    name = values.pop("name", None)
    if name not in FORMATS:
        raise ValueError(f"no format {name!r}. Use one of: {', '.join(FORMATS)}.")
    known = [field.name for field in dataclasses.fields(FORMATS[name])]
    if unknown := values.keys() - set(known):
        raise ValueError(f"{name} has no {sorted(unknown)}; it has {known}.")
    if missing := {
        field.name
        for field in dataclasses.fields(FORMATS[name])
        if field.default is dataclasses.MISSING and field.name not in values
    }:
        raise ValueError(f"{name} needs {sorted(missing)}; it has {known}.")
    return FORMATS[name](**values)
