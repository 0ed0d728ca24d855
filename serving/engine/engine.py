"""The serving engine: sequences that advance together, one decode step at a time, over a pool of state slots.

It knows token ids and states, not HTTP. One thread owns the runtime and the pool; asyncio code submits and reads.
Each turn of the thread lets in who waits, reads one chunk of one prompt, and steps everyone who is generating, so a
long prompt delays the others by one chunk at most.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from serving.engine.streams import (
    ActiveSequence,
    DeadlineError,
    EngineStoppedError,
    QueueFullError,
    SequenceError,
    TokenStream,
)
from serving.metrics import Metrics
from yunmin.errors import YunminError
from yunmin.generate import Generation
from yunmin.runtime import Runtime
from yunmin.sampling import SamplingParams
from yunmin.state import MambaState
from yunmin.tokenizer import Tokenizer

logger = logging.getLogger("yunmin.serving")

_LONGEST_RETRY_S = 60


@dataclass(frozen=True)
class Load:
    """How busy an engine is.

    Attributes:
        running: sequences that hold a slot.
        waiting: sequences that do not yet.
    """

    running: int
    waiting: int


class Engine:
    """Generates for many callers at once.

    A sequence's tokens do not depend on its neighbours: prompts are read in chunks of a fixed length, each row of a
    step is its own sequence, and each samples with its own generator.

    Args:
        runtime: computes; used by the engine's thread only.
        tokenizer: None gives ids without text.
        slots: sequences that may hold a state at once.
        queue: sequences that may wait beyond those.
        prefill_chunk: prompt tokens read per turn.
        metrics: what is counted.
    """

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer | None,
        *,
        slots: int,
        queue: int,
        prefill_chunk: int,
        metrics: Metrics,
    ) -> None:
        self._runtime = runtime
        self._tokenizer = tokenizer
        self._slots = slots
        self._queue = queue
        self._chunk = prefill_chunk
        self._metrics = metrics
        self._pool = runtime.new_state(slots)
        self._changed = threading.Condition()  # re-entrant; guards the four below
        self._waiting: deque[ActiveSequence] = deque()
        self._free = list(range(slots))
        self._stopping = False
        self._typical_s = 1.0  # how long a request holds its slot, a moving average
        self._reading: deque[ActiveSequence] = deque()
        self._running: list[ActiveSequence] = []
        # the states of `_batched`, row by row; newer than the pool's, to which they return when membership changes
        self._batched: list[ActiveSequence] = []
        self._batch: MambaState | None = None
        self._thread = threading.Thread(target=self._work, name="yunmin-engine", daemon=True)
        metrics.slots.set(slots)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends every sequence with an `EngineStoppedError` and waits for the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    @property
    def load(self) -> Load:
        with self._changed:
            return Load(self._slots - len(self._free), len(self._waiting))

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, deadline_s: float) -> TokenStream:
        """Queues a sequence; called on an event loop.

        Args:
            prompt_ids: at least one, all below the vocabulary's size.
            params: how to choose and when to stop.
            deadline_s: seconds from now after which it ends with a `DeadlineError`.

        Raises:
            QueueFullError: there is no room.
            EngineStoppedError: the engine does not run.
        """
        generation = Generation(params, prompt_ids, self._runtime.config, self._tokenizer)
        stream = TokenStream(generation, len(prompt_ids), self._notify)
        with self._changed:
            if not self.is_alive:
                raise EngineStoppedError("the engine does not run")
            if len(self._waiting) >= self._queue + len(self._free):
                self._metrics.requests.labels("refused").inc()
                turns = (len(self._waiting) + 1) / self._slots
                raise QueueFullError(min(_LONGEST_RETRY_S, max(1, math.ceil(self._typical_s * turns))))
            self._waiting.append(ActiveSequence(stream, prompt_ids, stream.timings.submitted + deadline_s))
            self._changed.notify()
        return stream

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify()

    def _work(self) -> None:
        reason = "the engine is shutting down"
        try:
            while self._wait_for_work():
                self._drop_departed()
                self._admit()
                self._read_chunk()
                self._step()
                self._report()
        except Exception:
            reason = "the engine has failed"
            logger.exception("the engine's thread has died")
        finally:
            with self._changed:
                self._stopping = True
                remaining = [*self._running, *self._reading, *self._waiting]
                self._waiting.clear()
            for sequence in remaining:
                self._end(sequence, "error", EngineStoppedError(reason))
            self._running, self._reading = [], deque()
            self._report()

    def _wait_for_work(self) -> bool:
        """Sleeps while there is nothing to do; false when it is time to stop."""
        with self._changed:
            while not (self._stopping or self._waiting or self._reading or self._running):
                self._changed.wait()
            return not self._stopping

    def _drop_departed(self) -> None:
        """Frees the slots of callers that have left and of sequences past their deadline."""
        now = time.monotonic()

        def stays(sequence: ActiveSequence) -> bool:
            if sequence.stream.cancelled:
                self._end(sequence, "cancelled")
            elif now >= sequence.deadline:
                seconds = sequence.deadline - sequence.stream.timings.submitted
                self._end(sequence, "deadline", DeadlineError(f"not finished within {seconds:g} s"))
            else:
                return True
            return False

        with self._changed:
            self._waiting = deque(s for s in self._waiting if stays(s))
        self._reading = deque(s for s in self._reading if stays(s))
        self._running = [s for s in self._running if stays(s)]

    def _admit(self) -> None:
        with self._changed:
            while self._free and self._waiting:
                sequence = self._waiting.popleft()
                sequence.slot = self._free.pop()
                sequence.stream.timings.admitted = time.monotonic()
                self._reading.append(sequence)

    def _read_chunk(self) -> None:
        """Reads one chunk of one prompt; prompts take turns, so that a short one need not wait for a long one."""
        if not self._reading:
            return
        sequence = self._reading.popleft()
        chunk = sequence.prompt_ids[sequence.read : sequence.read + self._chunk]
        try:
            logits, sequence.state = self._runtime.prefill(chunk, sequence.state)
            sequence.read += len(chunk)
            if sequence.read < len(sequence.prompt_ids):
                self._reading.append(sequence)
                return
            self._runtime.scatter(self._pool, [sequence.slot], sequence.state)
        except Exception as error:  # noqa: BLE001 (whatever a runtime raises ends this sequence, not the engine)
            self._fail([sequence], error)
            return
        sequence.state = None
        self._metrics.prompt_tokens.inc(sequence.read)
        if self._advance(sequence, logits):
            self._running.append(sequence)

    def _step(self) -> None:
        """Feeds every generating sequence its last token and samples its next."""
        if not self._running:
            return
        try:
            batch = self._current_batch()
            logits, self._batch = self._runtime.step([s.next_id for s in self._running], batch)  # (B, V)
            logits = logits.float().cpu()  # one copy for all rows
        except Exception as error:  # noqa: BLE001 (as above; the states of all its rows are lost)
            failed, self._running, self._batched, self._batch = self._running, [], [], None
            self._fail(failed, error)
            return
        self._running = [s for s, row in zip(self._running, logits, strict=True) if self._advance(s, row)]

    def _current_batch(self) -> MambaState:
        """The states of the running sequences, moved through the pool only when membership has changed."""
        if self._batch is None or self._batched != self._running:
            running = set(self._running)
            kept = [(row, s.slot) for row, s in enumerate(self._batched) if s in running]
            if kept and self._batch is not None:
                rows, slots = zip(*kept, strict=True)
                self._runtime.scatter(self._pool, slots, self._runtime.gather(self._batch, rows))
            self._batch = self._runtime.gather(self._pool, [s.slot for s in self._running])
            self._batched = list(self._running)
        return self._batch

    def _advance(self, sequence: ActiveSequence, logits: Tensor) -> bool:
        """Samples one token and sends its piece; true while the sequence goes on."""
        try:
            piece = sequence.advance(logits)
        except Exception as error:  # noqa: BLE001 (as above)
            self._fail([sequence], error)
            return False
        now, timings = time.monotonic(), sequence.stream.timings
        if timings.first_token:
            self._metrics.token_gap_s.observe(now - sequence.last_token)
        else:
            timings.first_token = now
            self._metrics.first_token_s.observe(now - timings.submitted)
        sequence.last_token = now
        if piece.token_id is not None:
            self._metrics.generated_tokens.inc()
        if piece.finish_reason is None:
            sequence.stream.put(piece)
            return True
        self._end(sequence, piece.finish_reason)
        sequence.stream.put(piece)
        return False

    def _fail(self, sequences: Sequence[ActiveSequence], error: Exception) -> None:
        logger.error("%d sequence(s) failed: %s", len(sequences), error, exc_info=error)
        reason = str(error) if isinstance(error, YunminError) else "the server's log has the reason"
        for sequence in sequences:
            self._end(sequence, "error", SequenceError(f"the model failed on this sequence: {reason}"))

    def _end(self, sequence: ActiveSequence, outcome: str, error: YunminError | None = None) -> None:
        """Gives the slot back, counts, and tells the caller of an error."""
        timings = sequence.stream.timings
        timings.finished = time.monotonic()
        with self._changed:
            if sequence.slot >= 0:
                self._free.append(sequence.slot)
                self._typical_s += 0.2 * (timings.finished - timings.admitted - self._typical_s)
        self._metrics.requests.labels(outcome).inc()
        if error is not None:
            sequence.stream.put(error)

    def _report(self) -> None:
        load = self.load
        self._metrics.running.set(load.running)
        self._metrics.waiting.set(load.waiting)
