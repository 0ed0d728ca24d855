"""The tokenizer of a running server."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from research.models.server import Call, Server, ServerError
from yunmin.errors import DataError

_CUT = re.compile(r"(?<=[^\W_]) (?=\S)")


@dataclass(frozen=True)
class RemoteEncoding:
    """Token ids of a text, whose places the server is asked for only where they are wanted.

    Attributes:
        ids: of the whole text.
        text: that was encoded.
        pieces: for each piece that was sent, where it begins in characters and in ids.
        server: that has encoded it.
    """

    ids: list[int]
    text: str
    pieces: list[tuple[int, int]]
    server: Server

    @property
    def offsets(self) -> RemoteEncoding:
        return self

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Where a token begins and ends in the text, in characters.

        Raises:
            DataError: the server's tokenizer does not give back the text.
        """
        return (0 if index == 0 else self._end(index - 1)), self._end(index)

    def _end(self, index: int) -> int:
        begin, first = next(piece for piece in reversed(self.pieces) if piece[1] <= index)
        (answer,) = self.server.ask([Call("/detokenize", {"tokens": self.ids[first : index + 1]})])
        shown = str(answer.get("prompt"))
        if not self.text.startswith(shown.rstrip("\N{REPLACEMENT CHARACTER}"), begin):
            raise DataError(
                f"{self.server.url}: its tokenizer changes the text, so that where a token ends is not known; score "
                "whole texts (no --max-tokens), and have an end-of-text token"
            )
        return begin + len(shown)


class RemoteTokenizer:
    """The tokenizer of a server.

    Long texts are sent in pieces, each cut before a blank that follows a letter or digit: there no byte-level tokenizer
    joins what is on both sides, so that the ids are those of the whole text.

    Args:
        server: that is asked.
        eos_id: its end-of-text token.
        max_prompt_tokens: most ids that it encodes at once.
    """

    def __init__(self, server: Server, eos_id: int | None, max_prompt_tokens: int) -> None:
        self.eos_id = eos_id
        self._server = server
        self._most_bytes = max_prompt_tokens  # a token has at least one

    def encoding(self, text: str) -> RemoteEncoding:
        return self._encodings([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._encodings(texts)]

    def _encodings(self, texts: Sequence[str]) -> list[RemoteEncoding]:
        pieces = [cut_text(text, self._most_bytes) for text in texts]
        answers = iter(self._server.ask([Call("/tokenize", {"prompt": piece}) for own in pieces for piece in own]))
        found = []
        for text, own in zip(texts, pieces, strict=True):
            ids: list[int] = []
            places, begin = [], 0
            for piece in own:
                places.append((begin, len(ids)))
                ids += _token_ids(self._server.url, next(answers))
                begin += len(piece)
            found.append(RemoteEncoding(ids, text, places, self._server))
        return found


def cut_text(text: str, most_bytes: int) -> list[str]:
    """Pieces of at most so many bytes that a byte-level tokenizer encodes as it does the whole.

    Raises:
        DataError: there is no place to cut at.
    """
    pieces, begin = [], 0
    while ahead := text[begin : begin + most_bytes + 2]:  # a character has at least one byte
        data = ahead.encode()
        end = len(ahead)
        if len(data) > most_bytes:
            longest = len(data[:most_bytes].decode(errors="ignore"))
            end = max(
                (cut.start() for cut in _CUT.finditer(ahead, 0, longest + 2) if cut.start() <= longest), default=0
            )
        if not end:
            raise DataError(f"a text has {most_bytes} bytes without a blank to cut at, and the server takes no more")
        pieces.append(ahead[:end])
        begin += end
    return pieces


def _token_ids(name: str, answer: dict[str, Any]) -> list[int]:
    found = answer.get("tokens")
    if not isinstance(found, list) or not all(type(token) is int for token in found):
        raise ServerError(f"{name}/tokenize: expected a list of token ids, found {found!r:.80}")
    return found
