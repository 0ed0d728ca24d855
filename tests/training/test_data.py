"""Documents, packing, the loss mask, held-out text, the order of batches."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import small_run
from training.config import TrainingConfig
from training.data import (
    IGNORED,
    BatchOrder,
    load_synthetic,
    load_text,
    pack,
    read_and_split,
    token_stream,
)
from training.synthetic import synthetic_documents
from yunmin.corpus import Document
from yunmin.errors import ConfigError, DataError
from yunmin.tokenizer import Tokenizer

DOCUMENTS = [Document("The quick brown fox"), Document(" jumps, she said.", prompt="What? "), Document("速い茶色の狐")]


def _config(tmp_path: Path, **options: Any) -> TrainingConfig:
    return small_run(tmp_path, **options)


def test_documents_stand_in_a_row_with_end_of_text_after_each(tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_id
    assert eos is not None
    stream = token_stream(DOCUMENTS, tokenizer, eos)
    expected = [i for d in DOCUMENTS for i in (*tokenizer.encode(d.prompt), *tokenizer.encode(d.text), eos)]
    assert stream.ids.tolist() == expected
    ends = [i for i, token in enumerate(expected) if token == eos]
    assert stream.document[ends].tolist() == [0, 1, 2]


def test_the_loss_covers_completions_and_their_end_but_no_prompt(tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_id
    assert eos is not None
    stream = token_stream(DOCUMENTS, tokenizer, eos)
    prompt, completion = tokenizer.encode(DOCUMENTS[1].prompt), tokenizer.encode(DOCUMENTS[1].text)
    first = len(tokenizer.encode(DOCUMENTS[0].text)) + 1
    is_target = stream.is_target[stream.document == 1].tolist()
    assert is_target == [False] * len(prompt) + [True] * (len(completion) + 1)
    packed = pack(stream, stream.ids.numel() - 1)
    inputs, labels = packed.batch(torch.tensor([0]))
    # the last position of the prompt predicts the first token of the completion
    at = first + len(prompt) - 1
    assert labels[0, at - 1] == IGNORED
    assert labels[0, at] == completion[0]
    assert inputs[0, at] == prompt[-1]


@pytest.mark.parametrize("length", [2, 7, 16])
def test_every_token_but_the_first_is_a_label_once_and_labels_are_inputs_shifted(
    length: int, tokenizer: Tokenizer
) -> None:
    stream = token_stream([Document(f"line {i} of many\n") for i in range(9)], tokenizer, 256)
    packed = pack(stream, length)
    inputs, labels = packed.batch(torch.arange(len(packed)))
    assert inputs.dtype == labels.dtype == torch.int64
    assert inputs.shape == labels.shape == ((stream.ids.numel() - 1) // length, length)
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    assert torch.equal(labels.flatten(), stream.ids[1 : labels.numel() + 1].long())
    assert torch.equal(packed.documents[:, 0], stream.document[:-1:length][: len(packed)])


def test_sequences_with_nothing_to_learn_are_left_out(tokenizer: Tokenizer) -> None:
    documents = [Document("yes", prompt="a long question, " * 20), Document("no", prompt="another one, " * 20)]
    stream = token_stream(documents, tokenizer, 256)
    packed = pack(stream, 8)
    _, labels = packed.batch(torch.arange(len(packed)))
    assert (labels != IGNORED).any(1).all()
    assert int((labels != IGNORED).sum()) == int(stream.is_target[1 : (stream.ids.numel() - 1) // 8 * 8 + 1].sum())
    with pytest.raises(DataError, match="no completion to learn"):
        pack(token_stream([Document(".", prompt="a long question, " * 20)], tokenizer, 256), 60)


def test_too_little_text_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"training data has \d+ tokens, sequence_length 500"):
        pack(token_stream(DOCUMENTS, tokenizer, 256), 500)


def test_an_epoch_sees_every_sequence_once_and_the_next_in_another_order() -> None:
    order = BatchOrder(11, 4, seed=3)
    epochs = [torch.cat([order.rows(step) for step in range(first, first + 3)]).tolist() for first in (0, 3)]
    assert order.batches_per_epoch == 3
    assert [sorted(epoch) for epoch in epochs] == [list(range(11))] * 2
    assert epochs[0] != epochs[1]
    assert order.position(7) == (2, 1)
    assert torch.equal(BatchOrder(11, 4, seed=3).rows(4), order.rows(4))
    assert not torch.equal(torch.cat([BatchOrder(11, 4, seed=4).rows(s) for s in range(3)]), torch.tensor(epochs[0]))


def test_training_and_held_out_text_never_overlap(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i:02d}.txt").write_text(f"document number {i}\nwith two lines\n")
    training, held_out = read_and_split(_config(tmp_path, data=str(tmp_path), validation_share=0.1, max_documents=30))
    assert len(held_out) == 3
    assert len(training) == 27
    assert not {d.text for d in training} & {d.text for d in held_out}


def test_what_is_held_out_by_name_is_taken_out_of_the_training_text(tmp_path: Path) -> None:
    records = [{"text": f"document {i}"} for i in range(6)] + [{"prompt": "docu", "completion": "ment 7"}]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": "document 3"}) + '\n{"text": "document 7"}\n')
    config = _config(tmp_path, data=str(tmp_path / "all.jsonl"), validation_data=str(tmp_path / "held.jsonl"))
    training, held_out = read_and_split(config)
    assert [d.prompt + d.text for d in held_out] == ["document 3", "document 7"]
    assert [d.prompt + d.text for d in training] == [f"document {i}" for i in (0, 1, 2, 4, 5)]
    with pytest.raises(DataError, match="leave nothing to train on"):
        read_and_split(
            _config(tmp_path, data=str(tmp_path / "held.jsonl"), validation_data=str(tmp_path / "all.jsonl"))
        )


def test_validation_tokens_bound_what_is_scored(tmp_path: Path, tokenizer: Tokenizer) -> None:
    split = [Document("word " * 400)], [Document("another " * 400)]
    data = load_text(_config(tmp_path, validation_tokens=50), split, tokenizer, 256)
    assert data.validation.numel() == 51  # the first one is only read
    assert data.validation.tolist() == tokenizer.encode("another " * 400)[:51]


def test_the_digest_follows_tokens_and_loss_mask(tmp_path: Path, tokenizer: Tokenizer) -> None:
    held = [Document("another " * 400)]
    parts = [[Document("a b " * 90)], [Document("a c " * 90)], [Document("b " + "a b " * 89, prompt="a ")]]
    digests = [load_text(_config(tmp_path), (part, held), tokenizer, 256).sha256 for part in parts]
    assert len(set(digests)) == 3


def test_synthetic_documents_say_everything_twice_and_follow_a_sparse_chain() -> None:
    documents = synthetic_documents(30, separator=4, seed=1, most=400)
    successors: dict[int, set[int]] = {}
    for document in documents:
        half = len(document) // 2
        assert document[:half] == document[half:]
        for one, other in itertools.pairwise(document[:half]):
            successors.setdefault(one, set()).add(other)
    assert max(len(s) for s in successors.values()) <= 4
    assert {token for d in documents for token in d} == set(range(30)) - {4}
    assert documents == synthetic_documents(30, separator=4, seed=1, most=400)
    assert documents != synthetic_documents(30, separator=4, seed=2, most=400)


def test_synthetic_data_holds_out_whole_documents(tmp_path: Path) -> None:
    data = load_synthetic(_config(tmp_path, validation_tokens=10_000), n_tokens=30, separator=4)
    assert data.training_documents == 57
    assert (data.validation == 4).sum() == 3
    with pytest.raises(ConfigError, match="synthetic data needs at least 5 ids, got 4"):
        load_synthetic(_config(tmp_path), n_tokens=4, separator=0)
