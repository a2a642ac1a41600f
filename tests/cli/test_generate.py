"""`jaxpeft generate`, against transformers' own generation and decoding."""

import io

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from jaxpeft.cli.text import pieces
from tests.cli.test_finetune import tuned_by_peft


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return transformers.AutoTokenizer.from_pretrained(tiny_model)


def greedy(model, tokenizer, ids, n):
    """What transformers writes after these ids."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(tokens, do_sample=False, max_new_tokens=n, pad_token_id=0)
    new = out[0, len(ids) :].tolist()
    return tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_answer_equals_that_of_peft(jaxpeft, run, tiny_model, tokenizer):
    messages = [
        {"role": "system", "content": "Is it good?"},
        {"role": "user", "content": "a dull film"},
    ]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    expected = greedy(tuned_by_peft(tiny_model, run), tokenizer, ids, 6)
    asked = ("--system", "Is it good?", "--prompt", "a dull film", "--max-new-tokens", 6)
    result = jaxpeft("generate", tiny_model, "--adapter", run, *asked)
    assert result.code == 0 and result.raw == expected + "\n"


def test_bare_text_comes_from_standard_input(jaxpeft, tiny_model, tokenizer, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the plot is\n"))
    result = jaxpeft("generate", tiny_model, "--no-template", "--max-new-tokens", 5)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = greedy(base, tokenizer, tokenizer("the plot is").input_ids, 5)
    assert result.code == 0 and result.raw == expected + "\n"


def test_a_chat_goes_on_until_an_empty_line(jaxpeft, tiny_model, monkeypatch):
    lines = iter(["hello", "a film", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    result = jaxpeft("generate", tiny_model, "--chat", "--max-new-tokens", 2)
    assert result.code == 0 and result.raw.count("\n") == 2
    assert next(lines, None) is None


def test_another_seed_draws_another_text(jaxpeft, tiny_model):
    drawn = ("--prompt", "a", "--max-new-tokens", 8, "--temperature", 1.5, "--top-p", 0.95)
    texts = [jaxpeft("generate", tiny_model, *drawn, "--seed", s).raw for s in (0, 1)]
    assert texts[0] != texts[1]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
def test_pieces_join_to_the_text_and_are_never_half_a_character(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    parts = list(pieces(ids, tokenizer))
    assert "".join(parts) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


def test_pieces_come_as_soon_as_they_can(tokenizer):
    ids = tokenizer("é film", add_special_tokens=False).input_ids
    taken = []
    parts = pieces((taken.append(i) or i for i in ids), tokenizer)
    assert next(parts) == "é" and len(taken) == 2  # two bytes, no merge of them was learned


def test_an_unfinished_character_comes_at_the_end(tokenizer):
    half = tokenizer("é", add_special_tokens=False).input_ids[:1]
    assert list(pieces(half, tokenizer)) == ["\ufffd"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "a", "--chat"), "Leave out --prompt"),
        (("--prompt", "a", "--no-template", "--system", "b"), "Leave out --no-template"),
        (("--prompt", "a", "--max-new-tokens", "0"), "--max-new-tokens 0"),
        (("--prompt", "a", "--temperature", "-1"), "--temperature -1.0 is negative"),
        (("--prompt", "a", "--top-p", "2"), "--top-p 2.0 is not in (0, 1]"),
        (
            ("--prompt", "a", "--adapter", "nowhere"),
            "nowhere holds no adapter",
        ),
    ],
)
def test_a_bad_value_is_one_message(jaxpeft, tiny_model, options, message):
    result = jaxpeft("generate", tiny_model, *options)
    assert result.code == 2 and message in result.err and "Traceback" not in result.err
