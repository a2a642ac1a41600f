"""The models that can be loaded, by the `model_type` of their `config.json`.

To add one: write its config (a frozen dataclass with a `model_type`), its module (a `Model`), and
one row here. `load`, `save` and the adapter files of `jaxpeft.hf` need nothing else.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxpeft.models import bert_config as berts
from jaxpeft.models import bert_names, t5_names
from jaxpeft.models import config as decoders
from jaxpeft.models import t5_config as t5s
from jaxpeft.models import vit_config as vits
from jaxpeft.models.bert import Bert
from jaxpeft.models.decoder import Decoder
from jaxpeft.models.model import Model
from jaxpeft.models.names import TABLE, Name
from jaxpeft.models.t5 import T5
from jaxpeft.models.vit import ViT
from jaxpeft.models.vit_names import SPARE as VIT_SPARE


class Family(NamedTuple):
    """How the models of one `model_type` are read, built and written.

    Attributes:
        read: from the dictionary of `config.json`, a task and labels to a config. `task` and
            `labels` may be None: then config.json decides; a task it cannot do is a ValueError.
        build: a `Model` from `(config, dtype=..., rngs=...)`, its head for `config`'s task.
        write: from a config and the name of a dtype to the dictionary of `config.json`, with
            `architectures` naming the class of transformers for the task.
        prefix: of the bare model's tensors in files of a model with a head, such as "bert.". Files
            are found with it or without it, whatever `Model.names` says.
        respelled: old parts of tensor names, and what they are now.
        spare: regular expressions for tensors (without the prefix) that files may hold and the
            model may not need: buffers, and the heads of other tasks. Matched from the start.
        table: rows of all weights that some model of the family has, where a weight's name does
            not depend on the config; an adapter file can then be written without its model.
        fit: from a config, the shapes of a checkpoint's tensors by name, and a function that reads
            one of them, to the config that they ask for, where config.json does not tell all.
    """

    read: Callable[[Mapping[str, Any], str | None, Any], Any]
    build: Callable[..., Model]
    write: Callable[[Any, str], dict[str, Any]]
    prefix: str = ""
    respelled: Mapping[str, str] = {}
    spare: tuple[str, ...] = ()
    table: tuple[Name, ...] = ()
    fit: Callable[..., Any] = lambda config, shapes, read: config

    def canonical(self, tensor: str) -> str:
        """A tensor's name without the prefix, in today's spelling."""
        tensor = tensor.removeprefix(self.prefix)
        for old, new in self.respelled.items():
            tensor = tensor.replace(old, new)
        return tensor


def _read_decoder(values: Mapping[str, Any], task: str | None, labels: Any) -> Any:
    if task not in (None, "causal-lm") or labels is not None:
        raise ValueError(
            f"task={task!r} with labels={labels!r} is not supported for model_type="
            f"{values.get('model_type')!r}. Supported: task='causal-lm', which has no labels."
        )
    return decoders.from_hf(values)


# Old checkpoints carry the rotary frequencies; a tied head may be stored all the same.
_SPARE = (r".*rotary_emb\.inv_freq$", r"lm_head\.weight$")
_DECODER = Family(_read_decoder, Decoder, decoders.to_hf, spare=_SPARE, table=TABLE)

_T5 = Family(
    t5s.from_hf, T5, t5s.to_hf, spare=t5_names.SPARE, table=t5_names.TABLE, fit=t5s.fit
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER,
    **{
        model_type: Family(
            berts.from_hf, Bert, berts.to_hf, prefix, bert_names.RESPELLED, bert_names.SPARE
        )
        for model_type, prefix in bert_names.PREFIXES.items()
    },
    "t5": _T5,
    "mt5": _T5,
    "vit": Family(vits.from_hf, ViT, vits.to_hf, "vit.", spare=VIT_SPARE),
    "deit": Family(vits.from_hf, ViT, vits.to_hf, "deit.", spare=VIT_SPARE),
}


def family_of(model_type: Any) -> Family:
    """The family of a `model_type`.

    Args:
        model_type: as in `config.json`.

    Returns:
        The row of `FAMILIES`.

    Raises:
        ValueError: there is none.

    Example:
        >>> family_of("llama").build.__name__
        'Decoder'
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model_type={model_type!r} is not supported. Supported: {', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]


def read_config(values: Mapping[str, Any], task: str | None = None, labels: Any = None) -> Any:
    """The config of any supported model, from the dictionary of its `config.json`.

    Args:
        values: the parsed file.
        task: what the model is for; None for what `architectures` in the file says.
        labels: names of the classes, or their number; None for those in the file.

    Returns:
        The config, whose class depends on `model_type`.

    Raises:
        ValueError: the model or an option of it is not supported, or it cannot do the task.
    """
    return family_of(values.get("model_type")).read(values, task, labels)
