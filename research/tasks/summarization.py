"""Summarization, measured by ROUGE."""

from __future__ import annotations

import argparse
from typing import Any

from research.metrics.rouge import rouge_scorer
from research.models.model import TextModel
from research.tasks.generation import GenerationTask, run_task
from research.tasks.records import Kind
from research.tasks.stdlib import docstring_examples

TEMPLATE = "{document}\n\nSummary:"
KIND = Kind(("document",), "summary", False, docstring_examples)


def run(model: TextModel, options: argparse.Namespace) -> dict[str, Any]:
    """Asks for summaries; see `research.tasks.generation.run_task`.

    Raises:
        MissingExtraError: rouge-score is not installed.
    """
    score = rouge_scorer(stemmer=options.stemmer)
    task = GenerationTask(KIND, TEMPLATE, ("\n\n",), 128, "", score)
    return run_task(task, model, options) | {"stemmer": options.stemmer}
