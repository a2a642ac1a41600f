"""Methods as short texts, such as "lora:rank=8,lr=1e-3", for comparisons."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxpeft.core.method import Method
from jaxpeft.core.rules import Rules, rules
from jaxpeft.core.site import Site
from jaxpeft.methods.adapters import compacter, houlsby, parallel_adapter, pfeiffer
from jaxpeft.methods.bitfit import bitfit, norm_tuning
from jaxpeft.methods.bottleneck import bottleneck
from jaxpeft.methods.full import full
from jaxpeft.methods.ia3 import ia3
from jaxpeft.methods.lora import lora, rslora
from jaxpeft.methods.p_tuning import p_tuning
from jaxpeft.methods.prefix import prefix_tuning
from jaxpeft.methods.prompt import prompt_tuning
from jaxpeft.methods.reft import loreft

PROBE = "probe"
PROBE_RATE = 3e-2


class Entry(NamedTuple):
    """How a name in a specification is read.

    Attributes:
      make: the method's factory.
      rate: the learning rate where none is given.
      options: of the factory, where they are not given.
    """

    make: Callable[..., Method]
    rate: float
    options: Mapping[str, Any] = {}


KNOWN: Mapping[str, Entry] = MappingProxyType(
    {
        "lora": Entry(lora, 1e-3, {"rank": 8}),
        "rslora": Entry(rslora, 1e-3, {"rank": 8}),
        "houlsby": Entry(houlsby, 1e-3),
        "pfeiffer": Entry(pfeiffer, 1e-3),
        "parallel": Entry(parallel_adapter, 1e-3),
        "compacter": Entry(compacter, 3e-3),
        "loreft": Entry(loreft, 3e-3, {"rank": 4}),
        "ia3": Entry(ia3, 1e-2),
        "bitfit": Entry(bitfit, 1e-3),
        "norms": Entry(norm_tuning, 1e-3),
        "prompt": Entry(prompt_tuning, 1e-2, {"tokens": 20}),
        "p_tuning": Entry(p_tuning, 1e-3, {"tokens": 20}),
        "prefix": Entry(prefix_tuning, 1e-2, {"tokens": 20}),
        "full": Entry(full, 1e-4),
    }
)
"""Name -> factory, learning rate of Adam, and options."""


class Spec(NamedTuple):
    """A specification that has been read.

    Attributes:
      text: as it was written.
      methods: to be put where each goes by itself; none for the head alone.
      rate: learning rate.
    """

    text: str
    methods: tuple[Method, ...]
    rate: float

    def tuning(self, head: Sequence[str] = (), output: str | None = None) -> Rules:
        """What `transform` takes.

        Args:
          head: globs of parameters that are trained fully, whatever the method.
          output: path of the model's output head, which all but `full` leave alone.

        Returns:
          Rules.

        Raises:
          ValueError: if nothing would be trained.
        """
        if not head and not self.methods:
            raise ValueError(f"{self.text!r} trains the head alone, but this model has no new one.")
        pairs = [(pattern, full()) for pattern in head]
        return rules(*pairs, *((ByItself(method, output), method) for method in self.methods))


@dataclasses.dataclass(frozen=True)
class ByItself:
    """The predicate of the sites to which a method goes without rules."""

    method: Method
    output: str | None

    def __call__(self, path: str, site: Site) -> bool:
        return self.method.bare(site) and (path != self.output or self.method.name == "full")

    def __repr__(self) -> str:
        return f"wherever {self.method.name} goes by itself"


def read_spec(text: str) -> Spec:
    """Reads `name`, `name:option=value,...`, or several of these joined by `+`.

    Options are those of the method's factory, and `lr`, the learning rate. Where methods are
    joined, each goes to its own places, and the learning rate is the first one's or the one given.

    Args:
      text: names are the keys of `KNOWN`, and "probe" for the head alone.

    Returns:
      The methods and the learning rate.

    Raises:
      ValueError: if a name or an option is unknown, or a value is out of range.

    Example:
      >>> spec = read_spec("lora:rank=4,lr=5e-4")
      >>> spec.methods[0].options["rank"], spec.rate
      (4, 0.0005)
      >>> [method.name for method in read_spec("prefix:tokens=30+parallel").methods]
      ['prefix_tuning', 'bottleneck']
    """
    parts = [_part(part, text) for part in re.split(r"\+(?=[a-z])", text.strip())]
    rates = [rate for _, rate, given in parts if given] or [parts[0][1]]
    return Spec(text.strip(), tuple(m for m, *_ in parts if m is not None), rates[0])


def read_specs(texts: Sequence[str]) -> list[Spec]:
    """Reads several specifications; see `read_spec`.

    Args:
      texts: one or more, each once.

    Returns:
      The specifications in order.

    Raises:
      ValueError: one cannot be read, or is there twice.
    """
    specs = [read_spec(text) for text in texts]
    if not specs or len({spec.text for spec in specs}) < len(specs):
        raise ValueError(f"methods {list(texts)}: give one or more, each once.")
    return specs


def _part(part: str, text: str) -> tuple[Method | None, float, bool]:
    """The method, its learning rate, and whether that was given."""
    name, _, rest = part.partition(":")
    if name != PROBE and name not in KNOWN:
        known = ", ".join([*KNOWN, PROBE])
        raise ValueError(
            f'{text!r} names {name!r}, which is none of: {known}. Write "lora:rank=8,lr=1e-3".'
        )
    options = dict(_option(item, text) for item in rest.split(",") if item)
    given = "lr" in options
    rate = _rate(options.pop("lr", PROBE_RATE if name == PROBE else KNOWN[name].rate), text)
    if name == PROBE:
        if options:
            raise ValueError(f"{text!r}: {PROBE} has no option but lr.")
        return None, rate, given
    make = KNOWN[name].make
    there = _options_of(make)
    if unknown := options.keys() - there:
        raise ValueError(
            f"{text!r}: {name} has no option {min(unknown)!r}. It has lr, {', '.join(there)}."
        )
    try:
        return make(**{**KNOWN[name].options, **options}), rate, given
    except (TypeError, ValueError) as error:
        raise ValueError(f"{text!r}: {error}") from error


def _options_of(make: Callable[..., Any]) -> list[str]:
    """The names of a factory's options; those that hand some on hand them to `bottleneck`."""
    own = inspect.signature(make).parameters
    names = [at for at, option in own.items() if option.kind is not option.VAR_KEYWORD]
    return names if len(names) == len(own) else names + _options_of(bottleneck)


def _rate(value: Any, text: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{text!r}: lr={value} is no learning rate. Use a number above 0.")
    return float(value)


def _option(item: str, text: str) -> tuple[str, Any]:
    name, equals, value = item.partition("=")
    if not (name and equals and value):
        raise ValueError(f'{text!r}: {item!r} is no option. Write "lora:rank=8,lr=1e-3".')
    return name.strip(), value_of(value.strip())


def value_of(text: str) -> Any:
    """A bool, None, an int, a float, or else the text."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
