"""Tokenizers: every text survives, files interoperate, damaged ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import TEXT, trained_tokenizer
from yunmin.errors import TokenizerError
from yunmin.tokenizer import END_OF_TEXT, Tokenizer, copy_tokenizer

TOKENIZER = trained_tokenizer()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_every_text_survives(text: str) -> None:
    if END_OF_TEXT not in text:
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_batches_encode_as_single_texts() -> None:
    texts = ["", "a", TEXT, "👍🏽"]
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(t) for t in texts]


def test_training_is_deterministic_and_reaches_its_size() -> None:
    first, second = (Tokenizer.train([TEXT * 4], 320) for _ in range(2))
    assert first.backend.to_str() == second.backend.to_str()
    assert first.vocab_size == 320
    assert first.eos_id == 0
    assert len(first.encode(TEXT)) < len(TEXT.encode())


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    assert Tokenizer.train(["a"], 257).vocab_size == 257
    with pytest.raises(TokenizerError, match="vocab_size must be at least 257"):
        Tokenizer.train(["a"], 256)


def test_a_saved_tokenizer_reads_back_and_is_copied_whole(tmp_path: Path) -> None:
    for name in ("a", "b", "none"):
        (tmp_path / name).mkdir()
    TOKENIZER.save(tmp_path / "a")
    assert copy_tokenizer(tmp_path / "a", tmp_path / "b") == ["tokenizer.json", "tokenizer_config.json"]
    loaded = Tokenizer.from_folder(tmp_path / "b")
    assert loaded is not None
    assert loaded.encode(TEXT) == TOKENIZER.encode(TEXT)
    assert loaded.eos_id == TOKENIZER.eos_id
    assert Tokenizer.from_folder(tmp_path / "none") is None


def test_only_ids_with_shown_text_are_shown() -> None:
    assert TOKENIZER.eos_id is not None
    assert not TOKENIZER.is_shown(TOKENIZER.eos_id)
    assert not TOKENIZER.is_shown(TOKENIZER.vocab_size)
    assert all(TOKENIZER.is_shown(i) for i in TOKENIZER.encode(TEXT))
