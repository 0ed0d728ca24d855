"""Tasks in which a model writes an answer: which examples, which prompts, and how sure the means of scores are."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from research.metrics.bootstrap import CONFIDENCE, bootstrap_interval
from research.models.model import TextModel
from research.tasks.records import Example, Kind, read_examples
from yunmin.errors import DataError, RequestError
from yunmin.files import atomic_file

Scores = dict[str, float]
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        example: that was asked.
        prompt: that the model read.
        text: that followed, without blanks around it.
    """

    example: Example
    prompt: str
    text: str


@dataclass(frozen=True)
class GenerationTask:
    """A task with one answer per example.

    Attributes:
        kind: of its records.
        template: of prompts, with fields in braces.
        stop: strings that end an answer.
        max_new_tokens: of an answer.
        no_answer: what stands for an answer where there is none.
        score: figures of an answer.
    """

    kind: Kind
    template: str
    stop: tuple[str, ...]
    max_new_tokens: int
    no_answer: str
    score: Callable[[str, Sequence[str]], Scores]


def run_task(task: GenerationTask, model: TextModel, options: argparse.Namespace) -> dict[str, Any]:
    """Asks a model, greedily, and scores its answers.

    Args:
        task: what is asked; the options `template`, `stop` and `max_new_tokens` take the place of its own.
        model: that answers.
        options: of the command line: `data`, `held_out`, `fields`, `limit`, `seed`, `few_shot`, `samples`.

    Returns:
        The mean of each figure, counts, their intervals over the examples, and what they rest on.

    Raises:
        DataError: the data is missing or malformed, or has too few examples.
        RequestError: the template names no such field.
    """
    columns = parse_columns(options.fields, (*task.kind.inputs, task.kind.gold))
    examples = read_examples(task.kind, options.data, held_out=options.held_out, columns=columns)
    shown, asked = choose(examples, limit=options.limit, few_shot=options.few_shot or 0, seed=options.seed)
    template = task.template if options.template is None else unescape(options.template)
    require_fields(template, task.kind.inputs)
    shots = "".join(
        f"{fill(template, shot.fields)} {shot.golds[0] if shot.golds else task.no_answer}\n\n" for shot in shown
    )
    prompts = [shots + fill(template, example.fields) for example in asked]
    stop = task.stop if options.stop is None else tuple(map(unescape, options.stop))
    max_new_tokens = options.max_new_tokens or task.max_new_tokens
    texts = model.complete(prompts, max_tokens=max_new_tokens, stop=stop)
    answers = [Answer(e, prompt, found.strip()) for e, prompt, (found,) in zip(asked, prompts, texts, strict=True)]
    scores = [task.score(answer.text, answer.example.golds) for answer in answers]
    if options.samples is not None:
        write_samples(Path(options.samples), answers, scores)
    asked_with = {"template": template, "stop": list(stop), "max_new_tokens": max_new_tokens, "limit": options.limit}
    return {**means(scores), "few_shot": len(shown), "seed": options.seed, **asked_with}


def choose(
    examples: Sequence[_Item], *, limit: int | None, few_shot: int = 0, seed: int
) -> tuple[list[_Item], list[_Item]]:
    """Examples to show before each question, and others to ask, in their order; the seed alone says which.

    Raises:
        DataError: there are too few.
    """
    if len(examples) <= few_shot:
        raise DataError(f"--few-shot: {few_shot} of {len(examples)} examples leave none to ask")
    order = np.random.default_rng(seed).permutation(len(examples))
    asked = order[few_shot:] if limit is None else order[few_shot : few_shot + limit]
    return [examples[i] for i in order[:few_shot]], [examples[i] for i in sorted(asked)]


def means(scores: Sequence[Scores]) -> dict[str, Any]:
    """The mean of each figure over the examples that have it, with intervals."""
    found: dict[str, Any] = {}
    intervals: dict[str, Any] = {"confidence": CONFIDENCE, "resampled": "examples", "units": len(scores)}
    for name in dict.fromkeys(name for score in scores for name in score):
        values = [score[name] for score in scores if name in score]
        found[name] = float(np.mean(values))
        intervals[name] = list(bootstrap_interval(values)) if len(values) > 1 else None
    return {**found, "examples": len(scores), "intervals": intervals}


def write_samples(path: Path, answers: Sequence[Answer], scores: Sequence[Scores]) -> None:
    """Writes every prompt, answer, right answer and score as a line of JSON, the file whole or not at all."""
    with atomic_file(path) as aside, aside.open("w", encoding="utf-8") as file:
        for answer, score in zip(answers, scores, strict=True):
            record = {"id": answer.example.id, "prompt": answer.prompt, "answer": answer.text}
            file.write(json.dumps(record | {"golds": answer.example.golds, **score}, ensure_ascii=False) + "\n")


def fill(template: str, fields: Mapping[str, str]) -> str:
    """A template with its fields; other braces stay."""
    return re.sub(r"\{(\w+)\}", lambda found: fields.get(found[1], found[0]), template)


def require_fields(template: str, names: Sequence[str]) -> None:
    """Refuses a template that names no field, or an unknown one.

    Raises:
        RequestError: it does.
    """
    found = re.findall(r"\{(\w+)\}", template)
    if not found or set(found) - set(names):
        expected = ", ".join(f"{{{name}}}" for name in names)
        raise RequestError("--template", f"expected fields out of {expected}, found {template!r:.80}")


def unescape(text: str) -> str:
    r"""Text of the command line, where `\n` and `\t` are written as two characters."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def parse_columns(text: str | None, names: Sequence[str]) -> dict[str, str]:
    """`field=column,field=column` as a mapping.

    Raises:
        RequestError: it is none, or names an unknown field.
    """
    pairs = [pair.partition("=") for pair in text.split(",")] if text else []
    for name, _, column in pairs:
        if name not in names or not column:
            raise RequestError("--fields", f"expected NAME=COLUMN with names out of {', '.join(names)}, found {text!r}")
    return {name: column for name, _, column in pairs}
