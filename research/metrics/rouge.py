"""ROUGE (Lin 2004) through Google's `rouge-score`, the implementation that papers report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from yunmin.errors import MissingExtraError

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge_scorer(*, stemmer: bool = False) -> Callable[[str, Sequence[str]], dict[str, float]]:
    """A function that scores a text against one or more references.

    It gives F1 of ROUGE-1, -2, -L and -Lsum, each the largest over the references. ROUGE-Lsum takes each line as one
    sentence; a text of one line has the ROUGE-L of that line.

    Args:
        stemmer: whether words are compared by their stems (Porter's, for English).

    Raises:
        MissingExtraError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError:
        raise MissingExtraError("rouge-score", "research", "ROUGE") from None
    scorer = RougeScorer(list(ROUGE), use_stemmer=stemmer)

    def score(text: str, references: Sequence[str]) -> dict[str, float]:
        found = scorer.score_multi(list(references), text)
        return {name: float(found[name].fmeasure) for name in ROUGE}

    return score
