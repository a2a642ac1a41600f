import numpy as np
import pytest

from jaxpeft import train

USER = {"role": "user", "content": "two and two?"}
ANSWER = {"role": "assistant", "content": "the answer is four"}
MORE = [{"role": "user", "content": "and the fox?"}, {"role": "assistant", "content": "quick é🦊"}]

# What Qwen3 and DeepSeek do: only the last turn keeps its reasoning.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A generation prompt that opens a block which the turn itself does not have.
OPENING = REASONING.replace("<think>\n\n</think>\n\n", "").replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
)

# It changes the question when the answer is there.
REWRITING = (
    "{% for m in messages %}{{ m.role }}: "
    "{{ m.content if messages | length == 1 else m.content | upper }}\n{% endfor %}"
)


def encode(tokenizer, *rows, max_length=512):
    records = [train.Record(row, f"d.jsonl:{i}") for i, row in enumerate(rows, 1)]
    return train.encode(records, tokenizer, max_length=max_length)


def learned(tokenizer, example):
    """The decoded runs of target tokens."""
    cuts = np.flatnonzero(np.diff(example.targets.astype(int))) + 1
    runs = zip(np.split(example.tokens, cuts), np.split(example.targets, cuts), strict=True)
    return [tokenizer.decode(ids).strip(" ") for ids, targets in runs if targets[0]]


def test_chat_learns_every_assistant_turn_and_its_end(chat_tokenizer):
    system = {"role": "system", "content": "answer"}
    [example] = encode(chat_tokenizer, {"messages": [system, USER, ANSWER, *MORE]})
    # One of the tokenizers has no such letters: what it makes of them is the expected text.
    ids = chat_tokenizer("quick é🦊<|im_end|>", add_special_tokens=False).input_ids
    last = chat_tokenizer.decode(ids).strip(" ")
    assert learned(chat_tokenizer, example) == ["the answer is four<|im_end|>", last]
    whole = chat_tokenizer.apply_chat_template([system, USER, ANSWER, *MORE], tokenize=False)
    ids = chat_tokenizer(whole, add_special_tokens=False).input_ids
    assert example.tokens.tolist() == ids


def test_chat_equals_the_templates_own_generation_mask(chat_tokenizer):
    """Transformers marks the tokens between `{% generation %}` tags; ours finds them without."""
    tagged = chat_tokenizer.chat_template.replace(
        "{{ m.content }}<|im_end|>",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '' }}",
    )
    messages = [USER, ANSWER, *MORE]
    expected = chat_tokenizer.apply_chat_template(
        messages, chat_template=tagged, return_dict=True, return_assistant_tokens_mask=True
    )
    [example] = encode(chat_tokenizer, {"messages": messages})
    assert example.tokens.tolist() == expected["input_ids"]
    assert example.targets.astype(int).tolist() == expected["assistant_masks"]


def test_messages_after_the_last_answer_are_left_out(chat_tokenizer):
    with_question = encode(chat_tokenizer, {"messages": [USER, ANSWER, USER]})
    without = encode(chat_tokenizer, {"messages": [USER, ANSWER]})
    assert with_question[0].tokens.tolist() == without[0].tokens.tolist()


def test_a_template_that_rewrites_history_gives_one_example_a_turn(chat_tokenizer, monkeypatch):
    monkeypatch.setattr(chat_tokenizer, "chat_template", REASONING)
    examples = encode(chat_tokenizer, {"messages": [USER, ANSWER, *MORE[:1], ANSWER]})
    assert [learned(chat_tokenizer, e) for e in examples] == 2 * [
        ["<think>\n\n</think>\n\nthe answer is four<|im_end|>"]
    ]
    [alone] = encode(chat_tokenizer, {"messages": [USER, ANSWER]})
    assert alone.tokens.tolist() == examples[0].tokens.tolist()
    text = chat_tokenizer.decode(examples[1].tokens)
    assert text.count("<think>") == 1  # as the model sees it at the second turn


def test_a_generation_prompt_with_more_than_the_turn(chat_tokenizer, monkeypatch):
    monkeypatch.setattr(chat_tokenizer, "chat_template", OPENING)
    [example] = encode(chat_tokenizer, {"messages": [USER, ANSWER]})
    assert learned(chat_tokenizer, example) == ["the answer is four<|im_end|>"]


def test_instructions_become_a_chat_where_there_is_a_template(chat_tokenizer):
    [example] = encode(
        chat_tokenizer, {"instruction": "add", "input": "two and two", "output": "four"}
    )
    user = {"role": "user", "content": "add\n\ntwo and two"}
    [same] = encode(chat_tokenizer, {"messages": [user, {"role": "assistant", "content": "four"}]})
    assert example.tokens.tolist() == same.tokens.tolist()
    assert learned(chat_tokenizer, example) == ["four<|im_end|>"]


@pytest.mark.parametrize("context", ["", "two and two"])
def test_instructions_become_the_alpaca_prompt_otherwise(plain_tokenizer, context):
    [example] = encode(plain_tokenizer, {"instruction": "add", "input": context, "output": "four"})
    assert learned(plain_tokenizer, example) == ["four</s>"]
    text = plain_tokenizer.decode(example.tokens, skip_special_tokens=True)
    assert ("### Input:\ntwo and two\n\n### Response:" in text) == bool(context)
    assert text.endswith("### Response:\nfour")


def test_prompt_and_completion(plain_tokenizer):
    [example] = encode(plain_tokenizer, {"prompt": "two and two is", "completion": " four"})
    assert learned(plain_tokenizer, example) == ["four</s>"]
    ids = plain_tokenizer("two and two is four").input_ids
    assert example.tokens.tolist() == [*ids, plain_tokenizer.eos_token_id]


def test_text_is_learned_whole_but_for_the_begin_token(plain_tokenizer):
    [example] = encode(plain_tokenizer, {"text": "the quick brown fox"})
    assert learned(plain_tokenizer, example) == ["the quick brown fox</s>"]
    assert (~example.targets).sum() == (example.tokens == plain_tokenizer.bos_token_id).sum()


def test_order_is_kept_when_forms_are_mixed(chat_tokenizer):
    examples = encode(
        chat_tokenizer, {"text": "fox"}, {"messages": [USER, ANSWER]}, {"text": "brown"}
    )
    assert [learned(chat_tokenizer, e)[0] for e in examples] == [
        "fox<|im_end|>", "the answer is four<|im_end|>", "brown<|im_end|>"
    ]  # fmt: skip


def test_truncation_keeps_the_start(plain_tokenizer):
    row = {"prompt": "two and two is", "completion": " four" * 50}
    [whole], [cut] = encode(plain_tokenizer, row), encode(plain_tokenizer, row, max_length=12)
    assert cut.tokens.tolist() == whole.tokens[:12].tolist()
    assert cut.targets.tolist() == whole.targets[:12].tolist()


def test_examples_without_a_completion_are_counted(plain_tokenizer):
    long = {"prompt": "two " * 40, "completion": "four"}
    with pytest.warns(UserWarning, match=r"1 of 2 examples.*max_length=16.*d.jsonl:2"):
        examples = encode(plain_tokenizer, {"text": "fox"}, long, max_length=16)
    assert len(examples) == 1
    with pytest.raises(ValueError, match="1 of 1 examples.*nothing to train on"):
        encode(plain_tokenizer, long, max_length=16)


def test_errors_name_the_record(plain_tokenizer, chat_tokenizer, monkeypatch):
    with pytest.raises(ValueError, match="d.jsonl:1: .*no chat template"):
        encode(plain_tokenizer, {"messages": [USER, ANSWER]})
    monkeypatch.setattr(chat_tokenizer, "chat_template", REWRITING)
    with pytest.raises(ValueError, match="d.jsonl:1: .*another way once an answer"):
        encode(chat_tokenizer, {"messages": [USER, ANSWER]})
    strict = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(chat_tokenizer, "chat_template", strict)
    with pytest.raises(ValueError, match=r"d.jsonl:1: .*\['user'\]: roles must alternate"):
        encode(chat_tokenizer, {"messages": [USER, ANSWER]})
