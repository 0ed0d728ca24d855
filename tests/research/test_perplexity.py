"""Perplexity per token, byte and word on a stream of texts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from research.perplexity import evaluate_perplexity
from tests.models import TEXT, random_model, write_model
from yunmin.cli import main
from yunmin.corpus import read_documents, split_documents, texts_of
from yunmin.errors import DataError, TokenizerError
from yunmin.language_model import LanguageModel
from yunmin.perplexity import token_stream
from yunmin.tokenizer import Tokenizer

TEXTS = [TEXT, "a second text, with its own words\n", "dritter Text – größer"]
TOKENIZER = Tokenizer.train(TEXTS, 290)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.of_network(random_model(), TOKENIZER, Path("nowhere"))


def test_measures_equal_the_cross_entropy_computed_by_hand(model: LanguageModel) -> None:
    result = evaluate_perplexity(model, TEXTS, window=4096, stride=4096)
    eos = TOKENIZER.eos_id
    assert eos is not None
    ids = torch.tensor([token for text in TEXTS for token in (eos, *TOKENIZER.encode(text))])
    logits = model.runtime.forward(ids[None, :-1])[0]
    nll = F.cross_entropy(logits, ids[1:], reduction="sum").item()
    joined = "".join(TEXTS)
    assert result["tokens"] == len(ids) - 1
    assert result["bytes"] == len(joined.encode())
    assert result["words"] == sum(len(text.split()) for text in TEXTS)
    assert math.log(result["token_perplexity"]) == pytest.approx(nll / (len(ids) - 1), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nll / math.log(2) / len(joined.encode()), rel=1e-5)
    assert math.log(result["word_perplexity"]) == pytest.approx(nll / result["words"], rel=1e-5)


@given(st.lists(st.text(alphabet="abc de\nfox", min_size=1), min_size=1, max_size=4), st.integers(1, 60))
def test_scored_text_is_what_the_scored_tokens_spell(texts: list[str], max_tokens: int) -> None:
    token_ids, scored = token_stream(TOKENIZER, texts, max_tokens)
    assert len(token_ids) <= max_tokens + 1
    assert TOKENIZER.decode(token_ids[1:]) == "".join(scored)


@given(st.lists(st.text(alphabet="abc de\nfox", min_size=1), min_size=1, max_size=4), st.integers(1, 60))
def test_without_end_of_text_the_first_token_counts_for_nothing(texts: list[str], max_tokens: int) -> None:
    bare = Tokenizer(TOKENIZER.backend, None)
    token_ids, scored = token_stream(bare, texts, max_tokens)
    assert bare.decode(token_ids[1:]) == "".join(scored)


def test_limit_is_exact_and_far_texts_are_not_read(model: LanguageModel) -> None:
    assert evaluate_perplexity(model, TEXTS, max_tokens=17)["tokens"] == 17
    token_ids, scored = token_stream(TOKENIZER, TEXTS, None)
    assert scored == TEXTS
    assert len(token_ids) == sum(1 + len(TOKENIZER.encode(text)) for text in TEXTS)


def test_longer_windows_and_overlap_change_what_is_read_not_what_is_scored(model: LanguageModel) -> None:
    counts = {
        (window, stride): evaluate_perplexity(model, TEXTS, window=window, stride=stride)["tokens"]
        for window, stride in ((7, 7), (16, 3), (4096, 4096))
    }
    assert len(set(counts.values())) == 1


def test_model_without_tokenizer_and_text_without_words_are_refused(model: LanguageModel) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer.json"):
        evaluate_perplexity(LanguageModel(model.runtime, None, Path("nowhere"), lambda: ""), TEXTS)
    with pytest.raises(DataError, match="no words"):
        evaluate_perplexity(model, [" \n "])


def test_command_prints_one_json_object_and_scores_what_training_holds_out(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(f"document number {number}\n" * (number + 1))
    argv = ["eval", str(saved), "--task", "perplexity", "--data", str(folder), "--held-out", "0.1", "--window", "64"]
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    _, held_out = split_documents(read_documents(str(folder)), 0.1)
    assert result["bytes"] == len("".join(texts_of(held_out)).encode())
    assert (result["window"], result["stride"], result["task"]) == (64, 64, "perplexity")
    assert main(argv) == 0
    assert f"{result['token_perplexity']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{tmp}/none.txt"], "{tmp}/none.txt: expected a text file, a .jsonl file or a folder"),
        (["--data", "{text}", "--max-tokens", "-3"], "--max-tokens: must be >= 1, got -3"),
        (["--data", "{text}", "--window", "8", "--stride", "9"], "stride must lie in 1..window=8, got 9"),
        (["--data", "{text}", "--held-out", "1.5"], "the held-out share must lie between 0 and 1, got 1.5"),
    ],
)
def test_bad_input_ends_with_one_line(
    saved: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    names = {"tmp": str(tmp_path), "text": str(text)}
    assert main(["eval", str(saved), *(a.format(**names) for a in arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"yunmin: error: {message.format(**names)}")
    assert error.count("\n") == 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), tokenizer=TOKENIZER)
