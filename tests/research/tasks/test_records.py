"""Records of tasks, from files and datasets, and what is said of damaged ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import research.tasks.records
from research.tasks.question_answering import KIND as QUESTIONS
from research.tasks.records import Example, Kind, read_examples
from research.tasks.summarization import KIND as SUMMARIES
from yunmin.errors import DataError, RequestError

SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Cats",
            "paragraphs": [
                {
                    "context": "A cat sat.",
                    "qas": [
                        {"id": "1", "question": "Who?", "answers": [{"text": t, "answer_start": 0} for t in "aab"]},
                        {"id": "2", "question": "Why?", "answers": [], "is_impossible": True},
                        {
                            "id": "3",
                            "question": "When?",
                            "answers": [],
                            "plausible_answers": [{"text": "now", "answer_start": 0}],
                            "is_impossible": True,
                        },
                    ],
                }
            ],
        }
    ],
}


def read(kind: Kind, source: object, held_out: float | None = None, **columns: str) -> list[Example]:
    return read_examples(kind, str(source), held_out=held_out, columns=columns)


def test_lines_of_json_may_have_several_right_answers_other_names_and_more(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "t", "summary": "s", "more": 1}\n\n{"text": "u", "summary": ["v", "w", "v"], "id": 7}\n')
    assert read(SUMMARIES, path, document="text") == [
        Example("1", {"document": "t"}, ("s",)),
        Example("7", {"document": "u"}, ("v", "w")),
    ]


def test_squads_json_is_read_with_its_questions_without_answer(tmp_path: Path) -> None:
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(SQUAD))
    assert [(e.id, e.fields["question"], e.golds) for e in read(QUESTIONS, path)] == [
        ("1", "Who?", ("a", "b")),
        ("2", "Why?", ()),
        ("3", "When?", ()),
    ]


def test_a_blank_answer_is_none(tmp_path: Path) -> None:
    record = {"context": "c", "question": "q"}
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps(record | {"answers": a}) for a in ("", ["", " "], ["x", ""]))
    )
    assert [example.golds for example in read(QUESTIONS, tmp_path / "a.jsonl")] == [(), (), ("x",)]


def test_parts_of_the_library_are_sources_without_columns() -> None:
    assert len(read(SUMMARIES, "stdlib:code", held_out=0.01)) > 5
    with pytest.raises(RequestError, match="--fields: names columns of records, which stdlib:code has not"):
        read(SUMMARIES, "stdlib:code", document="x")


def test_a_dataset_is_read_like_a_file_and_never_its_training_split(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"context": "c", "question": "q", "answers": {"text": ["x", "x"], "answer_start": [0, 0]}, "id": "i"}]
    calls: list[Any] = []

    def load(name: str, config: str | None = None, split: str | None = None) -> Any:
        calls.append((name, config, split))
        return rows if split else {"train": [], "validation": rows}

    monkeypatch.setattr(research.tasks.records, "load_hub_dataset", load)
    for source in ("squad", "squad:plain_text", "squad:plain_text:test"):
        assert read(QUESTIONS, source) == [Example("i", {"context": "c", "question": "q"}, ("x",))]
    assert calls == [("squad", None, None), ("squad", "plain_text", None), ("squad", "plain_text", "test")]
    monkeypatch.setattr(research.tasks.records, "load_hub_dataset", lambda *_: {"train": rows})
    with pytest.raises(DataError, match="squad: expected a split test or validation, found train"):
        read(QUESTIONS, "squad")


def test_a_folder_of_sources_is_divided_as_training_divides_it(tmp_path: Path) -> None:
    for number in range(40):
        body = f'    """Adds the number {number} to it."""\n    return value + {number}\n'
        (tmp_path / f"{number:02}.py").write_text(f"def add(value, other={number}):\n{body}")
    assert len(read(SUMMARIES, tmp_path)) == 40
    assert [e.golds[0] for e in read(SUMMARIES, tmp_path, held_out=0.05)] == [
        "Adds the number 19 to it.",
        "Adds the number 39 to it.",
    ]
    assert len(read(QUESTIONS, tmp_path, held_out=0.05)) == 2


@pytest.mark.parametrize(
    ("kind", "name", "text", "message"),
    [
        (SUMMARIES, "a.jsonl", "{", r"a\.jsonl:1: expected a JSON object, "),
        (SUMMARIES, "a.jsonl", "[]", r"a\.jsonl:1: expected a JSON object, found list"),
        (SUMMARIES, "a.jsonl", "{}", r"1: expected 'document' to be a text, found the fields none"),
        (SUMMARIES, "a.jsonl", '{"document": 3}', r"expected 'document' to be a text, found 3"),
        (SUMMARIES, "a.jsonl", '{"document": "d"}', r"expected 'summary' to be a text or a list of texts, found the f"),
        (SUMMARIES, "a.jsonl", '{"document": "d", "summary": []}', r"expected 'summary' to be a text or a list"),
        (SUMMARIES, "a.jsonl", '{"document": "d", "summary": "\\ud800"}', r"1: expected Unicode text, surrogates"),
        (SUMMARIES, "a.jsonl", " \n", "nothing found to ask"),
        (SUMMARIES, "a.json", "{}", r"a \.json file is read as SQuAD"),
        (QUESTIONS, "a.json", "{}", r"a\.json: expected SQuAD's JSON"),
        (QUESTIONS, "a.json", "[", r"a\.json: expected SQuAD's JSON"),
        (QUESTIONS, "a.json", '{"data": [{"paragraphs": [{"context": 3, "qas": [{}]}]}]}', "paragraph 1: expected"),
        (QUESTIONS, "a.json", '{"data": []}', "nothing found to ask"),
        (QUESTIONS, "a.jsonl", '{"context": "c", "question": "q", "answers": [1]}', "expected 'answers' to be a text"),
    ],
)
def test_a_damaged_file_is_told_in_one_line(tmp_path: Path, kind: Kind, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read(kind, tmp_path / name)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_and_what_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no such path"):
        read(QUESTIONS, tmp_path / "none.jsonl")
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(DataError, match="--held-out: divides Python sources only"):
        read(QUESTIONS, tmp_path / "a.jsonl", held_out=0.1)
    (tmp_path / "b.jsonl").write_bytes(b"\xff")
    with pytest.raises(DataError, match="expected UTF-8 text, found byte 0xff"):
        read(QUESTIONS, tmp_path / "b.jsonl")
