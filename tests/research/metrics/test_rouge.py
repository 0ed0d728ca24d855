"""ROUGE is what `rouge-score` gives, over the best reference."""

from __future__ import annotations

import pytest

from research.metrics.rouge import ROUGE, rouge_scorer

TEXTS = ["The quick brown fox jumps over dogs.", "quick foxes jumped\nover the lazy dog", "Grüße", "", "a b c\nd e f"]


@pytest.mark.parametrize("stemmer", [False, True])
def test_scores_equal_the_package_for_every_pair(stemmer: bool) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    score = rouge_scorer(stemmer=stemmer)
    package = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=stemmer)
    for text in TEXTS:
        for reference in TEXTS:
            expected = package.score(reference, text)
            assert score(text, [reference]) == {name: expected[name].fmeasure for name in ROUGE}


def test_f1_by_hand_and_the_best_of_several_references() -> None:
    score = rouge_scorer()
    found = score("the cat sat", ["a dog ran off", "the cat sat down today"])
    assert found["rouge1"] == pytest.approx(2 * 1 * (3 / 5) / (1 + 3 / 5))
    assert found["rouge2"] == pytest.approx(2 * 1 * (2 / 4) / (1 + 2 / 4))
    assert found["rougeL"] == found["rougeLsum"] == pytest.approx(0.75)
    assert score("c d\na b", ["a b\nc d"])["rougeLsum"] == 1
    assert score("c d\na b", ["a b\nc d"])["rougeL"] == pytest.approx(0.5)


def test_a_stemmer_takes_forms_of_a_word_as_one() -> None:
    assert rouge_scorer()("jumping foxes", ["jump fox"])["rouge1"] == 0
    assert rouge_scorer(stemmer=True)("jumping foxes", ["jump fox"])["rouge1"] == 1
