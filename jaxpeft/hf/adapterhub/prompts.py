"""Prompt tuning in AdapterHub's files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from jaxpeft.hf.adapterhub.found import Found, at_places
from jaxpeft.hf.adapterhub.methods import hub_prompt
from jaxpeft.hf.adapterhub.options import Prompt
from jaxpeft.hf.adapterhub.piece import AdapterHubFormatError, Context, Piece
from jaxpeft.hf.adapterhub.places import Place
from jaxpeft.hf.adapterhub.slots import Stacked
from jaxpeft.hf.collect import Stage


def pieces(part: Prompt, context: Context) -> Iterator[Piece]:
    """The methods of a configuration, around the encoder."""
    if context.places.first_input:
        raise AdapterHubFormatError("prompt tuning of an encoder and a decoder.")
    pools = context.pools and part.combine == "prefix"
    method = hub_prompt(part.prompt_length, pools=pools)
    name = f"prompt_tuning.prompt_tunings.{context.name}.prompt_embedding.weight"
    yield Piece("encoder:in", method, (Stacked("encoder:in", "prompt", (name,), stacked=False),))
    yield Piece("encoder:out", method, ())


def parts(chosen: Mapping[str, Stage], context: Context) -> Iterator[tuple[Prompt, list[Found]]]:
    """The configuration of the methods around the encoder, and where they are."""
    places = {"": (Place("encoder", "", 1),)}
    found = at_places(chosen, places, lambda p: (f"{p.path}:in", f"{p.path}:out"), ("hub_prompt",))
    if found:
        first = not context.pools or found[0].options["pools"]
        combine = "prefix" if first else "prefix_after_bos"
        yield Prompt(prompt_length=found[0].options["tokens"], combine=combine), found
