"""What an evaluation needs of a model, whether it is loaded here or runs on a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from yunmin.perplexity import Encoder

Progress = Callable[[str, int, int], None]  # what is done, how much of it, and of how much
TokenIds = Sequence[int]


def no_progress(_what: str, _done: int, _total: int) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Scored:
    """How probable a model finds the tokens of a sequence, each after all before it.

    Attributes:
        logprobs: natural logarithms, float64 (n,).
        greedy: whether no other token is more probable in its place, bool (n,).
    """

    logprobs: NDArray[np.float64]
    greedy: NDArray[np.bool_]


class BatchEncoder(Encoder, Protocol):
    """The model's tokenizer."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


class TextModel(Protocol):
    """A model that completes and scores texts, many at a time.

    Attributes:
        name: for people, and for errors.
    """

    name: str

    @property
    def tokenizer(self) -> BatchEncoder: ...

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
        """Texts that follow prompts.

        Args:
            prompts: to continue; an empty one is the end-of-text token.
            max_tokens: of each completion.
            temperature: 0 is greedy.
            top_p: nucleus sampling.
            stop: strings that end a completion, and are no part of it.
            seed: makes sampling repeatable: completion j of prompt i draws with seed + i * n + j. None draws one.
            n: completions of each prompt.

        Returns:
            For each prompt its n completions.
        """
        ...

    def score(self, sequences: Sequence[TokenIds], first: Sequence[int] | None = None) -> list[Scored]:
        """Log-probabilities of token ids, over the ids that the tokenizer knows (padding has no part in them).

        Args:
            sequences: each of at least two ids; nothing is cut, however long they are.
            first: for each sequence the position, at least 1, from which on it is scored; 1 where None.
        """
        ...


def open_model(
    source: str,
    *,
    device: str = "auto",
    runtime: Literal["auto", "native", "torch", "onnx"] = "auto",
    batch_size: int = 16,
    api_key: str | None = None,
    progress: Progress = no_progress,
) -> TextModel:
    """A model by its folder or by the URL of a running server.

    Args:
        source: what `yunmin.load` takes, or `http://host:port`.
        device, runtime: of a model that is loaded here.
        batch_size: sequences at a time.
        api_key: for a server that wants one.
        progress: told how far it is.

    Raises:
        YunminError: it cannot be loaded, or there is no such server, or it has no tokenizer.
    """
    if source.startswith(("http://", "https://")):
        from research.models.remote import RemoteModel

        return RemoteModel(source, api_key=api_key, concurrency=batch_size, progress=progress)
    from research.models.local import LocalModel
    from yunmin.language_model import load

    return LocalModel(load(source, device=device, runtime=runtime), batch_size=batch_size, progress=progress)
