"""Which torch tensors a parameter stands for, and how the model uses it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from jaxpeft.core.rules import nearest
from jaxpeft.core.site import Site
from jaxpeft.core.transform import Adapter
from jaxpeft.flax import transform
from jaxpeft.methods.full import full
from jaxpeft.models import FAMILIES, Model

# The output head of Hugging Face's language models, which a tied model has only by name.
HEAD = "lm_head"

# PEFT's names of tasks, and the modules that it trains whole for them, whether asked to or not.
TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    "embedding": "FEATURE_EXTRACTION",
}
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
        site: the parameter and its use.
        tensor: the torch name, such as "model.layers.{layer}.mlp.up_proj.weight"; "{layer}" stands
            for the index along the parameter's stack axis.
        axes: `ours = theirs.transpose(axes)` for one layer's tensor, empty where they are equal;
            None where it is to be told from the parameter's use.
    """

    site: Site
    tensor: str
    axes: tuple[int, ...] | None = None

    @property
    def path(self) -> str:
        return self.site.path

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.tensor

    @property
    def attribute(self) -> str:
        """Usually "weight" or "bias"."""
        return self.tensor.rpartition(".")[2]

    @property
    def modules(self) -> tuple[str, ...]:
        """The torch modules that hold it, in the order of the layers."""
        module = self.tensor.rpartition(".")[0]
        layers = self.site.sizes("stack")[0] if self.stacked else 1
        return tuple(module.replace("{layer}", str(layer)) for layer in range(layers))

    @property
    def linear(self) -> bool:
        """Whether the torch module is a `Linear`."""
        return self.attribute == "weight" and self.site.linear and not self.site.table

    @property
    def tied(self) -> bool:
        """Whether it is an embedding and the output head at once."""
        return self.site.table and "dot_general" in self.site.uses


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of a model.

    Attributes:
        rows: by path.
        complete: they are all of the model's.
        shortens: all modules of the torch model are known, so that a part of a name can be known
            to fit no other.
        others: modules that the torch model may have beside those of the rows.
    """

    rows: Mapping[str, Row]
    complete: bool
    shortens: bool = False
    others: tuple[str, ...] = ()

    @property
    def tied(self) -> Row | None:
        return next((row for row in self.rows.values() if row.tied), None)

    @property
    def modules(self) -> dict[str, dict[str, Row]]:
        """`{module: {attribute: row}}`."""
        found: dict[str, dict[str, Row]] = {}
        for row in self.rows.values():
            for module in row.modules:
                found.setdefault(module, {})[row.attribute] = row
        return found

    def to_json(self, sites: Sequence[Site]) -> dict[str, Any]:
        return {
            "names": {site.path: self.rows[site.path].tensor for site in sites},
            "sites": [site.to_json() for site in sites],
        }


def of_model(model: Any) -> Table | None:
    """The table of a model of this library, else None."""
    if not isinstance(model, Model):
        return None
    sites = transform(model, full()).sites(nnx.state(model), *model.example())
    names = {name.path: name for name in model.names()}
    rows = {
        site.path: _row(site, names[site.path].tensor, names[site.path].axes)
        for site in sites
        if not site.boundary
    }
    return Table(rows, True, True)


def task_type_of(model: Any) -> str | None:
    """PEFT's name of what a model is for; of a model that is not known, "CAUSAL_LM"."""
    task = model.task if isinstance(model, Model) else "causal-lm"
    return TASK_TYPES.get(task or "embedding")


def of_adapter(adapter: Adapter) -> Table:
    """What can be told from an adapter alone, if the model's family has a table of names."""
    tables = dict.fromkeys(family.table for family in FAMILIES.values())
    known = [{name.path: name.tensor for name in table} for table in tables]
    unknown = [[s.path for s in adapter.sites if s.path not in tensors] for tensors in known]
    fewest = min(range(len(known)), key=lambda i: len(unknown[i]))
    if unknown[fewest]:
        raise ValueError(
            f"no Hugging Face name is known for {unknown[fewest][0]!r}. Pass names="
            '{path: module name}, such as {"blocks_*/attn/q/kernel": '
            '"model.layers.*.self_attn.q_proj"}; or model=, for a model of jaxpeft.models.'
        )
    tensors = known[fewest]
    rows = {site.path: _row(site, tensors[site.path]) for site in adapter.sites}
    layers = max((len(row.modules) for row in rows.values()), default=1)
    modules = {tensor.rpartition(".")[0] for tensor in tensors.values()}
    others = {m.replace("{layer}", str(layer)) for m in modules for layer in range(layers)}
    return Table(rows, False, True, tuple(sorted(others)))


def of_names(names: Mapping[str, str], sites: Sequence[Site], complete: bool) -> Table:
    """The table of a model that this library does not know.

    Args:
        names: for each parameter path, or glob over paths, the name of its torch module or tensor.
            Each `*` of the glob stands for the `*` at the same place in the name; `{layer}` in the
            name stands for the index along the parameter's stack axis.
        sites: the parameters, from `tuned.sites(params, *inputs)`.
        complete: whether `sites` are all of the model's.

    Returns:
        Rows for the parameters that are named.

    Raises:
        ValueError: if a name fits no parameter, or two parameters have one name.
    """
    rows: dict[str, Row] = {}
    for glob, template in names.items():
        expression = re.compile("([^/]+)".join(map(re.escape, glob.split("*"))))
        found = [(site, expression.fullmatch(site.path)) for site in sites]
        hits = [(site, match) for site, match in found if match]
        if not hits and complete:
            near = ", ".join(map(repr, nearest(glob, [site.path for site in sites])))
            raise ValueError(f"names: {glob!r} fits no parameter. Nearest: {near}.")
        for site, match in hits:
            rows.setdefault(site.path, _row(site, _fill(glob, template, match.groups())))
    _check_distinct(rows)
    return Table({site.path: rows[site.path] for site in sites if site.path in rows}, complete)


def _fill(glob: str, template: str, found: Sequence[str]) -> str:
    if template.count("*") > len(found):
        raise ValueError(
            f"names: {template!r} has {template.count('*')} `*`, but {glob!r} has {len(found)}. "
            "Each `*` of the name takes what the `*` of the path stands for."
        )
    pieces = template.split("*")
    name = pieces[0] + "".join(a + b for a, b in zip(found, pieces[1:], strict=False))
    if name.endswith((".weight", ".bias")):
        return name
    return f"{name}.bias" if glob.rpartition("/")[2] == "bias" else f"{name}.weight"


def _row(site: Site, tensor: str, axes: tuple[int, ...] | None = None) -> Row:
    stack = site.axes("stack")
    if "{layer}" in tensor and len(stack) != 1:
        raise ValueError(
            f"{tensor!r} has a '{{layer}}', but {site.path!r} of shape {site.shape} has "
            f"{len(stack)} stack axes (roles {site.roles}). Leave '{{layer}}' out, or name a "
            "parameter that is stacked over layers."
        )
    return Row(site, tensor, axes)


def _check_distinct(rows: Mapping[str, Row]) -> None:
    seen: dict[str, str] = {}
    for row in rows.values():
        first = seen.setdefault(row.tensor, row.path)
        if first != row.path:
            raise ValueError(
                f"names: {first!r} and {row.path!r} both stand for {row.tensor!r}. "
                "Give each parameter a name of its own."
            )
