"""The proof: what it compares on, and that it notices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from export.verify import (
    Probe,
    logits_as_batch,
    logits_by_steps,
    logits_one_by_one,
    make_probe,
    require_parity,
)
from tests.export.fixtures import TEXT, small_config
from tests.models import random_tensors
from yunmin.errors import DataError, TokenizerError, VerificationError
from yunmin.model import MambaLM
from yunmin.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 300)


def _model() -> MambaLM:
    return MambaLM.from_tensors(small_config(), random_tensors(small_config())).double()


def test_default_probe_is_real_text_of_unequal_lengths(tokenizer: Tokenizer) -> None:
    probe = make_probe(tokenizer, 300)
    assert [len(sequence) for sequence in probe.sequences] == [96, 61, 33, 7]
    assert probe.tokens == 197
    assert "argparse.py" in probe.origin
    assert "import" in tokenizer.decode(probe.sequences[1]) or "Parser" in tokenizer.decode(probe.sequences[0])


def test_probe_without_tokenizer_is_random_repeatable_and_says_so() -> None:
    probe = make_probe(None, 50)
    assert probe == make_probe(None, 50)
    assert "random token ids" in probe.origin
    assert {token for sequence in probe.sequences for token in sequence} <= set(range(50))


def test_probe_reads_the_users_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "held-out.txt"
    path.write_text("".join(f"paragraph {i}\n" for i in range(500)))
    probe = make_probe(tokenizer, 300, str(path))
    assert probe.origin == str(path)
    assert tokenizer.decode(probe.sequences[0]).startswith("paragraph 0")
    assert len(probe.sequences) == 4
    assert len(set(probe.sequences)) == 4
    assert not tokenizer.decode(probe.sequences[1]).startswith("paragraph 0")


def test_probe_takes_few_and_short_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("a", "two words", "!")))
    probe = make_probe(tokenizer, 300, str(path))
    assert probe.sequences
    assert all(len(sequence) >= 2 for sequence in probe.sequences)


def test_unusable_data_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a")
    with pytest.raises(DataError, match="no document has two tokens"):
        make_probe(tokenizer, 300, str(tmp_path / "one.txt"))
    with pytest.raises(DataError, match="found no such path"):
        make_probe(tokenizer, 300, str(tmp_path / "missing.txt"))
    with pytest.raises(DataError, match="needs a tokenizer"):
        make_probe(None, 300, "stdlib")
    with pytest.raises(TokenizerError, match="the model has 40 ids"):
        make_probe(tokenizer, 40)


def test_batch_with_padding_equals_one_by_one() -> None:
    model, probe = _model(), Probe(((1, 2, 3, 4, 5), (6, 7), (8, 9, 10), (11, 12, 13, 14)), "test")
    torch.testing.assert_close(logits_as_batch(model, probe), logits_one_by_one(model, probe), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [(2,), (2, 9), (12, 7, 30)])
def test_steps_equal_whole_sequences(lengths: tuple[int, ...]) -> None:
    sequences = tuple(tuple(range(3 + n, 3 + n + length)) for n, length in enumerate(lengths))
    stepped, whole = logits_by_steps(_model(), Probe(sequences, "test"))
    assert stepped.shape == (len(lengths), min(6, min(lengths) - 1) + 1, 300)
    torch.testing.assert_close(stepped, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("what", ["float32", "float64", "stepwise"])
def test_parity_limit_is_relative_to_the_largest_logit(what: str) -> None:
    limit = {"float32": 1e-4, "float64": 1e-10, "stepwise": 1e-4}[what]
    trained = torch.tensor([[0.5, -20.0]], dtype=torch.float64)
    parity = require_parity(what, trained + 0.9 * 20 * limit, trained)
    assert (parity.tolerance, parity.largest_logit, parity.tokens) == (limit, 20.0, 1)
    with pytest.raises(VerificationError, match=rf"^{what}: .*; nothing was written$"):
        require_parity(what, trained + 1.1 * 20 * limit, trained)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_never_pass(bad: float) -> None:
    good, poisoned = torch.ones(2, 3), torch.tensor([[1.0, bad, 1.0], [1.0, 1.0, 1.0]])
    with pytest.raises(VerificationError):
        require_parity("float32", poisoned, good)
    with pytest.raises(VerificationError, match="not all finite"):
        require_parity("float32", poisoned, poisoned)


def test_all_zero_logits_equal_each_other() -> None:
    assert require_parity("float32", torch.zeros(2, 3), torch.zeros(2, 3)).max_abs_error == 0
