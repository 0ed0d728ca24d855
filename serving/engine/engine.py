"""The serving engine: sequences that advance together, one decode step at a time.

It knows token ids and states, not HTTP. One thread owns the runtime, the states and the prefix cache; asyncio code
submits and reads. Each turn of the thread lets in who waits, reads some of the prompts, and steps everyone who is
generating, so that a long prompt delays the others by little at a time.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from serving.engine.batch import DecodeBatch
from serving.engine.job import DeadlineError, EngineStoppedError, Job, Load, QueueFullError, SequenceError
from serving.engine.prefix_cache import PrefixCache
from serving.engine.reader import Pace, PromptReader
from serving.engine.sequence import ActiveSequence
from serving.engine.streams import Outbox, TokenStream
from serving.engine.waiting import WaitingLine
from serving.metrics import Metrics
from yunmin.errors import YunminError
from yunmin.generate import Generation, Piece
from yunmin.runtime import Runtime
from yunmin.sampling import SamplingParams
from yunmin.state import MambaState
from yunmin.tokenizer import Tokenizer

logger = logging.getLogger("yunmin.serving")

_LONGEST_RETRY_S = 60


class Engine:
    """Generates for many callers at once.

    A sequence's tokens depend neither on its neighbours nor on what the prefix cache holds: each row of a step is its
    own sequence, and each samples with its own generator. (With the native runtime to the last bit; torch's products
    depend on their number of rows, by rounding.)

    Args:
        runtime: computes; used by the engine's thread only.
        tokenizer: None gives ids without text.
        slots: sequences that may be read or generate at once.
        queue: sequences that may wait beyond those.
        metrics: what is counted.
        prefill_chunk: most prompt tokens read per turn.
        decode_stall: by how much of itself a decode step may be delayed by prompts that are read beside it.
        cache_bytes: budget of the prefix cache; 0 keeps nothing.
        cache_interval: tokens between two of its checkpoints in a long prompt.
    """

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer | None,
        *,
        slots: int,
        queue: int,
        metrics: Metrics,
        prefill_chunk: int = 256,
        decode_stall: float = 1.0,
        cache_bytes: int = 0,
        cache_interval: int = 1024,
    ) -> None:
        self._runtime = runtime
        self._tokenizer = tokenizer
        self._slots = slots
        self._queue = queue
        self._metrics = metrics
        self._changed = threading.Condition()  # re-entrant; guards the five below
        self._line = WaitingLine()
        self._free = slots
        self._draining = False
        self._stopping = False
        self._typical_s = 1.0  # how long a request holds its slot, a moving average
        # the rest belongs to the thread
        self._outbox = Outbox()
        self._cache = PrefixCache(cache_bytes, cache_interval)
        self._pace = Pace(prefill_chunk, decode_stall)
        self._reader = PromptReader(runtime, self._cache, metrics)
        self._batch = DecodeBatch(runtime, slots)
        self._thread = threading.Thread(target=self._work, name="yunmin-engine", daemon=True)
        metrics.slots.set(slots)
        metrics.state_bytes.labels("slots").set(self._batch.nbytes)

    def start(self) -> None:
        self._thread.start()

    def drain(self) -> None:
        """Refuses newcomers from here on; who is here may finish."""
        with self._changed:
            self._draining = True

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
    def accepting(self) -> bool:
        """Whether a newcomer would be let in, if there is room."""
        return self.is_alive and not self._draining

    @property
    def is_busy(self) -> bool:
        """Whether anyone runs or waits."""
        return self.is_alive and self.load != Load(0, 0)

    @property
    def load(self) -> Load:
        with self._changed:
            return Load(self._slots - self._free, self._line.count)

    def submit(self, job: Job) -> TokenStream:
        """Queues a sequence; called on an event loop.

        Raises:
            QueueFullError: there is no room.
            EngineStoppedError: the engine does not run, or is shutting down.
        """
        return self.submit_all(job, [job.params])[0]

    def submit_all(self, job: Job, params: Sequence[SamplingParams]) -> list[TokenStream]:
        """Queues sequences of one prompt, which is read once.

        Args:
            job: what they share.
            params: of each of them, in place of the job's.

        Raises:
            QueueFullError: there is no room for all of them.
            EngineStoppedError: the engine does not run, or is shutting down.
        """
        sequences = [self._sequence(replace(job, params=own)) for own in params]
        with self._changed:
            if not self.accepting:
                raise EngineStoppedError("the engine is shutting down" if self._draining else "the engine does not run")
            if self._line.count + len(sequences) > self._queue + self._free:
                self._metrics.requests.labels("refused").inc()
                turns = (self._line.count + len(sequences)) / self._slots
                raise QueueFullError(min(_LONGEST_RETRY_S, max(1, math.ceil(self._typical_s * turns))))
            sequences[0].siblings = sequences[1:]
            self._line.add(sequences[0])
            self._changed.notify()
        return [sequence.stream for sequence in sequences]

    def _sequence(self, job: Job) -> ActiveSequence:
        sampler_state = None if job.start is None or job.params.seed is not None else job.start.sampler_state
        generation = Generation(job.params, job.prompt_ids, self._runtime.config, self._tokenizer, sampler_state)
        return ActiveSequence(job, TokenStream(generation, len(job.prompt_ids), self._notify))

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify()

    def _work(self) -> None:
        reason = "the engine is shutting down"
        try:
            while self._wait_for_work():
                self._drop_departed()
                self._admit()
                self._read()
                self._outbox.flush()
                self._step()
                self._outbox.flush()
                self._report()
        except Exception:
            reason = "the engine has failed"
            logger.exception("the engine's thread has died")
        finally:
            with self._changed:
                self._stopping = True
            self._each_stays(lambda sequence: self._dismiss(sequence, EngineStoppedError(reason)))
            self._outbox.flush()
            self._report()

    def _dismiss(self, sequence: ActiveSequence, error: EngineStoppedError) -> bool:
        self._end(sequence, "error", error)
        return False

    def _wait_for_work(self) -> bool:
        """Sleeps while there is nothing to do; false when it is time to stop."""
        with self._changed:
            while not (self._stopping or self._line.count or len(self._reader) or self._batch.sequences):
                self._changed.wait()
            return not self._stopping

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
        with self._changed:
            self._line.keep(stays)
        for sequence in self._reader.sequences():
            if not stays(sequence):
                self._leave_reader(sequence)
        for sequence in list(self._batch.sequences):
            if not stays(sequence):
                self._batch.remove(sequence)

    def _leave_reader(self, sequence: ActiveSequence) -> None:
        """Stops reading its prompt; a sibling takes over."""
        self._reader.remove(sequence)
        with self._changed:
            self._line.hand_over(sequence)

    def _admit(self) -> None:
        admitted = []
        with self._changed:
            while self._free and (sequence := self._line.pop()) is not None:
                self._free -= 1
                sequence.admitted = True
                sequence.stream.timings.admitted = time.monotonic()
                admitted.append(sequence)
        for sequence in admitted:
            self._reader.add(sequence)

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
        with self._changed:
            self._line.go_on(sequence, state)
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
        try:
            if sequence.closing is not None:
                self._conclude(sequence, sequence.closing, logits, self._batch.state_of(sequence))
                self._batch.remove(sequence)
                return
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
            self._conclude(sequence, piece, logits, self._batch.state_of(sequence))
            self._batch.remove(sequence)

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

    def _conclude(self, sequence: ActiveSequence, piece: Piece, logits: Tensor, state: MambaState) -> None:
        """Keeps what is to be kept of a finished sequence, and sends its last piece.

        Args:
            sequence: finished.
            piece: the last one.
            logits: (V,), after the last token that `state` has read.
            state: of batch size 1, its own memory.
        """
        job, stream = sequence.job, sequence.stream
        if job.keep:
            stream.snapshot = sequence.snapshot(state, logits)
        ids = sequence.token_ids
        unread = piece.token_id is not None and sequence.closing is None
        read = len(ids) - 1 if unread else len(ids)
        if job.use_cache and job.start is None and read > len(job.prompt_ids):
            # the next turn of a conversation begins with this one
            self._cache.put(ids[:read], state, logits.clone())
        self._end(sequence, piece.finish_reason or "stop")
        self._outbox.put(stream, piece)

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
            if sequence.admitted:
                self._free += 1
                self._typical_s += 0.2 * (timings.finished - timings.admitted - self._typical_s)
        self._metrics.requests.labels(outcome).inc()
        self._metrics.request_s.observe(timings.finished - timings.submitted)
        if error is not None:
            self._outbox.put(sequence.stream, error)

    def _report(self) -> None:
        load = self.load
        self._metrics.running.set(load.running)
        self._metrics.waiting.set(load.waiting)
        self._metrics.cache_checkpoints.set(self._cache.checkpoints)
        self._metrics.state_bytes.labels("prefix_cache").set(self._cache.nbytes)
