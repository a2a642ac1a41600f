"""The parts of the examples that a run does not check; scripts/test.sh runs each with --small."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def tag_tokens():
    """The names of examples/tag_tokens.py, whose training is left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tag_tokens.py", "--small"])
        names = runpy.run_path(str(EXAMPLES / "tag_tokens.py"), run_name="example")
    yield names
    names["scratch"].cleanup()


def test_words_have_the_tags_of_values_that_are_spelled_out(tag_tokens):
    slots = {
        "name": "The Mill",
        "near": "Café Rouge",
        "priceRange": "cheap",
        "familyFriendly": "no",
    }
    text = "the mill, near Café Rouge (no treadmill), is not cheaper: it's cheap."
    words, found = tag_tokens["tag"](slots, text)
    named = [(word, tag_tokens["tags"][number]) for word, number in zip(words, found, strict=True)]
    assert [pair for pair in named if pair[1] != "O"] == [
        ("the", "name"), ("mill", "name"), ("Café", "near"), ("Rouge", "near"),
        ("cheap", "priceRange"),
    ]  # fmt: skip
    assert [word for word, _ in named[:4]] == ["the", "mill", ",", "near"]


def test_sentences_with_one_value_in_two_slots_are_left_out(tag_tokens, tmp_path):
    rows = ["mr,ref", '"priceRange[high], customer rating[high]",High.', "name[Aromi],Aromi."]
    (tmp_path / "data.csv").write_text("\n".join(rows))
    assert tag_tokens["read"](tmp_path / "data.csv") == [({"name": "Aromi"}, "Aromi.")]


def test_a_tag_stands_at_the_first_token_of_its_word(tag_tokens):
    batch = tag_tokens["rows"]([(["Aroma", "is", "cheap"], [1, 0, 6])], seed=None)(0)
    # [CLS], three words, [SEP]; the tiny tokenizer does not split words.
    assert batch["labels"][0][:6].tolist() == [-1, 1, 0, 6, -1, -1]
    assert batch["mask"][0].sum() == 5 and batch["weight"].sum() == 1


def test_the_score_of_tags(tag_tokens):
    wanted = [np.array([1, 1, 0, 2]), np.array([0, 3])]
    assert tag_tokens["spans"](wanted[0]) == {(0, 2, 1), (3, 4, 2)}
    predicted = [np.array([1, 0, 0, 2]), np.array([0, 3])]
    # 5 of 6 words; 2 of 3 values found, one of 3 guesses wrong.
    assert tag_tokens["score"](predicted, wanted) == pytest.approx((5 / 6, 2 / 3))
