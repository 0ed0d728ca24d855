"""Exact match and F1 are those of SQuAD's official script."""

from __future__ import annotations

import collections
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from research.metrics.squad import best_scores, exact_match, f1_score, normalize_answer

# words, articles and punctuation that meet often, in a few scripts
ANSWERS = st.text(alphabet="aAn theTHE.,'-’é東1", max_size=12) | st.lists(
    st.sampled_from("a an the The cat cats cat. dog 1,000 1000 the-cat Café".split())
).map(" ".join)


def official_tokens(text: str) -> list[str]:
    """The script's steps, one after the other (evaluate-v2.0.py: normalize_answer, get_tokens)."""
    text = text.lower()
    text = "".join(character for character in text if character not in set(string.punctuation))
    text = re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text)
    return " ".join(text.split()).split()


def official_f1(gold: str, prediction: str) -> float:
    """The script's compute_f1."""
    gold_toks, pred_toks = official_tokens(gold), official_tokens(prediction)
    num_same = sum((collections.Counter(gold_toks) & collections.Counter(pred_toks)).values())
    if len(gold_toks) == 0 or len(pred_toks) == 0:
        return int(gold_toks == pred_toks)
    if num_same == 0:
        return 0
    precision, recall = 1.0 * num_same / len(pred_toks), 1.0 * num_same / len(gold_toks)
    return (2 * precision * recall) / (precision + recall)


@given(ANSWERS, st.lists(ANSWERS, max_size=4))
def test_both_scores_equal_the_official_steps(prediction: str, golds: list[str]) -> None:
    counted = [gold for gold in golds if official_tokens(gold)] or [""]
    exact, f1 = best_scores(prediction, golds)
    assert exact == max(float(official_tokens(gold) == official_tokens(prediction)) for gold in counted)
    assert f1 == pytest.approx(max(official_f1(gold, prediction) for gold in counted), abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "gold", "exact", "f1"),
    [
        ("the Denver Broncos", "Denver Broncos", 1, 1),
        ("Denver Broncos!", "denver  broncos", 1, 1),
        ("Broncos", "Denver Broncos", 0, 2 / 3),
        ("cat cat", "cat", 0, 2 / 3),  # words count as often as they come
        ("cat dog", "dog cat", 0, 1),  # in any order
        ("10,000", "10000", 1, 1),
        ("state-of-the-art", "stateoftheart", 1, 1),  # punctuation goes before articles do
        ("a.m.", "am", 1, 1),
        ("the", "", 1, 1),  # an article is nothing
        ("...", "", 1, 1),  # nor is punctuation
        ("", "", 1, 1),
        ("", "cat", 0, 0),
        ("cat", "", 0, 0),
        ("them", "m", 0, 0),  # articles are whole words
        ("the\u00a0cat\n", "cat", 1, 1),  # every kind of blank
        ("l’eau", "leau", 0, 0),  # only ASCII punctuation goes
        ("Straße", "STRASSE", 0, 0),  # lower case, not folded
        ("É", "é", 1, 1),
        ("東京 the", "東京", 1, 1),
    ],
)
def test_edge_cases_by_hand(prediction: str, gold: str, exact: float, f1: float) -> None:
    assert exact_match(prediction, gold) == exact
    assert f1_score(prediction, gold) == pytest.approx(f1)


def test_the_best_gold_answer_counts_and_empty_ones_do_not() -> None:
    assert best_scores("cat", ["dog", "the cat", "cat food"]) == (1, 1)
    assert best_scores("", ["the", "cat"]) == (0, 0)  # "the" is no answer to give, and there is another
    assert best_scores("", ["the", "!"]) == (1, 1)
    assert best_scores("", []) == (1, 1)
    assert best_scores("cat", []) == (0, 0)


@given(ANSWERS)
def test_what_is_normalized_stays_as_it_is(text: str) -> None:
    once = normalize_answer(text)
    assert normalize_answer(once) == once
