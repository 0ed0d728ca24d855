"""What the engine's thread does in a turn: who leaves, who comes, what is read, and one step for all who generate."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from torch import Tensor

from serving.engine.admission import Admission
from serving.engine.batch import DecodeBatch
from serving.engine.job import DeadlineError, EngineStoppedError, SequenceError
from serving.engine.prefix_cache import PrefixCache
from serving.engine.reader import Pace, PromptReader
from serving.engine.sequence import ActiveSequence
from serving.engine.streams import Outbox
from serving.metrics import Metrics
from yunmin.errors import YunminError
from yunmin.generate import Piece
from yunmin.runtime import Runtime
from yunmin.state import MambaState

logger = logging.getLogger("yunmin.serving")


class Scheduler:
    """Owns the runtime, the states and the prefix cache; used by one thread.

    Args:
        runtime: computes.
        admission: lets sequences in.
        metrics: what is counted.
        slots: rows of the decode batch.
        pace: how much is read per turn.
        cache: states of prefixes.
    """

    def __init__(
        self,
        runtime: Runtime,
        admission: Admission,
        metrics: Metrics,
        *,
        slots: int,
        pace: Pace,
        cache: PrefixCache,
    ) -> None:
        self._admission = admission
        self._metrics = metrics
        self._pace = pace
        self._cache = cache
        self._evictions = 0  # of the cache, as last reported
        self._outbox = Outbox()
        self._reader = PromptReader(runtime, cache, metrics)
        self._batch = DecodeBatch(runtime, slots)
        metrics.slots.set(slots)
        metrics.state_bytes.labels("slots").set(self._batch.nbytes)

    @property
    def is_busy(self) -> bool:
        return bool(len(self._reader) or self._batch.sequences)

    def turn(self) -> None:
        """One turn; afterwards every caller can see what it has brought."""
        self._drop_departed()
        for sequence in self._admission.admit():
            self._reader.add(sequence)
        self._read()
        self._outbox.flush()
        self._step()
        self._outbox.flush()
        self.report()

    def dismiss_all(self, reason: str) -> None:
        """Ends everyone, those who wait included, with an `EngineStoppedError`.

        The runtime is left alone: it may be what has failed.
        """

        def stays(sequence: ActiveSequence) -> bool:
            self._end(sequence, "error", EngineStoppedError(reason))
            return False

        self._admission.keep(stays)
        for sequence in (*self._reader.sequences(), *self._batch.sequences):
            stays(sequence)
        self._reader.clear()
        self._batch.sequences.clear()
        self._outbox.flush()
        self.report()

    def report(self) -> None:
        """Brings the gauges up to date."""
        load = self._admission.load
        self._metrics.running.set(load.running)
        self._metrics.waiting.set(load.waiting)
        self._metrics.cache_checkpoints.set(self._cache.checkpoints)
        self._metrics.cache_evictions.inc(self._cache.evictions - self._evictions)
        self._evictions = self._cache.evictions
        self._metrics.state_bytes.labels("prefix_cache").set(self._cache.nbytes)

    def _drop_departed(self) -> None:
        """Frees the slots of callers that have left and of sequences past their deadline."""
        now = time.monotonic()

        def stays(sequence: ActiveSequence) -> bool:
            if sequence.stream.cancelled:
                self._end(sequence, "cancelled")
            elif now >= sequence.deadline:
                self._end(sequence, "deadline", DeadlineError(f"not finished within {sequence.job.deadline_s:g} s"))
            else:
                return True
            return False

        self._each_stays(stays)

    def _each_stays(self, stays: Callable[[ActiveSequence], bool]) -> None:
        """Asks everyone, and lets go of who does not stay."""
        self._admission.keep(stays)
        for sequence in self._reader.sequences():
            if not stays(sequence):
                self._leave_reader(sequence)
        for sequence in list(self._batch.sequences):
            if not stays(sequence):
                self._batch.remove(sequence)

    def _leave_reader(self, sequence: ActiveSequence) -> None:
        """Stops reading its prompt; a sibling takes over."""
        self._reader.remove(sequence)
        self._admission.hand_over(sequence)

    def _read(self) -> None:
        """Reads prompts, as much as one turn may."""
        budget = self._pace.budget(beside_steps=bool(self._batch.sequences))
        while budget > 0 and len(self._reader):
            sequence = self._reader.first()
            begin = time.monotonic()
            try:
                tokens = self._reader.read(sequence, budget)
            except Exception as error:  # noqa: BLE001 (whatever a runtime raises ends this sequence, not the engine)
                self._fail([sequence], error)
                self._leave_reader(sequence)
                continue
            self._pace.saw_reading(tokens, time.monotonic() - begin)
            self._metrics.prompt_tokens.inc(tokens)
            budget -= tokens
            if not sequence.left_to_read:
                self._reader.remove(sequence)
                self._begin(sequence)

    def _begin(self, sequence: ActiveSequence) -> None:
        """Its prompt is read: it joins the batch with its first token, and its siblings are due."""
        state, logits = sequence.state, sequence.logits
        assert state is not None
        assert logits is not None
        self._admission.go_on(sequence, state)
        sequence.state = sequence.logits = None
        if not sequence.job.params.max_tokens:
            self._conclude(sequence, Piece(None, "", "length"), logits, state)
            return
        try:
            self._batch.add(sequence, state)
        except Exception as error:  # noqa: BLE001 (as above)
            self._fail([sequence], error)
            return
        self._advance(sequence, logits)

    def _step(self) -> None:
        """Feeds every generating sequence its last token and samples its next."""
        sequences = list(self._batch.sequences)
        if not sequences:
            return
        begin = time.monotonic()
        try:
            logits = self._batch.step()  # (B, V)
        except Exception as error:  # noqa: BLE001 (as above; the states of all its rows are lost)
            self._batch.sequences.clear()
            self._fail(sequences, error)
            return
        self._pace.saw_step(time.monotonic() - begin)
        for sequence, row in zip(sequences, logits, strict=True):
            self._advance(sequence, row)

    def _advance(self, sequence: ActiveSequence, logits: Tensor) -> None:
        """Samples one token of a sequence in the batch from logits (V,), and sends its piece."""
        if sequence.closing is not None:
            self._leave_batch(sequence, sequence.closing, logits)
            return
        try:
            piece = sequence.stream.generation.advance(logits)
        except Exception as error:  # noqa: BLE001 (as above)
            self._batch.remove(sequence)
            self._fail([sequence], error)
            return
        self._note_token(sequence, piece)
        if piece.token_id is not None:
            sequence.next_id = piece.token_id
        if piece.finish_reason is None:
            self._outbox.put(sequence.stream, piece)
        elif sequence.job.keep and piece.token_id is not None:
            sequence.closing = piece  # its last token is fed with the next step
        else:
            self._leave_batch(sequence, piece, logits)

    def _note_token(self, sequence: ActiveSequence, piece: Piece) -> None:
        now, timings = time.monotonic(), sequence.stream.timings
        if timings.first_token:
            self._metrics.token_gap_s.observe(now - sequence.last_token)
        else:
            timings.first_token = now
            self._metrics.first_token_s.observe(now - timings.submitted)
        sequence.last_token = now
        if piece.token_id is not None:
            self._metrics.generated_tokens.inc()

    def _leave_batch(self, sequence: ActiveSequence, piece: Piece, logits: Tensor) -> None:
        try:
            state = self._batch.state_of(sequence)
        except Exception as error:  # noqa: BLE001 (as above)
            self._fail([sequence], error)
        else:
            self._conclude(sequence, piece, logits, state)
        self._batch.remove(sequence)

    def _conclude(self, sequence: ActiveSequence, piece: Piece, logits: Tensor, state: MambaState) -> None:
        """Keeps what is to be kept of a finished sequence, and sends its last piece.

        Args:
            sequence: finished.
            piece: the last one.
            logits: (V,), after the last token that `state` has read.
            state: of batch size 1, its own memory.
        """
        try:
            self._keep(sequence, piece, logits, state)
        except Exception as error:  # noqa: BLE001 (as above)
            self._fail([sequence], error)
            return
        self._end(sequence, piece.finish_reason or "stop")
        self._outbox.put(sequence.stream, piece)

    def _keep(self, sequence: ActiveSequence, piece: Piece, logits: Tensor, state: MambaState) -> None:
        job = sequence.job
        if job.keep:
            sequence.stream.snapshot = sequence.snapshot(state, logits)
        ids = sequence.token_ids
        unread = piece.token_id is not None and sequence.closing is None
        read = len(ids) - 1 if unread else len(ids)
        if job.use_cache and job.start is None and read > len(job.prompt_ids):
            # the next turn of a conversation begins with this one
            self._cache.put(ids[:read], state, logits.clone())

    def _fail(self, sequences: Sequence[ActiveSequence], error: Exception) -> None:
        logger.error("%d sequence(s) failed: %s", len(sequences), error, exc_info=error)
        reason = str(error) if isinstance(error, YunminError) else "the server's log has the reason"
        for sequence in sequences:
            self._end(sequence, "error", SequenceError(f"the model failed on this sequence: {reason}"))

    def _end(self, sequence: ActiveSequence, outcome: str, error: YunminError | None = None) -> None:
        """Gives the slot back, counts, and tells the caller of an error."""
        timings = sequence.stream.timings
        timings.finished = time.monotonic()
        self._admission.leave(sequence)
        self._metrics.requests.labels(outcome).inc()
        self._metrics.request_s.observe(timings.finished - timings.submitted)
        if error is not None:
            self._outbox.put(sequence.stream, error)
