"""Rows of text, completions and pairs as ids and labels; truncation; whole data sets and what is reported about them."""

from __future__ import annotations

import json

import pytest
from chat_templates import CHATML, CHATML_MARKED, LLAMA3, assistant, learned, stretches, tokenizer_with, user
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.config import parse
from mmalign.data.chat import (
    Dropped,
    TextEncoding,
    decode_completion,
    encode_dataset,
    encode_example,
    encode_prompt,
    mark_trained,
)
from mmalign.data.encoding import balanced_lengths
from mmalign.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def plain():
    return tokenizer_with(None)


@pytest.fixture(scope="module")
def with_bos():
    return tokenizer_with(LLAMA3, bos=True, end="<|eot_id|>")


def test_text_is_learned_whole_and_ends_with_eos(plain):
    row = encode_example({"text": "What is it?"}, plain)
    assert plain.decode(row["input_ids"]) == "What is it?<|im_end|>"
    assert row["labels"] == [-100, *row["input_ids"][1:]]
    assert row["truncated"] is False
    again = encode_example({"text": "What is it?<|im_end|>"}, plain)
    assert again == row


def test_end_token_options_of_plain_text(plain):
    row = {"prompt": "2 + 2 =", "completion": " 4"}
    assert learned(row, plain) == [" 4<|im_end|>"]
    assert learned(row, plain, train_on_eos="none") == [" 4"]
    assert learned(row, plain, append_eos=False) == [" 4"]
    assert learned(row, plain, append_eos=False, train_on_eos="none") == [" 4"]


def test_completion_only_loss(plain):
    row = {"prompt": "2 + 2 =", "completion": " 4"}
    assert learned(row, plain, completion_only_loss=False) == [" + 2 = 4<|im_end|>"]  # all but the first token
    assert learned({"prompt": "", "completion": "What"}, plain) == ["<|im_end|>"]
    with pytest.raises(DataError, match=r"completion_only_loss: true needs rows with prompt and completion"):
        encode_example({"text": "x"}, plain, TextEncoding(completion_only_loss=True))


def test_exactly_one_bos(with_bos):
    bos = with_bos.bos_token_id
    for row in ({"text": "What"}, {"text": "<s>What"}, {"prompt": "What", "completion": " is"},
                {"prompt": "<s>What", "completion": " is"}, {"messages": [user("a"), assistant("b")]},
                {"prompt": [user("a")], "completion": [assistant("b")]}):
        ids = encode_example(row, with_bos)["input_ids"]
        assert ids[0] == bos, row
        assert ids.count(bos) == 1, row
    assert encode_prompt("What", with_bos) == [bos, *with_bos("What", add_special_tokens=False).input_ids]
    assert encode_prompt([user("a")], with_bos).count(bos) == 1


def test_prompts_carry_no_end_token_even_when_the_tokenizer_adds_one():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert tokenizer("ab").input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in encode_prompt("ab", tokenizer)
    row = encode_example({"prompt": "ab", "completion": "c"}, tokenizer)
    assert row["input_ids"] == tokenizer("abc").input_ids
    assert [label for label in row["labels"] if label != -100] == tokenizer("c").input_ids


def test_tokens_that_merge_across_the_boundary_belong_to_the_completion(plain, caplog):
    # "tha" + "t": alone the prompt ends in pieces, together they are one token.
    prompt, completion = "What is th", "at"
    whole = plain("What is that").input_ids
    assert plain("What is th").input_ids != whole[:-1] + plain("th").input_ids
    row = encode_example({"prompt": prompt, "completion": completion}, plain)
    assert row["input_ids"][:-1] == whole
    assert stretches(row["input_ids"], row["labels"], plain) == [" that<|im_end|>"]
    assert "span prompt and completion" in caplog.text


words = st.text(st.characters(min_codepoint=32, max_codepoint=0x3FF, exclude_characters="<>"), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(words, words)
def test_prompt_and_completion_are_one_text_and_the_label_starts_at_its_prefix(prompt, completion):
    tokenizer = tokenizer_with(None)
    row = encode_example({"prompt": prompt, "completion": completion}, tokenizer)
    ids, labels = row["input_ids"], row["labels"]
    assert ids == [*tokenizer(prompt + completion).input_ids, tokenizer.eos_token_id]
    start = next(i for i, label in enumerate(labels) if label != -100)
    prompt_ids = encode_prompt(prompt, tokenizer)
    assert labels[start:] == ids[start:]
    assert start <= max(1, len(prompt_ids))
    assert ids[:start] == prompt_ids[:start] or start == 1


@settings(max_examples=60, deadline=None)
@given(words, words, words)
def test_another_prompt_leaves_the_labels_of_separated_completions_alone(first, second, completion):
    tokenizer = tokenizer_with(None)
    taught = [
        [label for label in encode_example({"prompt": f"{prompt}\n:", "completion": f" {completion}"}, tokenizer)["labels"]
         if label != -100]
        for prompt in (first, second)
    ]
    assert taught[0] == taught[1]


def test_pretokenised_rows(plain):
    ids = [5, 6, 7, 8]
    assert encode_example({"input_ids": ids}, plain)["labels"] == [-100, 6, 7, 8]
    assert encode_example({"input_ids": ids, "labels": [5, -100, 7, 8]}, plain)["labels"] == [-100, -100, 7, 8]
    masks = {"input_ids": ids, "completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 0, 1]}
    assert encode_example(masks, plain)["labels"] == [-100, 6, -100, 8]
    with pytest.raises(DataError, match=r"'labels' and 'completion_mask' both say"):
        encode_example({"input_ids": ids, "labels": ids, "completion_mask": [1] * 4}, plain)
    with pytest.raises(DataError, match=r"'labels' has 3 entries, but 'input_ids' has 4"):
        encode_example({"input_ids": ids, "labels": ids[:3]}, plain)
    with pytest.raises(DataError, match=r"'input_ids' is empty"):
        encode_example({"input_ids": []}, plain)
    pair = {f"{name}_{part}": ids for name in ("chosen", "rejected") for part in ("input_ids", "labels")}
    pair["rejected_input_ids"] = pair["rejected_labels"] = [5, 6, 9]
    assert encode_example(pair, plain, fields=("chosen", "rejected"))["rejected_labels"] == [-100, 6, 9]


def test_two_sources_of_labels_are_refused(plain):
    with pytest.raises(DataError, match=r"'text' and 'messages' each say what to learn"):
        encode_example({"text": "a", "messages": [user("a"), assistant("b")]}, plain)
    # Arrow fills absent columns with None: that is no second source.
    assert not isinstance(encode_example({"text": "ab", "messages": None}, plain), Dropped)


def test_truncation_keeps_the_start_and_drops_rows_without_a_label(plain):
    row = {"prompt": "12345", "completion": "6789"}
    cut = encode_example(row, plain, TextEncoding(max_length=7))
    assert plain.decode(cut["input_ids"]) == "1234567"
    assert stretches(cut["input_ids"], cut["labels"], plain) == ["67"]
    assert cut["truncated"] is True
    assert encode_example(row, plain, TextEncoding(max_length=5)) == Dropped("the prompt alone reaches max_length")
    assert encode_example(row, plain, TextEncoding(max_length=10))["truncated"] is False
    assert encode_example(row, plain, TextEncoding(max_length=7, truncation="drop")) == Dropped("longer than max_length")


def test_no_limit_takes_the_tokenizers_window(plain):
    row = {"text": "1" * 3000}
    assert plain.model_max_length == 1024
    assert len(encode_example(row, plain)["input_ids"]) == 1024
    assert len(encode_example(row, plain, TextEncoding(max_length=None))["input_ids"]) == 1024
    assert len(encode_example(row, plain, TextEncoding(max_length=2000))["input_ids"]) == 2000


def test_balanced_lengths_follow_the_rule():
    assert balanced_lengths(4, 4, 10) == (4, 4)
    assert balanced_lengths(100, 3, 10) == (7, 3)       # 2t < c: the prompt alone is cut
    assert balanced_lengths(3, 100, 10) == (3, 7)       # 2s < c: the completion alone
    assert balanced_lengths(30, 10, 16) == (12, 4)      # else in proportion
    assert balanced_lengths(5, 5, 10) == (5, 5)


@given(st.integers(0, 200), st.integers(1, 200), st.integers(2, 200))
def test_balanced_lengths_fill_the_room_and_invent_nothing(source, target, capacity):
    kept_source, kept_target = balanced_lengths(source, target, capacity)
    assert 0 <= kept_source <= source
    assert 0 <= kept_target <= target
    assert kept_source + kept_target == min(capacity, source + target)


def test_balanced_truncation_keeps_the_header_of_the_answer():
    tokenizer = tokenizer_with(CHATML)
    row = {"messages": [user("1" * 100), assistant("22")]}
    cut = encode_example(row, tokenizer, TextEncoding(max_length=60, truncation="balanced"))
    text = tokenizer.decode(cut["input_ids"])
    assert len(cut["input_ids"]) <= 60
    assert "1<|im_end|>\n<|im_start|>assistant\n22<|im_end|>" in text
    assert stretches(cut["input_ids"], cut["labels"], tokenizer) == ["22<|im_end|>"]


PAIR = ("chosen", "rejected")


def test_pairs_in_every_form_share_their_prompt():
    tokenizer = tokenizer_with(CHATML_MARKED)
    talk = [user("2+2?")]
    forms = [
        {"prompt": talk, "chosen": [assistant("4")], "rejected": [assistant("5")]},
        {"chosen": [*talk, assistant("4")], "rejected": [*talk, assistant("5")]},
        {"prompt": "2+2?", "chosen": [*talk, assistant("4")], "rejected": [*talk, assistant("5")]},
        {"prompt": "2+2?", "chosen": [assistant("4")], "rejected": [assistant("5")]},
        {"prompt": talk, "chosen": "4", "rejected": "5"},
        {"prompt": talk, "chosen": [*talk, assistant("4")], "rejected": [*talk, assistant("5")]},
    ]
    rows = [encode_example(row, tokenizer, fields=PAIR) for row in forms]
    assert all(row == rows[0] for row in rows)
    assert stretches(rows[0]["chosen_input_ids"], rows[0]["chosen_labels"], tokenizer) == ["4<|im_end|>"]
    assert stretches(rows[0]["rejected_input_ids"], rows[0]["rejected_labels"], tokenizer) == ["5<|im_end|>"]


def test_text_pairs_and_implicit_text_prompts(plain):
    explicit = encode_example({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, plain, fields=PAIR)
    implicit = encode_example({"chosen": "2 + 2 = 4", "rejected": "2 + 2 = 5"}, plain, fields=PAIR)
    assert explicit == implicit
    assert stretches(explicit["chosen_input_ids"], explicit["chosen_labels"], plain) == [" 4<|im_end|>"]


def test_pairs_without_contrast_are_dropped(plain):
    row = {"prompt": "a", "chosen": " b", "rejected": " b"}
    assert encode_example(row, plain, fields=PAIR) == Dropped("chosen and rejected are identical")
    late = {"prompt": "a", "chosen": "1" * 20 + "2", "rejected": "1" * 20 + "3"}
    assert encode_example(late, plain, TextEncoding(max_length=10), fields=PAIR) == Dropped("chosen and rejected are identical")
    long = {"prompt": "1" * 20, "chosen": " 2", "rejected": " 3"}
    assert encode_example(long, plain, TextEncoding(max_length=10), fields=PAIR) == Dropped("the prompt alone reaches max_length")


def test_balanced_pairs_keep_one_prompt(plain):
    row = {"prompt": "1" * 50 + ":", "chosen": "2" * 30, "rejected": "3" * 8}
    cut = encode_example(row, plain, TextEncoding(max_length=40, truncation="balanced"), fields=PAIR)
    prompts = [cut[f"{name}_input_ids"][: next(i for i, label in enumerate(cut[f"{name}_labels"]) if label != -100)]
               for name in PAIR]
    assert prompts[0] == prompts[1]
    assert max(len(cut[f"{name}_input_ids"]) for name in PAIR) <= 40


def test_further_fields(plain):
    row = {"prompt": "a", "chosen": " b", "rejected": " c", "gold": " d"}
    result = encode_example(row, plain, fields=("chosen", "rejected", "gold"))
    assert stretches(result["gold_input_ids"], result["gold_labels"], plain) == [" d<|im_end|>"]


def test_decoding_leaves_special_tokens_out(plain):
    ids = plain("The answer is 4<|im_end|>").input_ids
    assert decode_completion(ids, plain) == "The answer is 4"
    assert mark_trained([3, *ids], [-100, *ids], plain).endswith("⟦The answer is 4<|im_end|>⟧")


def test_options_refuse_values_without_meaning():
    assert parse(TextEncoding, {"cutoff_len": 64}).max_length == 64
    for bad, message in (({"max_length": 0}, "max_length must be at least 2"), ({"max_length": -3}, "at least 2"),
                         ({"truncation": "keep_end"}, "keep_start"), ({"max_len": 3}, "did you mean max_length")):
        with pytest.raises(ConfigError, match=message):
            parse(TextEncoding, bad)
    assert parse(TextEncoding, {"max_length": None}).max_length is None


def test_a_tokenizer_without_end_token_is_refused():
    tokenizer = tokenizer_with(None)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"no end-of-sequence token"):
        encode_example({"text": "a"}, tokenizer)
    assert not isinstance(encode_example({"text": "ab"}, tokenizer, TextEncoding(append_eos=False)), Dropped)


ROWS = [{"id": "a", "prompt": "2 + 2 =", "completion": " 4", "weight": 0.5},
        {"id": "b", "prompt": "1" * 80, "completion": " 2", "weight": 1.0},
        {"id": "c", "prompt": "3 =", "completion": " " + "3" * 80, "weight": 2.0},
        {"id": "d", "prompt": "4 =", "completion": " 4", "weight": 4.0}]


def test_data_sets_report_what_they_lose(plain):
    encoded, report = encode_dataset(ROWS, plain, TextEncoding(max_length=32))
    assert [row["id"] for row in encoded] == ["a", "c", "d"]
    assert [row["weight"] for row in encoded] == [0.5, 2.0, 4.0]
    assert "completion" not in encoded[0]
    assert (report.rows, report.kept, report.truncated) == (4, 3, 1)
    assert [row["truncated"] for row in encoded] == [False, True, False]
    assert report.dropped == {"the prompt alone reaches max_length": 1}
    assert report.example == "2 + 2 =⟦ 4<|im_end|>⟧"
    assert "33.3% truncated" in report.summary()


@pytest.mark.parametrize("fields", [(), PAIR])
def test_arrow_data_sets_give_the_same_rows_from_disk(plain, tmp_path, fields):
    import datasets

    rows = ROWS if not fields else [
        {"id": "a", "prompt": "2 =", "chosen": " 2", "rejected": " 3"},
        {"id": "b", "prompt": "2", "chosen": "2", "rejected": "2"},
        {"id": "c", "prompt": "3 =", "chosen": " 3", "rejected": " " + "4" * 90}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "data"))
    dataset = datasets.load_from_disk(str(tmp_path / "data"))
    options = TextEncoding(max_length=32)
    encoded, report = encode_dataset(dataset, plain, options, fields=fields)
    expected, expected_report = encode_dataset(rows, plain, options, fields=fields)
    assert [dict(row) for row in encoded] == expected
    assert report == expected_report
    assert encoded.cache_files
    again, second_report = encode_dataset(dataset, plain, options, fields=fields)  # from the cache
    assert [dict(row) for row in again] == expected
    assert second_report == report
    other, _ = encode_dataset(dataset, plain, TextEncoding(max_length=16), fields=fields)
    assert max(len(row[f"{fields[0] if fields else ''}{'_' if fields else ''}input_ids"]) for row in other) <= 16


def test_messages_read_by_arrow_with_missing_keys(tmp_path):
    import datasets

    tokenizer = tokenizer_with(CHATML)
    file = tmp_path / "talk.jsonl"
    rows = [{"messages": [user("a"), assistant("b", train=False), user("c"), assistant("d")]},
            {"messages": [user("e"), assistant("f")]}]
    file.write_text("\n".join(map(json.dumps, rows)))
    dataset = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    encoded, _ = encode_dataset(dataset, tokenizer)
    assert [stretches(row["input_ids"], row["labels"], tokenizer) for row in encoded] == [["d<|im_end|>"], ["f<|im_end|>"]]


def test_nothing_left_shows_a_row_with_its_trained_part(plain):
    rows = [{"prompt": "1" * 40, "completion": " 2"}]
    with pytest.raises(DataError, match=r"none of the 1 rows .*the prompt alone reaches max_length") as caught:
        encode_dataset(rows, plain, TextEncoding(max_length=16))
    assert "1⟦ 2<|im_end|>⟧ (43 tokens, 3 to learn)" in str(caught.value)
    assert "max_length is 16" in str(caught.value)
    with pytest.raises(DataError, match=r"no token to train on"):
        encode_dataset([{"messages": [user("a")]}], tokenizer_with(CHATML))


def test_errors_name_the_row_and_the_column(plain):
    with pytest.raises(DataError, match=r"has no rows"):
        encode_dataset([], plain)
    with pytest.raises(DataError, match=r"row 1 .id 'y'.: column 'text' must be text, not int"):
        encode_dataset([{"id": "x", "text": "a b"}, {"id": "y", "text": 3}], plain)
    with pytest.raises(DataError, match=r"id 'x' occurs more than once"):
        encode_dataset([{"id": "x", "text": "ab"}, {"id": "x", "text": "cd"}], plain)
    with pytest.raises(DataError, match=r"needs a column 'chosen'.*prompt, choosen, rejected.*did you mean 'choosen'"):
        encode_dataset([{"prompt": "a", "choosen": "b", "rejected": "c"}], plain, fields=PAIR)
    with pytest.raises(DataError, match=r"answer: completion"):
        encode_dataset([{"prompt": "a", "answer": "b"}], plain)


@pytest.mark.peer
def test_marked_templates_agree_with_the_tokenizers_own_mask():
    tokenizer = tokenizer_with(CHATML_MARKED)
    talk = [user("What is 1 + 1?"), assistant("2"), user("Yes?"), assistant("Yes.")]
    theirs = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ours = encode_example({"messages": talk}, tokenizer)
    assert ours["input_ids"] == theirs["input_ids"]
    assert [int(label != -100) for label in ours["labels"]] == theirs["assistant_masks"]


@pytest.mark.peer
def test_ids_and_labels_are_those_of_trl(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from mmalign.data.tiny_llama import build_tiny_llama

    model = tmp_path / "model"
    model.mkdir()
    build_tiny_llama(model)
    settings = {"output_dir": str(tmp_path / "out"), "report_to": [], "use_cpu": True, "bf16": False, "max_length": 24}

    def theirs(rows, **options):
        config = trl.SFTConfig(**settings, **options)
        trainer = trl.SFTTrainer(model=str(model), args=config, train_dataset=Dataset.from_list(rows))
        return list(trainer.train_dataset), trainer.processing_class

    texts = [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "What is", "completion": " that" * 30}]
    talks = [{"messages": [user("2?"), assistant("4"), user("5"), assistant("6 7")]}]
    single = [{"prompt": [user("2?")], "completion": [assistant("4")]}]
    for rows, options, ours in ((texts, {}, {}), (talks, {"assistant_only_loss": True}, {}),
                                (single, {}, {"train_on_separator": True})):
        expected, tokenizer = theirs(rows, **options)
        for row, mine in zip(expected, rows, strict=True):
            result = encode_example(mine, tokenizer, TextEncoding(max_length=24, **ours))
            assert (result["input_ids"], result["labels"]) == (row["input_ids"], row["labels"])

    pair = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
    trainer = trl.DPOTrainer(model=str(model), args=trl.DPOConfig(**settings), train_dataset=Dataset.from_list([pair]))
    row = trainer.train_dataset[0]
    result = encode_example(pair, tokenizer, fields=PAIR)
    for name in PAIR:
        assert result[f"{name}_input_ids"] == row["prompt_ids"] + row[f"{name}_ids"]
        assert result[f"{name}_labels"] == [-100] * len(row["prompt_ids"]) + row[f"{name}_ids"]
