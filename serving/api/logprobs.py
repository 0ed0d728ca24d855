"""Log-probabilities of tokens in the two shapes that OpenAI gives them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from serving.api.token_texts import TokenTexts
from yunmin.generate import Piece
from yunmin.sampler import TokenLogprob
from yunmin.text_stream import TextStream
from yunmin.tokenizer import Tokenizer

Alternatives = Iterable[tuple[int, float]]


class LegacyLogprobs:
    """The shape of completions: four lists, which grow with the text.

    Offsets are those of the text of the choice, the prompt included where it is echoed: a token begins where the text
    that was certain before it ends.

    Args:
        texts: of single tokens.
        offset: characters before the first token.
    """

    def __init__(self, texts: TokenTexts, offset: int = 0) -> None:
        self._texts = texts
        self._offset = offset
        self._reset()

    def add(self, token_id: int, text: str, logprob: float | None, alternatives: Alternatives | None) -> None:
        """Adds a token.

        Args:
            token_id: of it.
            text: that became certain with it.
            logprob: None for the first token of a prompt.
            alternatives: ids and log-probabilities of the most probable tokens in its place.
        """
        self._tokens.append(self._texts.text(token_id))
        self._offsets.append(self._offset)
        self._logprobs.append(logprob)
        if logprob is None:
            self._top.append(None)
        else:
            found: dict[str, float] = {}
            # best first: of tokens that look the same, the best one stays
            for other, value in (*(alternatives or ()), (token_id, logprob)):
                found.setdefault(self._texts.text(other), value)
            self._top.append(found)
        self._offset += len(text)

    def add_pieces(self, pieces: Iterable[Piece]) -> None:
        """Adds generated tokens."""
        for piece in pieces:
            if piece.token_id is None:
                self._offset += len(piece.text)
            else:
                self.add(piece.token_id, piece.text, piece.logprob, piece.top_logprobs)

    def add_prompt(self, tokenizer: Tokenizer, token_ids: Sequence[int], found: Sequence[TokenLogprob | None]) -> None:
        """Adds the tokens of a prompt."""
        stream = TextStream(tokenizer)
        for token_id, known in zip(token_ids, found, strict=True):
            logprob, alternatives = (None, None) if known is None else (known.logprob, known.top)
            self.add(token_id, stream.push(token_id), logprob, alternatives)
        self._offset += len(stream.finish())

    def take(self) -> dict[str, Any]:
        """What was added since the last time."""
        taken = {
            "text_offset": self._offsets,
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._top,
        }
        self._reset()
        return taken

    def _reset(self) -> None:
        self._tokens: list[str] = []
        self._offsets: list[int] = []
        self._logprobs: list[float | None] = []
        self._top: list[dict[str, float] | None] = []


def chat_logprobs(texts: TokenTexts, pieces: Iterable[Piece]) -> dict[str, Any]:
    """The shape of chat completions: a list of tokens with their alternatives."""
    return {"content": content_logprobs(texts, pieces), "refusal": None}


def content_logprobs(texts: TokenTexts, pieces: Iterable[Piece]) -> list[dict[str, Any]]:
    """Tokens with their alternatives, as chat completions and responses list them."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        return {"token": texts.text(token_id), "logprob": logprob, "bytes": texts.bytes(token_id)}

    return [
        entry(piece.token_id, piece.logprob)
        | {"top_logprobs": [entry(other, value) for other, value in piece.top_logprobs or ()]}
        for piece in pieces
        if piece.token_id is not None
    ]


def mean_logprob(pieces: Sequence[Piece]) -> float:
    """Of the tokens of a sequence, for choosing the best; the least there is for one without tokens."""
    values = [piece.logprob for piece in pieces if piece.logprob is not None]
    return sum(values) / len(values) if values else float("-inf")
