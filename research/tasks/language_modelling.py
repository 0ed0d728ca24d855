"""Language modelling, measured by perplexity."""

from __future__ import annotations

import argparse
from typing import Any

from research.models.model import TextModel
from research.perplexity import evaluate_perplexity
from yunmin.corpus import read_documents, split_documents, texts_of


def run(model: TextModel, options: argparse.Namespace) -> dict[str, Any]:
    """Scores text; see `research.perplexity.evaluate_perplexity`.

    Raises:
        DataError: the text is missing, malformed or too short.
    """
    documents = read_documents(options.data)
    if options.held_out is not None:
        _, documents = split_documents(documents, options.held_out)
    return evaluate_perplexity(
        model,
        texts_of(documents),
        window=options.window,
        stride=options.stride or options.window,
        max_tokens=options.max_tokens,
    )
