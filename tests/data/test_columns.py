"""One name per meaning: aliases, conversions, implicit prompts, and refusals that name the column."""

from __future__ import annotations

import pytest
from chat_templates import assistant, user
from hypothesis import given
from hypothesis import strategies as st

from mmalign.data.columns import (
    canonical_row,
    check_ids,
    check_messages,
    from_sharegpt,
    label_source,
    rename_plan,
    require_columns,
    split_implicit_prompt,
)
from mmalign.errors import DataError

PAIR = ("chosen", "rejected")


def canonical(row, mapping=None):
    return canonical_row(row, rename_plan(list(row), mapping))


def test_aliases_are_mapped_where_the_column_is_absent():
    assert canonical({"question": "a", "response": "b"}) == {"prompt": "a", "completion": "b"}
    assert canonical({"problem": "a", "solution": "b"}) == {"prompt": "a", "answer": "b"}
    assert canonical({"prompt": "p", "question": "q"}) == {"prompt": "p", "question": "q"}
    assert canonical({"question": "q", "answer": "a"}, {"answer": "completion"}) == {"prompt": "q", "completion": "a"}
    assert canonical({"question": "q", "text": "t"}, {"question": None}) == {"text": "t"}


def test_a_choice_between_two_meanings_is_left_to_the_user():
    with pytest.raises(DataError, match=r"'problem' and 'question' both mean 'prompt'"):
        canonical({"problem": 1, "question": 2})
    assert canonical({"problem": 1, "question": 2}, {"question": "prompt"}) == {"problem": 1, "prompt": 2}
    with pytest.raises(DataError, match=r"data.columns: columns 'a' and 'b' would both be 'c'"):
        canonical({"a": 1, "b": 2}, {"a": "c", "b": "c"})
    with pytest.raises(DataError, match=r"data.columns.promt: .*no column 'promt' \(columns are prompt\); did you mean"):
        rename_plan(["prompt"], {"promt": "completion"})


def test_alpaca_input_joins_its_instruction():
    assert canonical({"instruction": "Add.", "input": "2 2", "output": "4"}) == {"prompt": "Add.\n\n2 2", "completion": "4"}
    assert canonical({"instruction": "Hi", "input": "", "output": "Yo"}) == {"prompt": "Hi", "completion": "Yo"}


def test_sharegpt_and_single_images():
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert canonical({"conversations": turns})["messages"] == [{"role": "system", "content": "s"}, user("q"), assistant("a")]
    assert canonical({"image": "picture", "prompt": "x"}) == {"images": ["picture"], "prompt": "x"}
    assert canonical({"images": ["a", "b"]}) == {"images": ["a", "b"]}
    with pytest.raises(DataError, match=r"unknown speaker 'martian'"):
        from_sharegpt([{"from": "martian", "value": "x"}])


def test_messages_are_cleaned_and_checked():
    arrow = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "tool_calls": None},
             {"role": "assistant", "content": None, "tool_calls": [{"x": 1}]}]
    assert check_messages(arrow, column="messages") == [user("ab"), assistant("", tool_calls=[{"x": 1}])]
    with pytest.raises(DataError, match=r"message 0: content parts .*image.*vision"):
        check_messages([{"role": "user", "content": [{"type": "image"}]}], column="messages")
    with pytest.raises(DataError, match=r"content must be text, not 3"):
        check_messages([{"role": "user", "content": 3}], column="messages")


def test_implicit_prompts_of_messages():
    talk = [user("q"), assistant("a"), user("r")]
    row = split_implicit_prompt({"chosen": [*talk, assistant("x")], "rejected": [*talk, assistant("y")]}, PAIR)
    assert row == {"prompt": talk, "chosen": [assistant("x")], "rejected": [assistant("y")]}
    same = split_implicit_prompt({"chosen": [user("q"), assistant("x")], "rejected": [user("q"), assistant("x")]}, PAIR)
    assert same["chosen"] == same["rejected"] == [assistant("x")]
    system = [{"role": "system", "content": "s"}, user("q")]
    row = split_implicit_prompt({"prompt": "q", "chosen": [*system, assistant("x")], "rejected": [*system, assistant("y")]}, PAIR)
    assert row["prompt"] == system
    with pytest.raises(DataError, match=r"some samples are messages and others text"):
        split_implicit_prompt({"prompt": "q", "chosen": [assistant("x")], "rejected": "y"}, PAIR)


def test_implicit_text_prompts_split_no_word():
    row = split_implicit_prompt({"chosen": "Yes, it is great", "rejected": "Yes, it is grand"}, PAIR)
    assert row == {"prompt": "Yes, it is", "chosen": " great", "rejected": " grand"}
    row = split_implicit_prompt({"chosen": "yes", "rejected": "yellow"}, PAIR)
    assert row["prompt"] == ""


@given(st.text(max_size=20), st.text(max_size=10), st.text(max_size=10))
def test_an_implicit_prompt_loses_nothing(start, first, second):
    chosen, rejected = start + first, start + second
    row = split_implicit_prompt({"chosen": chosen, "rejected": rejected}, PAIR)
    assert row["prompt"] + row["chosen"] == chosen
    assert row["prompt"] + row["rejected"] == rejected
    assert not row["prompt"] or row["prompt"] == row["prompt"].rstrip()


def test_label_sources():
    assert label_source(["prompt", "completion", "answer"]) == "completion"
    assert label_source(["prompt", "messages"]) == "messages"
    with pytest.raises(DataError, match=r"'messages' and 'completion' each say what to learn"):
        label_source(["messages", "prompt", "completion"])
    with pytest.raises(DataError, match=r"columns are prompt, complation\); did you mean 'complation'"):
        label_source(["prompt", "complation"])
    with pytest.raises(DataError, match=r"'completion' needs a column 'prompt'"):
        label_source(["completion"])


def test_required_columns_and_ids():
    require_columns(["prompt", "answer"], ["prompt"], purpose="grpo")
    with pytest.raises(DataError, match=r"grpo needs a column 'answer'.*did you mean 'ground_truth'"):
        require_columns(["prompt", "ground_truth"], ["answer"], purpose="grpo")
    check_ids([1, 2, "3"], source="data")
    with pytest.raises(DataError, match=r"id 2 occurs more than once"):
        check_ids([1, 2, 2], source="data")
    with pytest.raises(DataError, match=r"row 1 has the id None"):
        check_ids([1, None], source="data")
