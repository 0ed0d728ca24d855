"""What a model is asked, and what becomes of its answers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from research.models.model import Scored, TokenIds
from research.tasks import question_answering, summarization
from tests.models import trained_tokenizer
from yunmin.errors import DataError, RequestError

DEFAULTS = {
    "held_out": None,
    "fields": None,
    "limit": None,
    "seed": 0,
    "few_shot": None,
    "template": None,
    "stop": None,
    "max_new_tokens": None,
    "samples": None,
    "stemmer": False,
    "no_answer": "unanswerable",
}
RECORDS = [
    {"context": f"In {year} it was {word}.", "question": f"What was it in {year}?", "answers": answers}
    for year, word, answers in [(1901, "red", ["red"]), (1902, "blue", ["the blue", "dark blue"]), (1903, "gone", [])]
]


class Scripted:
    """A model that answers what it is told to, and remembers what it was asked."""

    name = "scripted"
    tokenizer = trained_tokenizer()

    def __init__(self, *answers: str) -> None:
        self.answers = answers
        self.prompts: list[str] = []
        self.asked: dict[str, Any] = {}

    def complete(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
        n: int = 1,
    ) -> list[list[str]]:
        self.prompts = list(prompts)
        self.asked = {"max_tokens": max_tokens, "temperature": temperature, "stop": tuple(stop), "n": n}
        return [[self.answers[i % len(self.answers)]] for i in range(len(prompts))]

    def score(self, sequences: Sequence[TokenIds], first: Sequence[int] | None = None) -> list[Scored]:
        raise NotImplementedError


def options(data: Path, **given: Any) -> argparse.Namespace:
    return argparse.Namespace(**DEFAULTS | given, data=str(data))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def test_answers_are_scored_against_the_best_gold_and_by_whether_there_is_one(questions: Path, tmp_path: Path) -> None:
    model = Scripted(" The Red\n", " blue sky", "Unanswerable.")
    result = question_answering.run(model, options(questions, samples=str(tmp_path / "out.jsonl")))
    assert result["exact_match"] == pytest.approx(2 / 3)
    assert result["f1"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert (result["answerable_exact_match"], result["unanswerable_exact_match"]) == (0.5, 1.0)
    assert (result["examples"], result["few_shot"], result["intervals"]["units"]) == (3, 0, 3)
    low, high = result["intervals"]["f1"]
    assert 0.66 < low < result["f1"] < high == 1.0
    assert result["intervals"]["unanswerable_f1"] is None  # of one example
    assert model.prompts[0] == "In 1901 it was red.\n\nQuestion: What was it in 1901?\nAnswer:"
    assert model.asked == {"max_tokens": 32, "temperature": 0.0, "stop": ("\n",), "n": 1}
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == ["The Red", "blue sky", "Unanswerable."]
    assert lines[1]["golds"] == ["the blue", "dark blue"]
    assert lines[1]["prompt"] == model.prompts[1]
    assert lines[1]["f1"] == pytest.approx(2 / 3)


def test_saying_nothing_is_right_only_where_there_is_no_answer(questions: Path) -> None:
    for answer in ("", " unanswerable", "the unanswerable."):
        result = question_answering.run(Scripted(answer), options(questions))
        assert (result["answerable_f1"], result["unanswerable_f1"]) == (0.0, 1.0)
    result = question_answering.run(Scripted("none"), options(questions, no_answer="None"))
    assert result["unanswerable_f1"] == 1.0


def test_where_every_question_has_an_answer_there_is_one_kind_of_figures(questions: Path) -> None:
    questions.write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:2]))
    result = question_answering.run(Scripted("red"), options(questions))
    assert (result["exact_match"], "answerable_f1" in result, "answerable_f1" in result["intervals"]) == (
        0.5,
        False,
        False,
    )


def test_examples_that_are_shown_are_not_asked(questions: Path) -> None:
    for seed in range(4):
        model = Scripted("x")
        result = question_answering.run(model, options(questions, few_shot=2, seed=seed))
        assert (result["examples"], result["few_shot"]) == (1, 2)
        *shown, asked = model.prompts[0].split("\n\nIn ")
        assert asked.endswith("\nAnswer:")
        assert len(shown) == 2
        for text in shown:
            assert text.rpartition("Answer: ")[2] in ("red", "the blue", "unanswerable")
    with pytest.raises(DataError, match="--few-shot: 3 of 3 examples leave none to ask"):
        question_answering.run(Scripted("x"), options(questions, few_shot=3))


def test_a_limit_takes_examples_by_the_seed_alone(questions: Path) -> None:
    taken = []
    for seed in (0, 0, 1, 2, 3):
        model = Scripted("x")
        assert question_answering.run(model, options(questions, limit=1, seed=seed))["examples"] == 1
        taken += model.prompts
    assert taken[0] == taken[1]
    assert len(set(taken)) > 1


def test_a_template_a_stop_and_names_of_columns_can_be_given(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"article": "A {very} long\\\\n story.", "highlights": "A story.\\nIt is long."}\n')
    model = Scripted("A story.\nIt was long.")
    given = {"fields": "document=article,summary=highlights", "template": r"Read:\n{document}\nIn short:"}
    result = summarization.run(model, options(path, stop=[r"\n\n", "END"], max_new_tokens=7, **given))
    assert model.prompts == ["Read:\nA {very} long\\n story.\nIn short:"]
    assert model.asked["stop"] == ("\n\n", "END")
    assert model.asked["max_tokens"] == 7
    said = {name: result[name] for name in ("template", "stop", "max_new_tokens")}
    assert said == {"template": "Read:\n{document}\nIn short:", "stop": ["\n\n", "END"], "max_new_tokens": 7}
    assert result["rouge1"] == pytest.approx(0.8)
    assert result["rougeLsum"] == pytest.approx(0.8)
    assert result["intervals"]["rouge1"] is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"template": "no field"}, "--template: expected fields out of {context}, {question}, found 'no field'"),
        ({"template": "{context} {answer}"}, "--template: expected fields out of"),
        ({"fields": "document=x"}, "--fields: expected NAME=COLUMN with names out of context, question, answers"),
        ({"fields": "context"}, "--fields: expected NAME=COLUMN"),
    ],
)
def test_impossible_options_are_named(questions: Path, given: dict[str, str], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        question_answering.run(Scripted("x"), options(questions, **given))
    assert str(caught.value).startswith(message)
