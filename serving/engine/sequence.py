"""A sequence as the engine's thread sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from serving.engine.job import Job
from serving.engine.streams import TokenStream
from yunmin.generate import Piece
from yunmin.state import MambaState, Snapshot

PRIORITY_S = 10.0  # what one more of priority is worth: low ones wait longer, not for ever


@dataclass(eq=False)
class ActiveSequence:
    """A sequence that waits, is read, or generates.

    Attributes:
        job: what was asked for.
        stream: where its pieces go.
        siblings: sequences of the same prompt that go on from this one's state once it is read.
        read: tokens of the prompt that `state` has read.
        state: of batch size 1, until it joins the decode batch.
        logits: float32 (V,), after the last token read; None while there is none.
        stops: positions of the prompt where a checkpoint is to be taken, the last one first.
        next_id: token that the next step feeds.
        last_token: when the last token came, on `time.monotonic`'s clock.
        seen: how far an earlier prompt went the same way.
        closing: the last piece, of a sequence whose last token is still to be fed.
    """

    job: Job
    stream: TokenStream
    siblings: list[ActiveSequence] = field(default_factory=list)
    read: int = 0
    state: MambaState | None = None
    logits: Tensor | None = None
    stops: list[int] = field(default_factory=list)
    next_id: int = -1
    last_token: float = 0.0
    seen: int = 0
    closing: Piece | None = None

    def __post_init__(self) -> None:
        if self.job.start is not None:
            self.go_on_from(len(self.job.start.token_ids), self.job.start.state, self.job.start.logits)

    @property
    def prompt_ids(self) -> Sequence[int]:
        return self.job.prompt_ids

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and generated ids."""
        return (*self.job.prompt_ids, *self.stream.generation.token_ids)

    @property
    def deadline(self) -> float:
        """On `time.monotonic`'s clock."""
        return self.stream.timings.submitted + self.job.deadline_s

    @property
    def due(self) -> float:
        """Who waits is admitted in this order."""
        return self.stream.timings.submitted - PRIORITY_S * self.job.priority

    @property
    def left_to_read(self) -> int:
        return len(self.job.prompt_ids) - self.read

    def go_on_from(self, read: int, state: MambaState | None, logits: Tensor | None) -> None:
        """Takes over a state that has read the first `read` ids of the prompt."""
        self.read = self.stream.cached_tokens = read
        self.state, self.logits = state, logits

    def snapshot(self, state: MambaState, logits: Tensor) -> Snapshot:
        """The sequence after its last token."""
        if self.job.params.max_tokens:
            sampler_state: Tensor | None = self.stream.generation.sampler.state()
        else:  # nothing was drawn
            sampler_state = None if self.job.start is None else self.job.start.sampler_state
        return Snapshot(state, logits.detach().float().cpu().clone(), self.token_ids, sampler_state)
