"""Where AdapterHub's library puts adapters, here and in the names of its tensors, by model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxpeft.models import FAMILIES


class Place(NamedTuple):
    """A module that every layer of a stack has.

    Attributes:
        path: of the module here.
        module: its name in torch, or that of what the library adds there; with "{layer}".
        depth: how many layers there are.
        first: the library's number of the first of them; decoders are counted behind encoders.
        norm: here, of the LayerNorm behind the sublayer, in post-norm models.
    """

    path: str
    module: str
    depth: int
    first: int = 0
    norm: str = ""

    def modules(self) -> list[str]:
        """The torch name in each layer."""
        return [self.module.replace("{layer}", str(layer)) for layer in range(self.depth)]

    def layers(self, left_out: tuple[int, ...]) -> list[bool]:
        """For each layer whether it has an adapter."""
        return [self.first + layer not in left_out for layer in range(self.depth)]


@dataclasses.dataclass(frozen=True)
class Places:
    """The places of a model.

    Attributes:
        prefix: of tensors in files of a model with a head, such as "bert.".
        sublayers: by the option that puts bottleneck adapters there.
        attentions: by the name that prefix tuning has for them.
        linears: by the option that puts LoRA there, or the letter in `attn_matrices`.
        blocks: the layers, for ReFT.
        embeddings: the module behind which prompts and invertible adapters are; its `module` is a
            prefix of the names of the latter.
        first_input: whether they are in front of the first layer of that module instead.
        keys_move: whether a prefix moves keys on in their positions, but not queries.
    """

    prefix: str
    sublayers: Mapping[str, tuple[Place, ...]]
    attentions: Mapping[str, tuple[Place, ...]]
    linears: Mapping[str, tuple[Place, ...]]
    blocks: tuple[Place, ...]
    embeddings: Place
    first_input: bool = False
    keys_move: bool = False


def places(config: Any) -> Places:
    """The places of a model of this library.

    Args:
        config: of the model.

    Raises:
        ValueError: if it is of a family whose files are not known.

    Example:
        >>> from jaxpeft.models.bert_config import from_hf
        >>> config = from_hf({"model_type": "distilbert", "vocab_size": 8, "dim": 4,
        ...     "hidden_dim": 8, "n_layers": 1, "n_heads": 2})
        >>> places(config).sublayers["mh_adapter"][0].modules()
        ['transformer.layer.0.attention_adapters']
    """
    kind = config.model_type
    if kind not in _KNOWN:
        raise ValueError(
            f"the places of AdapterHub's adapters in a {kind!r} model are not known. Known are "
            f"those in {', '.join(_KNOWN)}."
        )
    return _KNOWN[kind](config)


# AdapterHub's names of the modules inside of a layer, where BERT's are written here.
_BERT = {
    "mh_adapter": "attention.output",
    "output_adapter": "output",
    "attention": "attention.self",
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}
_DISTILBERT = {
    "mh_adapter": "attention_adapters",
    "output_adapter": "output_adapters",
    "attention": "attention",
    "q": "attention.q_lin",
    "k": "attention.k_lin",
    "v": "attention.v_lin",
    "intermediate": "ffn.lin1",
    "output": "ffn.lin2",
}
_VIT = {
    "mh_adapter": "attention_adapters",
    "output_adapter": "output.output_adapters",
    "attention": "attention.attention",
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}


def _encoder(config: Any) -> Places:
    distilled = config.model_type == "distilbert"
    block = "transformer.layer.{layer}" if distilled else "encoder.layer.{layer}"
    return _one_stack(
        config, _DISTILBERT if distilled else _BERT, block, "self" if distilled else "self_prefix",
        "attention/self", norms=("attention/output/LayerNorm", "output/LayerNorm"),
    )  # fmt: skip


def _vision(config: Any) -> Places:
    block = "encoder.layer.{layer}"
    return _one_stack(config, _VIT, block, "self_prefix", "attention/attention", ("", ""))


def _one_stack(
    config: Any,
    names: Mapping[str, str],
    block: str,
    location: str,
    projections: str,
    norms: tuple[str, str],
) -> Places:
    def at(name: str, path: str, norm: str = "") -> tuple[Place, ...]:
        norm = norm and f"encoder/layer/{norm}"
        module = f"{block}.{names[name]}"
        return (Place(f"encoder/layer/{path}", module, config.num_hidden_layers, norm=norm),)

    letters = {"q": "query", "k": "key", "v": "value"}
    return Places(
        FAMILIES[config.model_type].prefix,
        {
            "mh_adapter": at("mh_adapter", "attention", norms[0]),
            "output_adapter": at("output_adapter", "output", norms[1]),
        },
        {location: at("attention", "attention")},
        {
            **{name: at(name, f"{projections}/{path}") for name, path in letters.items()},
            "intermediate": at("intermediate", "intermediate/dense"),
            "output": at("output", "output/dense"),
        },
        (Place("encoder/layer", block, config.num_hidden_layers),),
        Place("embeddings", "", 1),
    )


def _t5(config: Any) -> Places:
    encoders, decoders = config.num_layers, config.num_decoder_layers

    def encoder(path: str) -> Place:
        name = f"encoder/block/layer/{path}"
        return Place(name, _in_block("encoder", path), encoders)

    def decoder(path: str) -> Place:
        name = f"decoder/block/layer/{path}"
        return Place(name, _in_block("decoder", path), decoders, encoders)

    attentions = [encoder("0/SelfAttention"), decoder("0/SelfAttention")]
    attentions.append(decoder("1/EncDecAttention"))
    wide = "wi_1" if config.gated else "wi"
    feed_forward = [encoder("1/DenseReluDense"), decoder("2/DenseReluDense")]
    return Places(
        "transformer.",
        {
            "mh_adapter": (encoder("0"), decoder("0")),
            "output_adapter": (encoder("1"), decoder("2")),
            "cross_adapter": (decoder("1"),),
        },
        {
            "encoder_prefix": (attentions[0],),
            "self_prefix": (attentions[1],),
            "cross_prefix": (attentions[2],),
        },
        {
            **{name: tuple(_inside(place, name) for place in attentions) for name in "qkv"},
            "intermediate": tuple(_inside(place, wide) for place in feed_forward),
            "output": tuple(_inside(place, "wo") for place in feed_forward),
        },
        (
            Place("encoder/block", "encoder.block.{layer}", encoders),
            Place("decoder/block", "decoder.block.{layer}", decoders, encoders),
        ),
        Place("encoder/block", "encoder.", encoders),
        first_input=True,
        keys_move=True,
    )


def _in_block(stack: str, path: str) -> str:
    return f"{stack}.block.{{layer}}.layer.{path.replace('/', '.')}"


def _inside(place: Place, name: str) -> Place:
    return place._replace(path=f"{place.path}/{name}", module=f"{place.module}.{name}")


_KNOWN = {
    "bert": _encoder,
    "roberta": _encoder,
    "xlm-roberta": _encoder,
    "distilbert": _encoder,
    "vit": _vision,
    "t5": _t5,
    "mt5": _t5,
}
