"""A model behind a running server's URL, with many requests at a time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from research.models import Progress, Scored, TokenIds, no_progress
from research.server import Call, Server, ServerError
from yunmin.errors import ConfigError, DataError, TokenizerError

_COPIES = 8  # completions of one prompt asked for at once: a server takes so many, and reads the prompt once
_CUT = re.compile(r"(?<=[^\W_]) (?=\S)")


class RemoteModel:
    """A served model as a `TextModel`.

    Args:
        url: of a server that `yunmin serve` started, with or without `/v1`.
        api_key: sent as a bearer key.
        concurrency: sequences under way at once.
        progress: told how far it is.
        transport: in place of the network, for tests.

    Raises:
        ConfigError: no such URL.
        ServerError: nobody answers there, or it is no server of ours.
        TokenizerError: the model has none.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        concurrency: int = 16,
        progress: Progress = no_progress,
        transport: Any = None,
    ) -> None:
        self.name = _base(url)
        self._server = Server(self.name, api_key, concurrency, transport)
        self._concurrency = concurrency
        self._progress = progress
        (answer,) = self._server.ask([Call("/v1/models", None)])
        found = answer.get("data")
        facts = found[0] if isinstance(found, list) and found and isinstance(found[0], dict) else {}
        try:
            self._max_prompt_tokens = int(facts["max_prompt_tokens"])
            has_tokenizer, eos_id = facts["has_tokenizer"], facts["end_of_text_id"]
            ours = self._max_prompt_tokens >= 1 and isinstance(eos_id, int | None)
        except (KeyError, TypeError, ValueError, OverflowError):
            ours = False
        if not ours:
            raise ConfigError(f"{self.name}: expected a server of this version of yunmin, by /v1/models")
        if not has_tokenizer:
            raise TokenizerError(f"{self.name}: the served model has no tokenizer, so text cannot be scored")
        self.tokenizer = RemoteTokenizer(self._server, eos_id, self._max_prompt_tokens)

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
        """As `TextModel.complete`.

        Raises:
            DataError: an empty prompt, and no end-of-text token.
            ServerError: the server refuses, fails or is gone.
        """
        sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "stop": list(stop)}
        eos_id = self.tokenizer.eos_id
        if eos_id is None and not all(prompts):
            raise DataError(f"{self.name}: an empty prompt is its end-of-text token, and its tokenizer has none")
        calls, owners = [], []
        for index, prompt in enumerate(prompts):
            for copy in range(0, n, _COPIES):
                own = {} if seed is None else {"seed": seed + index * n + copy}
                asked = {"prompt": prompt or [eos_id], "n": min(_COPIES, n - copy)}
                calls.append(Call("/v1/completions", sampling | own | asked, weight=min(_COPIES, n - copy)))
                owners.append(index)
        texts: list[list[str]] = [[] for _ in prompts]
        answers = self._server.ask(calls, lambda done: self._progress("requests", done, len(calls)))
        for owner, call, answer in zip(owners, calls, answers, strict=True):
            choices = _choices(self.name, answer, call.weight, {"index": int, "text": str})
            texts[owner] += [choice["text"] for choice in sorted(choices, key=lambda choice: int(choice["index"]))]
        return texts

    def score(self, sequences: Sequence[TokenIds], first: Sequence[int] | None = None) -> list[Scored]:
        """As `TextModel.score`: the server reads each sequence as a prompt, echoes it, and generates nothing.

        Raises:
            DataError: a sequence is longer than the server reads.
            ServerError: the server refuses, fails or is gone.
        """
        longest = max((len(ids) for ids in sequences), default=0)
        if longest > self._max_prompt_tokens:
            raise DataError(
                f"{self.name}: reads at most {self._max_prompt_tokens} tokens at once (its --max-prompt-tokens), got "
                f"{longest}; for perplexity, choose a smaller --window"
            )
        echo = {"max_tokens": 0, "echo": True, "logprobs": 1}
        calls = [Call("/v1/completions", {"prompt": list(ids), **echo}) for ids in sequences]
        answers = self._server.ask(calls, lambda done: self._progress("sequences", done, len(calls)))
        starts = [1] * len(sequences) if first is None else first
        return [
            _scored(self.name, _choices(self.name, answer, 1, {"logprobs": dict})[0]["logprobs"], begin, len(ids))
            for ids, answer, begin in zip(sequences, answers, starts, strict=True)
        ]


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


def _choices(name: str, answer: dict[str, Any], expected: int, fields: dict[str, type]) -> list[dict[str, Any]]:
    found = answer.get("choices")
    if (
        not isinstance(found, list)
        or len(found) != expected
        or not all(isinstance(each, dict) for each in found)
        or not all(isinstance(each.get(field), kind) for each in found for field, kind in fields.items())
    ):
        raise ServerError(f"{name}: expected {expected} choices with {' and '.join(fields)}, found {found!r:.80}")
    return found


def _scored(name: str, logprobs: dict[str, Any], begin: int, n_tokens: int) -> Scored:
    """From the lists of an answer; the best of the alternatives says whether a token is the greedy one."""
    try:
        values = np.array(logprobs["token_logprobs"], np.float64)[begin:]
        best = np.array([max(found.values()) for found in logprobs["top_logprobs"][begin:]], np.float64)
    except (KeyError, TypeError, ValueError, AttributeError):
        values = best = np.empty(0)
    # a float32's sum of probabilities can be a little above 1
    possible = all(bool((np.isfinite(found) & (found <= 1e-6)).all()) for found in (values, best))
    if not possible or not values.shape == best.shape == (n_tokens - begin,):
        raise ServerError(
            f"{name}: expected a log-probability, and the best one, for each of {n_tokens} tokens, found others"
        )
    return Scored(values, values >= best)


def _token_ids(name: str, answer: dict[str, Any]) -> list[int]:
    found = answer.get("tokens")
    if not isinstance(found, list) or not all(type(token) is int for token in found):
        raise ServerError(f"{name}/tokenize: expected a list of token ids, found {found!r:.80}")
    return found


def _base(url: str) -> str:
    """The URL without a path of ours."""
    try:
        parts = urlsplit(url)
        has_host = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        has_host = False
    if not has_host or parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(f"expected a server's URL like http://127.0.0.1:3000, found {_without_secrets(url)!r}")
    path = parts.path.rstrip("/")
    for ending in ("/v1/completions", "/v1"):
        path = path.removesuffix(ending)
    return f"{parts.scheme}://{parts.netloc}{path}"


def _without_secrets(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"
