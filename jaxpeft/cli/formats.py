"""Formats of weights as the commands name them."""

from typing import Annotated, Any

import tyro

from jaxpeft.cli import models as common

Quantize = Annotated[str | None, tyro.conf.arg(metavar="FORMAT")]
KEEP = "keep"
# What the factories have as defaults; of nvfp4 the form that files can hold.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "int4": {"block": 128, "symmetric": True},
    "int8": {"block": None, "symmetric": True},
    "nvfp4": {"inverse": True},
}


def read_format(text: str, scale: str | None = None) -> Any:
    """A format from its name and options.

    Args:
        text: such as "nf4", or "int4:block=64,symmetric=false"; a tile is written as 128x128.
        scale: dtype of the scales of integers, where the text does not say it.

    Returns:
        The format.

    Raises:
        ValueError: there is no such format, or it has no such option.

    Example:
        >>> read_format("nf4:block=128,double=false")
        NF4(block=128, double=False)
    """
    from jaxpeft.quant.formats import from_json
    from jaxpeft.train.specs import value_of

    name, _, rest = text.strip().partition(":")
    options: dict[str, Any] = {"name": name}
    if scale is not None and name in ("int4", "int8"):
        options["scale"] = scale
    for item in filter(None, rest.split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals and value):
            raise ValueError(f'{text!r}: {item!r} is no option. Write "nf4:block=64,double=true".')
        sides = value.split("x")
        tile = len(sides) == 2 and all(side.isdigit() for side in sides)
        options[key] = [int(side) for side in sides] if tile else value_of(value)
    try:
        return from_json(_DEFAULTS.get(name, {}) | options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{text!r}: {error}") from error


def quantization(text: str | None, scale: str | None = None) -> Any:
    """What `jaxpeft.models.load` is to quantize.

    Args:
        text: a format, "keep", or None.
        scale: as `read_format` takes it.

    Returns:
        None, "keep", or rules that give the format to the linear layers of a model's stacks, not to
        its tables and heads, as bitsandbytes and PEFT have it.

    Raises:
        ValueError: as `read_format`.
    """
    if text is None or text == KEEP:
        return text
    import jaxpeft as jp

    return jp.rules((_layers, read_format(text, scale)))


def _layers(path: str, leaf: Any) -> bool:
    return path.endswith("kernel") and len(leaf.shape) == 3


def packed_as(tree: Any) -> str:
    """How quantized weights are held, for people: their formats and the size of all weights."""
    from jaxpeft.quant import QuantizedWeight
    from jaxpeft.quant.formats.host import on_device

    leaves = common.weights(tree)
    formats = [on_device(leaf.format) for leaf in leaves if isinstance(leaf, QuantizedWeight)]
    names = {form.name for form in formats if form is not None}
    if not names:
        return ""
    size = common.megabytes(sum(leaf.nbytes for leaf in leaves))
    return f", {' and '.join(sorted(names))}, {size}"
