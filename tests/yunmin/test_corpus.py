"""Text sources: read whole, in a fixed order, split without overlap, refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from yunmin.corpus import Document, read_documents, split_documents, texts_of
from yunmin.errors import DataError


def test_the_standard_library_is_real_text_in_a_fixed_order() -> None:
    documents = read_documents("stdlib")
    assert documents == read_documents("stdlib")
    assert len(documents) > 300
    assert len(set(documents)) == len(documents)
    texts = texts_of(documents)
    assert any("def dumps(" in t for t in texts)  # json
    assert any("lambda" in t and "def " not in t for t in texts)  # the language reference
    assert sum(map(len, texts)) > 4_000_000


def test_files_folders_and_jsonl_are_read_in_order_without_doubles(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("B\r\n", encoding="utf-8", newline="")
    (tmp_path / "sub" / "a.md").write_text("Ä", encoding="utf-8")
    (tmp_path / "again.txt").write_text("Ä", encoding="utf-8")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    lines = [json.dumps({"text": "T\u2028x", "id": 3}), "", json.dumps({"prompt": "Q", "completion": "A"})]
    (tmp_path / "z.jsonl").write_text("\n".join(lines), encoding="utf-8")
    documents = read_documents(str(tmp_path))
    assert documents == [Document("Ä"), Document("B\n"), Document("T\u2028x"), Document("A", "Q")]
    assert read_documents(str(tmp_path / "b.txt")) == [Document("B\n")]
    assert texts_of(documents)[-1] == "QA"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "expected a JSON object"),
        ("[1]", "expected the string 'text'"),
        ('{"text": 5}', "expected the string 'text'"),
        ('{"prompt": "a"}', "expected the string 'text', or 'prompt' and 'completion'"),
        ('{"text": "\\ud800"}', "expected Unicode text"),
    ],
)
def test_a_malformed_record_is_refused_with_file_and_line(tmp_path: Path, line: str, named: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=named) as caught:
        read_documents(str(path))
    assert f"{path}:3: " in str(caught.value)


def test_bytes_that_are_no_utf8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_bytes(b"abc\xe9def")
    with pytest.raises(DataError, match=r"d\.txt: expected UTF-8 text, found byte 0xe9"):
        read_documents(str(tmp_path / "d.txt"))


@pytest.mark.parametrize("name", ["nowhere.txt", "./nowhere", "/no/such/folder"])
def test_a_path_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="found no such path"):
        read_documents(name)


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("\n\n")
    for source in (tmp_path, tmp_path / "d.txt"):
        with pytest.raises(DataError, match="no text found"):
            read_documents(str(source))


@pytest.mark.slow
def test_an_unknown_dataset_gives_one_clear_line() -> None:
    with pytest.raises(DataError, match="no dataset that the Hub gives") as caught:
        read_documents("no-such-dataset-anywhere")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("held_out", [0.05, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("n", [1, 3, 19, 20, 200, 1001])
def test_a_split_never_overlaps_and_loses_nothing(n: int, held_out: float) -> None:
    documents = [Document("".join(f"{i} {k}\n" for k in range(40)), prompt="p" if i % 3 else "") for i in range(n)]
    training, validation = split_documents(documents, held_out)
    assert training
    assert validation
    assert not set(training) & set(validation)
    if n >= 20:
        assert sorted(training + validation, key=documents.index) == documents
        assert abs(len(validation) - held_out * n) <= 1
    else:
        assert [a.text + b.text for a, b in zip(training, validation, strict=True)] == [d.text for d in documents]
        share = sum(len(d.text) for d in validation) / sum(len(d.text) for d in documents)
        assert abs(share - held_out) < 0.1


def test_few_documents_are_split_even_when_a_share_is_less_than_one() -> None:
    documents = [Document(f"{i}\n" * 1000) for i in range(30)]
    _, validation = split_documents(documents, 0.01)
    assert validation


@pytest.mark.parametrize("held_out", [0, 1, -0.1, float("nan")])
def test_an_impossible_share_is_refused(held_out: float) -> None:
    with pytest.raises(DataError, match="must lie between 0 and 1"):
        split_documents([Document("a")], held_out)
