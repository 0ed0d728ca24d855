"""Prompts being read: in which order, how much at a time, and where their states are kept."""

from __future__ import annotations

import heapq

from torch import Tensor

from serving.engine.prefix_cache import PrefixCache
from serving.engine.sequence import ActiveSequence
from serving.metrics import Metrics
from yunmin.runtime import Runtime
from yunmin.sampler import token_logprob

_ROWS = 16  # of a tile of the matrix products: fewer take as long


class Pace:
    """How many prompt tokens are read per turn, so that nobody who generates waits long.

    Beside running sequences a turn reads what takes `stall` times as long as their step does, by what both took of
    late; else a whole chunk.

    Args:
        chunk: most tokens per turn.
        stall: by how much of itself a decode step may be delayed.
    """

    def __init__(self, chunk: int, stall: float) -> None:
        self._chunk = chunk
        self._stall = stall
        self._step_s = 0.0
        self._token_s = 0.0

    def budget(self, *, beside_steps: bool) -> int:
        """Tokens to read in this turn."""
        if not beside_steps or not self._token_s:
            return self._chunk if not beside_steps else min(_ROWS, self._chunk)
        tokens = int(self._stall * self._step_s / self._token_s)
        return min(self._chunk, max(_ROWS, tokens // _ROWS * _ROWS))

    def saw_step(self, seconds: float) -> None:
        self._step_s += 0.2 * (seconds - self._step_s)

    def saw_reading(self, tokens: int, seconds: float) -> None:
        if tokens >= _ROWS:
            self._token_s += 0.2 * (seconds / tokens - self._token_s) if self._token_s else seconds / tokens


class PromptReader:
    """Reads prompts in turns.

    A prompt is overtaken by shorter ones, but by no more tokens than it has itself: each is due when as many tokens
    have been read since it came as it is long.

    Args:
        runtime: reads.
        cache: keeps checkpoints.
        metrics: what is counted.
    """

    def __init__(self, runtime: Runtime, cache: PrefixCache, metrics: Metrics) -> None:
        self._runtime = runtime
        self._cache = cache
        self._metrics = metrics
        self._heap: list[tuple[int, int, ActiveSequence]] = []
        self._arrivals = 0
        self._tokens = 0  # read so far, for all

    def __len__(self) -> int:
        return len(self._heap)

    def sequences(self) -> list[ActiveSequence]:
        return [sequence for _, _, sequence in self._heap]

    def add(self, sequence: ActiveSequence) -> None:
        self._arrivals += 1
        heapq.heappush(self._heap, (self._tokens + sequence.left_to_read, self._arrivals, sequence))
        if sequence.state is None and self._may_use_cache(sequence):  # a sibling goes on from the first one's state
            sequence.seen = self._cache.see(sequence.prompt_ids)

    def first(self) -> ActiveSequence:
        """The one that is read next."""
        return self._heap[0][2]

    def remove(self, sequence: ActiveSequence) -> None:
        self._heap = [entry for entry in self._heap if entry[2] is not sequence]
        heapq.heapify(self._heap)

    def clear(self) -> None:
        """Lets go of everyone."""
        self._heap.clear()

    def read(self, sequence: ActiveSequence, budget: int) -> int:
        """Reads at most `budget` tokens of a prompt; keeps a checkpoint where one is wanted.

        Returns:
            Tokens read: none where the prefix cache holds the whole prompt.
        """
        if sequence.state is None and self._may_use_cache(sequence):
            self._look_up(sequence)
        begin, ids = sequence.read, sequence.prompt_ids
        if begin == len(ids):
            return 0
        end = min(begin + budget, sequence.stops[-1] if sequence.stops else len(ids))
        chunk = ids[begin:end]
        if sequence.job.prompt_logprobs is None:
            sequence.logits, sequence.state = self._runtime.prefill(chunk, sequence.state)
        else:
            logits, sequence.state = self._runtime.score(chunk, sequence.state)  # (L, V)
            self._note_logprobs(sequence, begin, logits)
            sequence.logits = logits[-1].clone()
        sequence.read = end
        self._tokens += end - begin
        if sequence.stops and sequence.stops[-1] == end:
            sequence.stops.pop()
            # a prefill leaves the state that it is given as it is, so the next chunk does not write over this one
            self._cache.put(ids[:end], sequence.state, sequence.logits)
        return end - begin

    def _look_up(self, sequence: ActiveSequence) -> None:
        """Only now, since who was read before it may have begun alike."""
        ids = sequence.prompt_ids
        checkpoint, outcome = self._cache.find(ids, sequence.seen)
        self._metrics.cache_lookups.labels(outcome).inc()
        if checkpoint is not None:
            sequence.go_on_from(checkpoint.position, checkpoint.state, checkpoint.logits)
            self._metrics.cache_tokens.inc(checkpoint.position)
        sequence.stops = self._cache.plan(ids, sequence.job.turn_ends, sequence.read)

    @staticmethod
    def _may_use_cache(sequence: ActiveSequence) -> bool:
        job = sequence.job
        return job.use_cache and job.start is None and job.prompt_logprobs is None

    def _note_logprobs(self, sequence: ActiveSequence, begin: int, logits: Tensor) -> None:
        """Log-probabilities of the tokens that these logits (L, V), of the positions from `begin` on, foresee."""
        count, ids = sequence.job.prompt_logprobs or 0, sequence.prompt_ids
        found = sequence.stream.prompt_logprobs
        if begin == 0:
            found.append(None)
        targets = ids[begin + 1 : begin + 1 + logits.shape[0]]
        n_tokens = self._runtime.config.n_tokens
        rows = logits.cpu()  # one copy for all of them
        found += [token_logprob(row, n_tokens, target, count) for row, target in zip(rows, targets, strict=False)]
