"""Text and maths rewards: closed forms, and exactness of the number parser."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.errors import RewardError
from mmalign.rewards.maths import Number, answer_match, extract_answer, last_boxed, last_number, parse_number
from mmalign.rewards.text import completion_text, exact_match, format_tags, length_penalty, overlong, regex_match, within_length


def test_completion_text_reads_every_form():
    assert completion_text("a") == "a"
    assert completion_text([{"role": "assistant", "content": "a"}, {"role": "tool", "content": "x"},
                            {"role": "assistant", "content": [{"type": "text", "text": "b"}, {"type": "image"}]}]) == "a\nb"
    assert completion_text([{"role": "assistant", "content": None, "tool_calls": []}]) == ""
    with pytest.raises(RewardError, match="neither text nor messages"):
        completion_text(3)


def test_regex_match_modes():
    def values(**options):
        return regex_match(None, ["xx 12", "12", "1\n2"], **options)

    assert values(pattern=r"\d\d") == [1, 1, 0]
    assert values(pattern=r"\d.*\d", method="fullmatch") == [0, 1, 1]
    assert values(pattern=r"\d.*\d", method="fullmatch", dotall=False) == [0, 1, 0]
    assert values(pattern="XX", method="match", ignore_case=True) == [1, 0, 0]
    with pytest.raises(RewardError, match="not a regular expression"):
        values(pattern="(")
    with pytest.raises(RewardError, match="allowed: search, match, fullmatch"):
        values(pattern="a", method="find")


def test_format_tags():
    completions = [
        "<think>a</think><answer>b</answer>", "<think>a\nb</think>\n <answer>c\nd</answer>",
        "so <think>a</think><answer>b</answer>", "<think>a</think><answer>b</answer>.", "<answer>b</answer>", "",
    ]
    assert format_tags(None, completions) == [1, 1, 0, 0, 0, 0]
    assert format_tags(None, completions, dotall=False) == [1, 0, 0, 0, 0, 0]
    assert format_tags(None, completions, tags=["answer"]) == [0, 0, 0, 0, 1, 0]
    with pytest.raises(RewardError, match="plain names"):
        format_tags(None, completions, tags=["<answer>"])


CLASS_NAME_COMPLETIONS = [
    "Pink Primrose", "pink primrose", "Pink Primrose.", " Pink Primrose", "<answer>Pink Primrose</answer>",
    "<think>x</think><answer>Pink\nPrimrose</answer>",
]


def test_exact_match_is_strict_and_answer_match_is_not():
    solution = ["Pink Primrose"] * 6
    assert exact_match(None, CLASS_NAME_COMPLETIONS, solution) == [1, 0, 0, 0, 0, 0]
    assert exact_match(None, CLASS_NAME_COMPLETIONS, solution, normalize="strip") == [1, 0, 0, 1, 0, 0]
    assert exact_match(None, CLASS_NAME_COMPLETIONS, solution, normalize="casefold") == [1, 1, 0, 1, 0, 0]
    tagged = [f"<answer>{s}</answer>" for s in solution]
    options = {"extract": "tag", "compare": "text", "dotall": False}
    assert answer_match(None, CLASS_NAME_COMPLETIONS, tagged, **options) == [1, 1, 0, 1, 1, 0]
    assert answer_match(None, ["737-200"], ["737-300"], compare="text") == [0]


def test_missing_truth_is_not_applicable_and_empty_truth_is_refused():
    assert exact_match(None, ["a"], [None]) == [None] == answer_match(None, ["a"], [None])
    for function in (exact_match, answer_match):
        with pytest.raises(RewardError, match="answer is empty"):
            function(None, [""], [" "])


def test_lengths():
    ids = [[1] * 3, [1] * 8]
    texts = ["one two", "three"]
    assert within_length(None, texts, ids, max_length=5) == [1, 0]
    assert within_length(None, texts, max_length=6, unit="characters") == [0, 1]
    assert within_length(None, texts, max_length=9, min_length=2, unit="words") == [1, 0]
    assert length_penalty(None, texts, ids, max_length=6) == [-0.5, -1]
    assert overlong(None, ["x"] * 4, [[0] * n for n in (4096, 6144, 8192, 9000)], max_length=8192, cache_length=4096) == [
        0, -0.5, -1, -1,
    ]
    with pytest.raises(RewardError, match="needs completion_ids"):
        within_length(None, texts, max_length=5)
    with pytest.raises(RewardError, match="0 <= min <= max"):
        within_length(None, texts, ids, max_length=2, min_length=3)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42), ("-7", -7), ("+3", 3), ("007", 7), ("1,234,567", 1234567), ("0.05", Fraction(1, 20)), (".5", Fraction(1, 2)),
        ("3.", 3), ("1e3", 1000), ("2.5E-2", Fraction(1, 40)), ("50%", Fraction(1, 2)), (r"50\%", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)), ("-3 / 4", Fraction(-3, 4)), ("1 1/2", Fraction(3, 2)), ("-1 1/2", Fraction(-3, 2)),
        (r"\frac{3}{4}", Fraction(3, 4)), (r"\dfrac34", Fraction(3, 4)), (r"1\frac{1}{2}", Fraction(3, 2)),
        (r"\frac{\frac12}{3}", Fraction(1, 6)), (r"\boxed{\frac{1}{2}}", Fraction(1, 2)), ("$1{,}000$", 1000),
        (r"1.5 \times 10^{3}", 1500), ("10^{-2}", Fraction(1, 100)), ("2**10", 1024), ("x = 5", 5), ("−3", -3),
        ("½", Fraction(1, 2)),
        ("1½", Fraction(3, 2)), ("$12.50", Fraction(25, 2)), (r"\text{}7", 7), ("(1+2)*3", 9), ("12 apples", None), ("", None),
        ("abc", None), ("1/0", None), ("9**9**9", None), ("1e99999", None), ("1,23", None), ("__import__('os')", None),
        ("(" * 150 + "1" + ")" * 150, None), ("True", None), ("1" * 300, None), ("5!", None), ("2 and 3", None),
    ],
)
def test_parse_number(text, value):
    number = parse_number(text)
    assert (None if number is None else number.value) == value


@given(st.fractions(max_denominator=10**6), st.sampled_from(["{n}/{d}", r"\frac{{{n}}}{{{d}}}", "({n})/({d})"]))
def test_written_fractions_are_read_exactly(value, form):
    assert parse_number(form.format(n=value.numerator, d=value.denominator)).value == value


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4, min_value=-10**9, max_value=10**9))
def test_written_decimals_are_read_exactly(value):
    assert parse_number(f"{value:,}").value == parse_number(str(value)).value == Fraction(value)
    assert last_number(f"so we get {value:,} in total").value == Fraction(value)


@given(st.text(max_size=60))
def test_no_text_breaks_the_parser(text):
    for found in (parse_number(text), last_number(text)):
        assert found is None or isinstance(found, Number)
    assert isinstance(extract_answer(text), str)


def test_percent_and_tolerance():
    half, fifty = parse_number("50%"), Number(Fraction(50))
    assert half.equals(Number(Fraction(1, 2)))
    assert half.equals(fifty)
    assert fifty.equals(half)
    assert not half.equals(Number(Fraction(5, 1000)))
    assert not Number(Fraction(1, 2)).equals(fifty)
    assert Number(Fraction(100)).equals(Number(Fraction(101)), tolerance=0.01)
    assert not Number(Fraction(100)).equals(Number(Fraction(102)), tolerance=0.01)


def test_finding_the_answer():
    assert last_boxed(r"\boxed{1} then \boxed{\frac{a}{b}} \boxed{open") == r"\frac{a}{b}"
    assert extract_answer(r"<answer>1</answer> \boxed{2}") == "2"
    assert extract_answer("<answer> 1 </answer> or <answer>2</answer>") == "1"
    assert extract_answer("work\n#### 12") == "12"
    assert extract_answer("no box", "boxed") == ""
    with pytest.raises(RewardError, match="extract='box'"):
        extract_answer("x", "box")
    for text, value in {"The answer is 42.": 42, "5-3": 3, "x = -7": -7, "3/4 of it": Fraction(3, 4), "1. 2.": 2}.items():
        assert last_number(text).value == value
    assert last_number("none") is None


def test_answer_match_on_numbers():
    truth = ["1/2"] * 6
    completions = ["It is 0.5.", "<answer>0.50 metres</answer>", r"\boxed{\frac{2}{4}}", "0.51", "", "#### 50%"]
    assert answer_match(None, completions, truth) == [1, 1, 1, 0, 0, 1]
    assert answer_match(None, ["x"], ["not a number"], compare="number") == [None]
    assert answer_match(None, ["0.51"], ["0.5"], tolerance=0.02) == [1]
    assert answer_match(None, ["So #### 18"], ["Janet sells 16 - 3.\n#### 18"]) == [1]
    assert answer_match(None, ["3 is first, 4 last"], [4], extract="last_number") == [1]
    with pytest.raises(RewardError, match="compare='fuzzy'"):
        answer_match(None, ["1"], ["1"], compare="fuzzy")


def test_math_verify_is_an_extra():
    try:
        import math_verify  # noqa: F401
    except ImportError:
        with pytest.raises(RewardError, match=r"pip install mmalign\[maths\]"):
            answer_match(None, ["1"], ["1"], compare="math_verify")
    else:
        assert answer_match(None, [r"\boxed{\sqrt{8}}", r"\boxed{3}"], [r"2\sqrt{2}"] * 2, compare="math_verify") == [1, 0]
