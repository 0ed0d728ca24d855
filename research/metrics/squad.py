"""Exact match and F1 of answers as SQuAD's official script for version 2.0 has them (Rajpurkar et al. 2016, 2018)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII's alone, as the script has it


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, without articles, with single blanks; in this order."""
    without_punctuation = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", without_punctuation).split())


def exact_match(prediction: str, gold: str) -> float:
    """1 where both are the same once normalized, else 0."""
    return float(normalize_answer(prediction) == normalize_answer(gold))


def f1_score(prediction: str, gold: str) -> float:
    """Harmonic mean of precision and recall of words; where one has none, 1 if neither has."""
    found, wanted = normalize_answer(prediction).split(), normalize_answer(gold).split()
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def best_scores(prediction: str, golds: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1, each the largest over the gold answers.

    Gold answers that are empty once normalized do not count; where none is left, the right answer is none at all, the
    empty text.
    """
    wanted = [gold for gold in golds if normalize_answer(gold)] or [""]
    return max(exact_match(prediction, gold) for gold in wanted), max(f1_score(prediction, gold) for gold in wanted)
