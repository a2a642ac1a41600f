"""`jaxpeft generate`: text from a model, with or without an adapter."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from jaxpeft.cli import models as common
from jaxpeft.cli.adapters import load_adapter
from jaxpeft.cli.formats import Quantize, quantization
from jaxpeft.cli.options import Dtype, File, Number, Text
from jaxpeft.cli.text import pieces

Words = Annotated[str | None, tyro.conf.arg(metavar="TEXT")]


class Speaker(NamedTuple):
    """A model that is ready to write; `front` virtual tokens take slots of its cache."""

    model: Any
    apply: Any
    state: tuple[Any, ...]
    tokenizer: Any
    ends: tuple[int, ...]
    front: int


def generate(
    model: Annotated[Text, tyro.conf.arg(metavar="MODEL")],
    *,
    adapter: File = None,
    prompt: Words = None,
    system: Words = None,
    chat: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: Number = None,
    seed: int = 0,
    no_template: bool = False,
    dtype: Dtype = "float32",
    quantize: Quantize = None,
    cache: File = None,
) -> None:
    """Write text, token by token.

    The prompt comes from --prompt or from standard input, and goes through the model's chat
    template if it has one.

    Args:
        model: a Hugging Face directory, a .gguf file, or smollm2-135m-instruct, which is fetched.
        adapter: directory of an adapter of `finetune`, PEFT or AdapterHub, or a file of ours.
        prompt: what to answer or to continue.
        system: the system message of the chat.
        chat: talk in turns; an empty line ends it.
        max_new_tokens: at most that many tokens an answer.
        temperature: 0 takes the likeliest token each time.
        top_p: draw from the likeliest tokens of this total probability only.
        seed: of the random draws.
        no_template: continue the bare text, without the chat template.
        dtype: of the weights.
        quantize: pack the linear layers, as for `finetune`, such as nf4, int8 or keep.
        cache: where a fetched model is kept, instead of ~/.cache/jaxpeft.
    """
    if chat and (prompt is not None or no_template):
        raise ValueError("--chat asks for prompts itself. Leave out --prompt and --no-template.")
    if no_template and system is not None:
        raise ValueError("--system is part of the chat template. Leave out --no-template.")
    settings = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    _check(settings)
    packing, asked = quantization(quantize), "" if chat else _prompt(prompt)
    speaker = _speaker(common.locate(model, cache), adapter, dtype, packing)
    if chat:
        _talk(speaker, system, settings, seed)
        return
    plain = no_template or not speaker.tokenizer.chat_template
    if plain and system is not None:
        raise ValueError("--system needs a chat template, and this model's tokenizer has none.")
    ids = _plain(speaker, asked) if plain else _asked(speaker, common.chat(asked, system))
    _print(_write(speaker, ids, settings, seed))


def _check(settings: dict[str, Any]) -> None:
    if settings["max_new_tokens"] < 1:
        raise ValueError(f"--max-new-tokens {settings['max_new_tokens']} asks for none. Use >= 1.")
    if settings["temperature"] < 0:
        raise ValueError(f"--temperature {settings['temperature']} is negative. Use 0 or more.")
    if settings["top_p"] is not None and not 0 < settings["top_p"] <= 1:
        raise ValueError(f"--top-p {settings['top_p']} is not in (0, 1].")


def _prompt(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise ValueError("there is no prompt. Use --prompt TEXT, --chat, or pipe a text in.")
    text = sys.stdin.read().rstrip("\n") if prompt is None else prompt
    if not text:
        raise ValueError("the prompt is empty. Use --prompt TEXT, --chat, or pipe a text in.")
    return text


def _speaker(path: Path, adapter: Path | None, dtype: str, packing: Any) -> Speaker:
    import jax.numpy as jnp

    from jaxpeft import models

    tokenizer = common.load_tokenizer(path)
    dtyped = jnp.dtype(dtype)
    with common.doing(f"Loading {path.name}"):
        model, params = models.load(path, dtype=dtyped, quantize=packing, task="causal-lm")
    # The end of a turn may be another token than the end of a text.
    last = {*model.config.eos_token_id, *filter(None, [tokenizer.eos_token_id])}
    ends = tuple(sorted(last))
    if adapter is None:
        return Speaker(model, model.apply, (params,), tokenizer, ends, 0)
    tuned, leaves = load_adapter(adapter, model, params)
    front = tuned.virtual_tokens
    return Speaker(model, tuned.apply, (leaves, params), tokenizer, ends, front)


def _plain(speaker: Speaker, text: str) -> list[int]:
    return speaker.tokenizer(text).input_ids


def _asked(speaker: Speaker, messages: Sequence[dict[str, str]]) -> list[int]:
    tokenizer = speaker.tokenizer
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def _write(
    speaker: Speaker, ids: Sequence[int], settings: dict[str, Any], seed: int
) -> Iterator[str]:
    """The answer in pieces. Prompts are padded to a few lengths, so that a chat compiles rarely."""
    import jax
    import numpy as np

    from jaxpeft.serve import stream
    from jaxpeft.train import Example, pad

    length = max(16, 1 << (len(ids) - 1).bit_length())
    batch = pad([Example(np.array(ids), np.ones(len(ids), bool))], length)
    slots = speaker.front + length + settings["max_new_tokens"]
    drawn = stream(
        speaker.apply,
        speaker.state,
        batch.tokens,
        mask=batch.mask,
        cache=speaker.model.init_cache(1, slots),
        key=jax.random.key(seed),
        eos_token_id=speaker.ends,
        **settings,
    )
    return pieces((int(token[0]) for token in drawn), speaker.tokenizer)


def _print(parts: Iterator[str]) -> str:
    """Shows the pieces as they come, and gives the whole."""
    text = ""
    for part in parts:
        text += part
        print(part, end="", flush=True)
    print(flush=True)
    return text


def _talk(speaker: Speaker, system: str | None, settings: dict[str, Any], seed: int) -> None:
    if not speaker.tokenizer.chat_template:
        raise ValueError("--chat needs a chat template, and this model's tokenizer has none.")
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    while said := _line():
        messages.append({"role": "user", "content": said})
        ids = _asked(speaker, messages)
        answer = _print(_write(speaker, ids, settings, seed + len(messages)))
        messages.append({"role": "assistant", "content": answer})


def _line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
