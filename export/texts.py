"""What an export measures perplexity on, and what it calibrates on; a document is never in both."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from yunmin.corpus import Document, read_documents, split_documents, texts_of
from yunmin.errors import DataError, TokenizerError
from yunmin.perplexity import token_stream
from yunmin.tokenizer import Tokenizer

STDLIB = "stdlib"
WINDOW = 512  # tokens a model reads at once; each is scored once
MEASURED_TOKENS = 16384
CALIBRATION_TOKENS = 32768
_HELD_OUT = 0.05  # of the standard library: what `yunmin train data=stdlib` does not learn from
_HELD_OUT_OF_ONE_SOURCE = 0.3
_SEED = 0


@dataclass(frozen=True)
class Text:
    """Text as tokens.

    Attributes:
        token_ids: int64 (n,).
        source: where it comes from, for the manifest.
    """

    token_ids: Tensor
    source: str

    def describe(self) -> dict[str, str | int]:
        """What a manifest records of it."""
        return {"source": self.source, "tokens": self.sequences().numel()}

    def sequences(self) -> Tensor:
        """Rows of `WINDOW` tokens (S, L), the rest left out; one shorter row where there are fewer."""
        length = min(WINDOW, self.token_ids.numel())
        rows = self.token_ids.numel() // length
        return self.token_ids[: rows * length].view(rows, length)


@dataclass(frozen=True)
class Texts:
    """The two texts of an export.

    Attributes:
        measured: held out.
        calibration: None where nothing is calibrated.
    """

    measured: Text
    calibration: Text | None


def read_texts(
    tokenizer: Tokenizer | None,
    n_tokens: int,
    data: str | None,
    calibrate: str | None,
    *,
    calibrates: bool,
    measured_tokens: int = MEASURED_TOKENS,
    calibration_tokens: int = CALIBRATION_TOKENS,
) -> Texts:
    """Reads and splits the texts.

    Args:
        tokenizer: of the model.
        n_tokens: ids below this are valid.
        data: source to measure on, as `read_documents` has it; None takes the held-out part of the standard library.
        calibrate: source to calibrate on, without documents of `data`; None takes another part of `data`.
        calibrates: whether calibration text is needed at all.
        measured_tokens: to score at most.
        calibration_tokens: to calibrate on at most.

    Raises:
        TokenizerError: there is no tokenizer, or it gives ids that the model does not have.
        DataError: a source is unknown, or too short.
    """
    if tokenizer is None:
        raise TokenizerError("measuring perplexity and calibrating need a tokenizer, and the model has none")
    if calibrates:
        measured, rest, sources = split_sources(data or STDLIB, calibrate or data or STDLIB)
    else:
        measured, rest, sources = measured_documents(data or STDLIB)
    texts = Texts(
        _tokens(tokenizer, measured, measured_tokens + 1, sources[0]),
        _tokens(tokenizer, rest, calibration_tokens, sources[1]) if calibrates else None,
    )
    for text in (texts.measured, texts.calibration):
        if text is not None and int(text.token_ids.max()) >= n_tokens:
            raise TokenizerError(f"the tokenizer gives id {int(text.token_ids.max())}, the model has {n_tokens} ids")
    return texts


def measured_documents(data: str) -> tuple[list[Document], list[Document], tuple[str, str]]:
    """Documents to measure on, the others of the source, and what either is called."""
    documents = read_documents(data)
    if data != STDLIB:
        return documents, [], (data, data)
    rest, measured = split_documents(documents, _HELD_OUT)
    return measured, rest, _names(data, _HELD_OUT)


def split_sources(data: str, calibrate: str) -> tuple[list[Document], list[Document], tuple[str, str]]:
    """Documents to measure on, to calibrate on, and what either is called.

    Raises:
        DataError: a source is unknown, or nothing is left to calibrate on.
    """
    measured, rest, names = measured_documents(data)
    if calibrate != data:
        is_measured = set(measured)
        rest = [document for document in read_documents(calibrate) if document not in is_measured]
        names = names[0], calibrate
    elif data != STDLIB:
        rest, measured = split_documents(measured, _HELD_OUT_OF_ONE_SOURCE)
        names = _names(data, _HELD_OUT_OF_ONE_SOURCE)
    if not rest or not measured:
        raise DataError(f"{calibrate}: nothing is left to calibrate on that {data} does not measure on")
    return measured, rest, names


def _names(source: str, held_out: float) -> tuple[str, str]:
    return f"{source}, {held_out:.0%} held out", f"{source}, the other {1 - held_out:.0%}"


def _tokens(tokenizer: Tokenizer, documents: Sequence[Document], limit: int, source: str) -> Text:
    """Tokens of documents in a random order that never changes, so that few tokens still see all kinds."""
    texts = texts_of(documents)
    random.Random(_SEED).shuffle(texts)  # noqa: S311 (no secret)
    token_ids, _ = token_stream(tokenizer, texts, limit - 1)
    if len(token_ids) < 2:
        raise DataError(f"{source}: expected at least 2 tokens, found {len(token_ids)}")
    return Text(torch.tensor(token_ids), source)
