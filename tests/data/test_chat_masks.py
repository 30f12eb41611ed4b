"""Loss masks of conversations under templates of every style."""

from __future__ import annotations

import pytest
from chat_templates import (
    CHATML,
    CHATML_MARKED,
    CHATML_MARKED_SEPARATOR,
    CHATML_MARKED_WORDS,
    COUNTS_MESSAGES,
    DROPS_REASONING,
    LLAMA3,
    MISTRAL,
    OPENS_THOUGHT,
    PLAIN,
    SHOUTS,
    assistant,
    learned,
    tokenizer_with,
    user,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.data.chat import Dropped, TextEncoder, TextEncoding, encode_example, encode_prompt, pre_query_prefix, render_chat
from mmalign.data.encoding import encode_rendered
from mmalign.data.turns import ChatTemplate, end_of_turn_text
from mmalign.errors import DataError

TALK = [user("How many?"), assistant("Four."), user("Sure?"), assistant("Yes, 4.")]
STYLES = {
    "chatml": (CHATML, "<|im_end|>"), "marked": (CHATML_MARKED, "<|im_end|>"),
    "marked words": (CHATML_MARKED_WORDS, "<|im_end|>"), "marked separator": (CHATML_MARKED_SEPARATOR, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"), "mistral": (MISTRAL, "</s>"), "drops reasoning": (DROPS_REASONING, "<|im_end|>"),
    "opens thought": (OPENS_THOUGHT, "<|im_end|>"), "counts": (COUNTS_MESSAGES, "<|im_end|>"),
}


@pytest.mark.parametrize("style", STYLES)
def test_every_style_trains_each_assistant_turn_with_its_end_token_and_nothing_else(style):
    template, end = STYLES[style]
    tokenizer = tokenizer_with(template, end=end, bos=True)
    words = [text.strip() for text in learned({"messages": TALK}, tokenizer)]
    assert words == [f"Four.{end}", f"Yes, 4.{end}"]


@pytest.mark.parametrize("style", STYLES)
def test_ids_are_those_of_the_whole_rendering_with_one_bos_at_most(style):
    template, end = STYLES[style]
    tokenizer = tokenizer_with(template, end=end, bos=True)
    ids = encode_example({"messages": TALK}, tokenizer)["input_ids"]
    assert tokenizer.decode(ids) == render_chat(TALK, tokenizer)
    assert ids.count(tokenizer.bos_token_id) == (1 if "bos_token" in template else 0)


@pytest.mark.parametrize("style", sorted(set(STYLES) - {"opens thought"}))  # which samples in another context than it trains
def test_prompt_for_sampling_is_what_precedes_the_learned_completion(style):
    template, end = STYLES[style]
    tokenizer = tokenizer_with(template, end=end, bos=True)
    prompt = encode_prompt(TALK[:3], tokenizer)
    if style == "counts":  # the count changes with the answer; the rest is the same
        prompt = encode_rendered(render_chat(TALK[:3], tokenizer, generation_prompt=True).replace("3 ", "4 ", 1), tokenizer)
    row = encode_example({"prompt": TALK[:3], "completion": TALK[3:]}, tokenizer)
    start = next(i for i, label in enumerate(row["labels"]) if label != -100)
    thought = len(encode_rendered("<think>\n\n</think>\n\n", tokenizer)) if style == "drops reasoning" else 0
    assert row["input_ids"][: start - thought] == prompt


def test_marks_and_prefixes_give_the_same_mask():
    with_marks = encode_example({"messages": TALK}, tokenizer_with(CHATML_MARKED))
    without = encode_example({"messages": TALK}, tokenizer_with(
        CHATML_MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")))
    assert with_marks == without


def test_separator_after_the_end_token_is_learned_only_on_request():
    for template in (CHATML, CHATML_MARKED, CHATML_MARKED_WORDS, CHATML_MARKED_SEPARATOR, COUNTS_MESSAGES):
        tokenizer = tokenizer_with(template)
        assert learned({"messages": TALK[:2]}, tokenizer) == ["Four.<|im_end|>"]
        assert learned({"messages": TALK[:2]}, tokenizer, train_on_separator=True) == ["Four.<|im_end|>\n"]


def test_end_tokens_follow_the_option():
    tokenizer = tokenizer_with(CHATML)
    row = {"messages": TALK}
    assert learned(row, tokenizer, train_on_eos="none") == ["Four.", "Yes, 4."]
    assert learned(row, tokenizer, train_on_eos="last") == ["Four.", "Yes, 4.<|im_end|>"]
    every = learned(row, tokenizer, train_on_eos="all")
    # system message, user, assistant, user, assistant
    assert every == ["<|im_end|>", "<|im_end|>", "Four.<|im_end|>", "<|im_end|>", "Yes, 4.<|im_end|>"]


def test_last_turn_only_and_per_message_choice():
    tokenizer = tokenizer_with(CHATML)
    assert learned({"messages": TALK}, tokenizer, last_turn_only=True) == ["Yes, 4.<|im_end|>"]
    chosen = [TALK[0], assistant("Four.", train=False), TALK[2], TALK[3]]
    assert learned({"messages": chosen}, tokenizer) == ["Yes, 4.<|im_end|>"]
    kept = [TALK[0], assistant("Four.", train=True), TALK[2], TALK[3]]
    assert learned({"messages": kept}, tokenizer, last_turn_only=True) == ["Four.<|im_end|>", "Yes, 4.<|im_end|>"]
    muted = [user("Hi"), assistant("Yo", train=False)]
    assert encode_example({"messages": muted}, tokenizer) == Dropped("no token to train on")
    with pytest.raises(DataError, match=r"message 0: train: true is for assistant"):
        encode_example({"messages": [{**user("Hi"), "train": True}, assistant("Yo")]}, tokenizer)


def test_whole_conversation_is_learned_when_completion_only_is_off():
    tokenizer = tokenizer_with(CHATML)
    row = encode_example({"messages": TALK}, tokenizer, TextEncoding(completion_only_loss=False))
    assert row["labels"] == [-100, *row["input_ids"][1:]]


def test_earlier_reasoning_is_dropped_from_the_text_but_every_turn_is_still_found():
    tokenizer = tokenizer_with(DROPS_REASONING)
    talk = [user("2+2?"), assistant("<think>\neasy\n</think>\n\nFour."), user("Sure?"),
            assistant("<think>\nagain\n</think>\n\nYes.")]
    assert learned({"messages": talk}, tokenizer) == ["Four.<|im_end|>", "<think>\nagain\n</think>\n\nYes.<|im_end|>"]


def test_an_empty_thought_written_by_the_template_is_not_learned():
    tokenizer = tokenizer_with(DROPS_REASONING)
    assert "<think>" in render_chat(TALK, tokenizer)
    assert learned({"messages": TALK}, tokenizer)[-1] == "Yes, 4.<|im_end|>"


def test_reasoning_that_the_template_removes_is_said(caplog):
    tokenizer = tokenizer_with(OPENS_THOUGHT)
    talk = [user("2+2?"), assistant("<think>because of counting</think>Four.")]
    assert learned({"messages": talk}, tokenizer) == ["Four.<|im_end|>"]
    assert "removes the <think> part" in caplog.text


def test_repeated_words_are_found_at_the_right_place_without_prefixes():
    tokenizer = tokenizer_with(COUNTS_MESSAGES)
    talk = [user("yes yes"), assistant("yes"), user("yes"), assistant("yes yes")]
    encoder = TextEncoder(tokenizer)
    row = encoder.encode({"messages": talk})
    text = tokenizer.decode(row["input_ids"])
    assert text.count("yes") == 6
    ids, turns = encoder.template.encode(talk)
    before = [tokenizer.decode(ids[: turn.start]) for turn in turns]
    assert all(text.endswith("<|im_start|>assistant\n") for text in before)
    assert [tokenizer.decode(ids[turn.start:turn.stop]) for turn in turns] == ["yes<|im_end|>\n", "yes yes<|im_end|>\n"]


def test_a_template_that_hides_the_words_is_refused():
    tokenizer = tokenizer_with(SHOUTS)
    with pytest.raises(DataError, match=r"which part of the conversation message 1 \(assistant\).*generation %"):
        encode_example({"messages": [user("hi"), assistant("hello")]}, tokenizer)


def test_a_template_without_end_token_learns_the_line_break_that_ends_a_turn():
    tokenizer = tokenizer_with(PLAIN)
    assert learned({"messages": TALK[:2]}, tokenizer) == [" Four.\n"]
    assert end_of_turn_text(ChatTemplate(tokenizer)._renderer({})) == ""


def test_assistant_that_opens_a_conversation_does_not_teach_its_header():
    tokenizer = tokenizer_with(CHATML)
    assert learned({"messages": [assistant("Welcome."), user("Hi"), assistant("Yo")]}, tokenizer) == \
        ["Welcome.<|im_end|>", "Yo<|im_end|>"]


def test_missing_template_and_refused_roles_name_the_cause():
    with pytest.raises(DataError, match=r"no chat template"):
        encode_example({"messages": TALK}, tokenizer_with(None))
    with pytest.raises(DataError, match=r"only user and assistant roles"):
        encode_example({"messages": [{"role": "system", "content": "x"}, *TALK]}, tokenizer_with(MISTRAL, end="</s>"))
    with pytest.raises(DataError, match=r"role must be one of .*not 'bot'"):
        encode_example({"messages": [{"role": "bot", "content": "x"}]}, tokenizer_with(CHATML))
    with pytest.raises(DataError, match=r"non-empty list of messages"):
        encode_example({"messages": []}, tokenizer_with(CHATML))


def test_tokenizers_without_offsets_give_the_same_turns():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    tokenizer.chat_template = ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
                               "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    row = encode_example({"messages": TALK}, tokenizer)
    text = "user: How many?</s>assistant: Four.</s>user: Sure?</s>assistant: Yes, 4.</s>"
    assert tokenizer.decode(row["input_ids"]) == text
    assert [token for token in row["labels"] if token != -100] == \
        [*tokenizer("Four.").input_ids, *tokenizer("Yes, 4.").input_ids]


def test_template_variables_come_from_options_and_rows():
    template = CHATML.replace("Be kind.", "{{ '' }}' + style + '{{ '' }}").replace("{{ '' }}", "")
    tokenizer = tokenizer_with(template)
    options = TextEncoding(template_arguments={"style": "terse"})
    row = {"messages": TALK[:2]}
    assert "system\nterse<" in tokenizer.decode(encode_example(row, tokenizer, options)["input_ids"])
    row["chat_template_kwargs"] = {"style": "loud"}
    assert "system\nloud<" in tokenizer.decode(encode_example(row, tokenizer, options)["input_ids"])


def test_prefilled_prompt_stays_open():
    tokenizer = tokenizer_with(CHATML)
    ids = encode_prompt([user("2+2?"), assistant("The answer is")], tokenizer)
    assert tokenizer.decode(ids).endswith("assistant\nThe answer is")


@pytest.mark.parametrize("style", STYLES)
def test_pre_query_prefix_and_any_words_are_the_templates_own_rendering(style):
    template, end = STYLES[style]
    tokenizer = tokenizer_with(template, end=end, bos=True)
    prefix = pre_query_prefix(tokenizer)
    assert render_chat([user("What is 2+2?")], tokenizer).startswith(prefix + "What is 2+2?")
    assert encode_rendered(prefix, tokenizer).count(tokenizer.bos_token_id) == (1 if "bos_token" in template else 0)


text = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_characters="<>"), min_size=1, max_size=30).filter(
    lambda words: words.strip())


@pytest.mark.parametrize("answer", [" 4", "\x854", "4"])
def test_white_space_that_begins_an_answer_is_learned_after_a_thought_the_template_wrote(answer):
    template, end = STYLES["drops reasoning"]
    talk = [user("How many?"), assistant(answer)]
    assert learned({"messages": talk}, tokenizer_with(template, end=end)) == [f"{answer}{end}"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(text, text), min_size=1, max_size=4), st.sampled_from(["chatml", "marked", "drops reasoning"]))
def test_any_conversation_teaches_exactly_its_answers(turns, style):
    template, end = STYLES[style]
    tokenizer = tokenizer_with(template, end=end)
    talk = [message for question, answer in turns for message in (user(question), assistant(answer))]
    assert learned({"messages": talk}, tokenizer) == [f"{answer}{end}" for _, answer in turns]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(text, text), min_size=1, max_size=3), st.lists(text, min_size=3, max_size=3))
def test_other_questions_leave_the_labels_alone(turns, others):
    tokenizer = tokenizer_with(CHATML)
    first = [m for question, answer in turns for m in (user(question), assistant(answer))]
    second = [m for (_, answer), question in zip(turns, others, strict=False) for m in (user(question), assistant(answer))]
    assert learned({"messages": first}, tokenizer) == learned({"messages": second}, tokenizer)
