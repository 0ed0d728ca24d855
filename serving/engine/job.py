"""What an engine is asked for, and why it may decline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from yunmin.errors import YunminError
from yunmin.sampling import SamplingParams
from yunmin.state import Snapshot


@dataclass(frozen=True)
class Job:
    """One sequence to generate.

    Attributes:
        prompt_ids: everything the model must have read, at least one id; begins with `start`'s ids where one is given.
        params: how to choose and when to stop; with `max_tokens` 0 the prompt is read and nothing sampled.
        deadline_s: seconds from its arrival after which it ends with a `DeadlineError`.
        start: to go on from; None reads from the beginning, or from what the prefix cache holds.
        keep: whether `TokenStream.snapshot` shall hold the sequence as it is after its last token, which costs one
            step more.
        priority: one more is as good as having come `PRIORITY_S` seconds earlier.
        turn_ends: positions in `prompt_ids` where other prompts are likely to part from this one.
        use_cache: whether the prefix cache is read and filled.
        prompt_logprobs: how many alternatives to give per token of the prompt; None for no probabilities at all, which
            alone lets the prefix cache help.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams
    deadline_s: float
    start: Snapshot | None = None
    keep: bool = False
    priority: int = 0
    turn_ends: Sequence[int] = ()
    use_cache: bool = True
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class Load:
    """How busy an engine is.

    Attributes:
        running: sequences that hold a slot.
        waiting: sequences that do not yet.
    """

    running: int
    waiting: int


class QueueFullError(YunminError):
    """No slot is free and the queue is full.

    Attributes:
        retry_after_s: when a place may be free, as a whole number of seconds.
    """

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"every slot is busy and the queue is full, try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class DeadlineError(YunminError):
    """A request took longer than it may."""


class SequenceError(YunminError):
    """The model failed on this sequence."""


class EngineStoppedError(YunminError):
    """The engine is shutting down, or its thread has died."""
