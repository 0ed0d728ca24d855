"""Question answering, measured as SQuAD is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from research.metrics.squad import best_scores, normalize_answer
from research.models.model import TextModel
from research.tasks.generation import GenerationTask, Scores, run_task
from research.tasks.records import Kind
from research.tasks.stdlib import signature_examples

TEMPLATE = "{context}\n\nQuestion: {question}\nAnswer:"
KIND = Kind(("context", "question"), "answers", True, signature_examples)


def run(model: TextModel, options: argparse.Namespace) -> dict[str, Any]:
    """Asks questions; see `research.tasks.generation.run_task`.

    An answer that is the text of `--no-answer` says that there is none. Where some questions have no answer, the
    figures are given for either kind alone, too.
    """

    def score(text: str, golds: Sequence[str]) -> Scores:
        says_none = normalize_answer(text) == normalize_answer(options.no_answer)
        exact, f1 = best_scores("" if says_none else text, golds)
        found = {"exact_match": exact, "f1": f1}
        kind = "answerable" if golds else "unanswerable"
        return found | {f"{kind}_{name}": value for name, value in found.items()}

    task = GenerationTask(KIND, TEMPLATE, ("\n",), 32, options.no_answer, score)
    result = run_task(task, model, options) | {"no_answer": options.no_answer}
    if "unanswerable_f1" not in result:  # the figures of the others are those of all
        for found in (result, result["intervals"]):
            for name in ("answerable_exact_match", "answerable_f1"):
                del found[name]
    return result
