"""A model behind a running server's URL, with many requests at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from research.models.model import Progress, Scored, TokenIds, no_progress
from research.models.remote_tokenizer import RemoteTokenizer
from research.models.server import Call, Server, ServerError
from yunmin.errors import ConfigError, DataError, TokenizerError

_COPIES = 8  # completions of one prompt asked for at once: a server takes so many, and reads the prompt once


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
