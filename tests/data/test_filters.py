"""Document filters and duplicates, against brute force where there is one."""

from __future__ import annotations

import itertools
import random

import pytest

from mmalign.data.deduplication import NearDuplicateOptions, exact_duplicates, jaccard, near_duplicates, shingles
from mmalign.data.filters import HeuristicOptions, Heuristics, repeated_share, row_text
from mmalign.errors import DataError

pytest.importorskip("datasketch")


@pytest.mark.parametrize(("options", "text", "reason"), [
    ({}, "a text", None), ({}, "   ", "empty"),
    ({"min_characters": 7}, "a text", "characters"), ({"max_characters": 5}, "a text", "characters"),
    ({"min_words": 3}, "a text", "words"), ({"max_words": 2}, "one, two; three", "words"),
    ({"repetition": {"n": 2, "max_share": 0.3}}, "a b a b a b a b", "repetition"),
    ({"repetition": {"n": 2, "max_share": 0.3}}, "a b c d e f", None),
    ({"repetition": {"n": 3, "max_share": 0.5, "unit": "characters"}}, "啊啊啊啊啊啊啊啊", "repetition"),
    ({"banned_words": ["Casino"]}, "the CASINO is open", "banned words"),
    ({"banned_words": ["casino"]}, "casinos are open", None),
    ({"banned_words": ["casino"], "max_banned_words": 1}, "a casino", None),
    ({"banned_urls": ["spam.com"]}, "see https://www.spam.com/x now", "banned urls"),
    ({"banned_urls": ["spam.com"]}, "see http://ads.spam.com:8080", "banned urls"),
    ({"banned_urls": ["spam.com"]}, "see https://notspam.com/", None),
    ({"banned_urls": ["good.org/ads"]}, "https://good.org/adserver", None),
    ({"banned_urls": ["good.org/ads"]}, "https://good.org/ads/1", "banned urls"),
])
def test_heuristics(options, text, reason):
    assert Heuristics(HeuristicOptions(**options)).reason(text, {}) == reason


def test_lists_from_files_the_url_column_and_groups(tmp_path):
    (tmp_path / "words.txt").write_text("Casino\n\n")
    filters = Heuristics(HeuristicOptions(banned_words="words.txt", banned_urls=["spam.com"], groups=["de"]), folder=tmp_path)
    assert filters.reason("casino", {}, group="de") == "banned words"
    assert filters.reason("x", {"url": "http://spam.com/1"}, group="de") == "banned urls"
    assert filters.reason("x", {}, group="fr") == "other group"
    with pytest.raises(DataError, match=r"heuristics\.banned_words: the file none\.txt does not exist"):
        Heuristics(HeuristicOptions(banned_words="none.txt"))
    with pytest.raises(ValueError, match="no text can be both"):
        HeuristicOptions(min_words=3, max_words=2)


def test_repeated_share_counts_what_occurred_before():
    assert repeated_share(["a", "b", "c"], 1) == 0
    assert repeated_share(["a", "b", "a", "b"], 2) == pytest.approx(1 / 3)
    assert repeated_share([], 3) == repeated_share(["a"], 3) == 0


def test_text_of_a_row():
    assert row_text({"text": "t", "other": "o"}) == "t"
    assert row_text({"other": "o"}, "other") == "o"
    assert row_text({"prompt": [{"role": "user", "content": "q"}], "completion": "a"}) == "q\na"
    with pytest.raises(DataError, match="no column 'body'"):
        row_text({"text": "t"}, "body")
    with pytest.raises(DataError, match="name the column"):
        row_text({"id": "0"})


def test_exact_duplicates_ignore_case_and_space():
    assert exact_duplicates(["A b", "c", "a  B\n", "ab"]) == {2}


def corpus(seed=0, families=30, copies=3, words=60):
    random_ = random.Random(seed)
    texts = []
    for _ in range(families):
        base = [f"w{random_.randrange(2000)}" for _ in range(words)]
        for copy in range(copies):
            text = list(base)
            for _swap in range(copy):  # the more copies, the farther
                text[random_.randrange(words)] = f"x{random_.randrange(10**6)}"
            texts.append(" ".join(text))
    random_.shuffle(texts)
    return texts


def pairs_left(texts, dropped, options):
    kept = [i for i in range(len(texts)) if i not in dropped]
    sets = {i: shingles(texts[i], options.shingle, options.unit) for i in kept}
    return [(i, j) for i, j in itertools.combinations(kept, 2) if jaccard(sets[i], sets[j]) >= options.threshold]


def test_near_duplicates_are_found_and_nothing_else_is_dropped():
    texts = corpus()
    options = NearDuplicateOptions(threshold=0.6, shingle=2, unit="words", permutations=256)
    found = near_duplicates(texts.__getitem__, len(texts), options, seed=0)
    sets = [shingles(text, 2, "words") for text in texts]
    for number in found.dropped:  # every one has an earlier text that was kept and is near enough, exactly
        assert any(jaccard(sets[number], sets[other]) >= 0.6 for other in range(number) if other not in found.dropped)
    before, after = len(pairs_left(texts, set(), options)), len(pairs_left(texts, found.dropped, options))
    assert before >= 60
    assert after <= 0.03 * before  # the index misses a few near the threshold
    assert found == near_duplicates(texts.__getitem__, len(texts), options, seed=0)


def test_chunked_turns_end_when_a_turn_removes_little():
    texts = corpus(1) * 2
    options = NearDuplicateOptions(threshold=0.8, shingle=2, unit="words", chunks=4, chunks_per_turn=2)
    turns = []
    found = near_duplicates(texts.__getitem__, len(texts), options, seed=0, report=lambda turn, gone: turns.append(gone))
    assert found.turns == len(turns) > 2
    assert sum(turns) == len(found.dropped)
    assert turns[-1] < 0.01 * len(texts)
    assert len(pairs_left(texts, found.dropped, options)) < 0.5 * len(pairs_left(texts, set(), options))
    assert near_duplicates(texts.__getitem__, len(texts), options.model_copy(update={"max_turns": 1}), seed=0).turns == 1


def test_shingles_of_short_texts():
    assert shingles("ab", 5, "characters") == {"ab"}
    assert shingles("A  b", 2, "words") == {"a b"}
    assert jaccard(frozenset("ab"), frozenset("bc")) == pytest.approx(1 / 3)
