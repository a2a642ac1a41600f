"""Tokenizers of Hugging Face directories and GGUF files, without torch.

transformers takes seconds to import, so it is imported where a tokenizer is made.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE

from jaxpeft.models.gguf import find_gguf, open_reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# How text is cut before the merges apply, by llama.cpp's name in `tokenizer.ggml.pre`.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {
    "gpt-2": _GPT2,
    "smollm": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
}
_SINGLE_DIGITS = ("smollm",)
_NFC = ("qwen2",)
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3")
_CONTROL, _USER_DEFINED = 3, 4


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model, chat template included.

    Args:
        path: a Hugging Face directory, a `.gguf` file, or a directory with one `.gguf` file.

    Returns:
        A transformers tokenizer.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: the GGUF file holds a kind of tokenizer that is not supported.

    Example:
        >>> load_tokenizer("SmolLM2.gguf")("The answer is 42").input_ids  # doctest: +SKIP
        [504, 2988, 314, 216, 36, 34]
    """
    from transformers import AutoTokenizer

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Give a model directory or a .gguf file.")
    gguf = find_gguf(path)
    return AutoTokenizer.from_pretrained(path) if gguf is None else gguf_tokenizer(gguf)


def gguf_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Build the byte-level BPE tokenizer that a GGUF file describes.

    The file names its pre-tokenizer (`tokenizer.ggml.pre`) but does not spell it out: SmolLM's cuts
    numbers into single digits, which changes the ids of every text with a number in it.

    Args:
        path: the file.

    Returns:
        A transformers tokenizer.

    Raises:
        ValueError: the tokenizer is no byte-level BPE, or its pre-tokenizer is unknown.
    """
    from transformers import PreTrainedTokenizerFast

    reader = open_reader(Path(path))

    def get(key: str, default: Any = None) -> Any:
        field = reader.get_field(key)
        return default if field is None else field.contents()

    tokens = get("tokenizer.ggml.tokens", [])
    _check_kind(path, get("tokenizer.ggml.model"), get("tokenizer.ggml.pre"))
    backend = _backend(tokens, get("tokenizer.ggml.merges"), get("tokenizer.ggml.pre"))
    backend.add_tokens(_added_tokens(tokens, get("tokenizer.ggml.token_type", [])))
    special = {
        f"{role}_token": tokens[get(f"tokenizer.ggml.{key}_token_id")]
        for role, key in dict(bos="bos", eos="eos", unk="unknown", pad="padding").items()
        if get(f"tokenizer.ggml.{key}_token_id") is not None
    }
    if get("tokenizer.ggml.add_bos_token"):
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, get("tokenizer.ggml.bos_token_id"))],
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = get("tokenizer.chat_template")
    return tokenizer


def _check_kind(path: str | Path, model: str | None, pre: str | None) -> None:
    if model != "gpt2":
        raise ValueError(
            f"tokenizer.ggml.model={model!r} in {path} is not supported. Supported: 'gpt2' "
            "(byte-level BPE). Load the tokenizer from the Hugging Face directory of this model."
        )
    if pre not in _SPLITS:
        raise ValueError(
            f"tokenizer.ggml.pre={pre!r} in {path} is not supported. Supported: "
            f"{', '.join(_SPLITS)}. Load the tokenizer from the Hugging Face directory."
        )


def _backend(tokens: list[str], merges: list[str], pre: str) -> Tokenizer:
    pairs = [(first, second) for first, second in (merge.split(" ") for merge in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocabulary, pairs, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    if pre in _NFC:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    digits = [pre_tokenizers.Digits(individual_digits=True)] if pre in _SINGLE_DIGITS else []
    split = pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*digits, split, to_bytes])


def _added_tokens(tokens: list[str], kinds: list[int]) -> list[AddedToken]:
    return [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
