"""The serving engine: sequences that advance together, one decode step at a time.

It knows token ids and states, not HTTP. One thread owns the runtime, the states and the prefix cache; asyncio code
submits and reads. Each turn of the thread lets in who waits, reads some of the prompts, and steps everyone who is
generating, so that a long prompt delays the others by little at a time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace

from serving.engine.admission import Admission
from serving.engine.job import Job, Load, QueueFullError
from serving.engine.prefix_cache import PrefixCache
from serving.engine.reader import Pace
from serving.engine.scheduler import Scheduler
from serving.engine.sequence import ActiveSequence
from serving.engine.streams import TokenStream
from serving.metrics import Metrics
from yunmin.generate import Generation
from yunmin.runtime import Runtime
from yunmin.sampling import SamplingParams
from yunmin.tokenizer import Tokenizer

logger = logging.getLogger("yunmin.serving")

_SHUTTING_DOWN = "the engine is shutting down"


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
        decode_stall: float = 0.75,
        cache_bytes: int = 0,
        cache_interval: int = 1024,
    ) -> None:
        self._runtime = runtime
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._admission = Admission(slots, queue)
        self._scheduler = Scheduler(
            runtime,
            self._admission,
            metrics,
            slots=slots,
            pace=Pace(prefill_chunk, decode_stall),
            cache=PrefixCache(cache_bytes, cache_interval),
        )
        self._thread = threading.Thread(target=self._work, name="yunmin-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def drain(self) -> None:
        """Refuses newcomers from here on; who is here may finish."""
        self._admission.drain()

    def stop(self) -> None:
        """Ends every sequence with an `EngineStoppedError` and waits for the thread."""
        self._admission.stop(_SHUTTING_DOWN)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._admission.is_stopped

    @property
    def accepting(self) -> bool:
        """Whether a newcomer would be let in, if there is room."""
        return self.is_alive and self._admission.is_open

    @property
    def is_draining(self) -> bool:
        """Whether newcomers are refused because the server is to end."""
        return self._admission.is_draining

    @property
    def metrics(self) -> Metrics:
        """What is counted; an engine that takes over goes on counting there."""
        return self._metrics

    @property
    def is_busy(self) -> bool:
        """Whether anyone runs or waits."""
        return self.is_alive and self.load != Load(0, 0)

    @property
    def load(self) -> Load:
        return self._admission.load

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
        try:
            self._admission.enter(sequences)
        except QueueFullError:
            self._metrics.requests.labels("refused").inc()
            raise
        return [sequence.stream for sequence in sequences]

    def _sequence(self, job: Job) -> ActiveSequence:
        sampler_state = None if job.start is None or job.params.seed is not None else job.start.sampler_state
        generation = Generation(job.params, job.prompt_ids, self._runtime.config, self._tokenizer, sampler_state)
        return ActiveSequence(job, TokenStream(generation, len(job.prompt_ids), self._admission.notify))

    def _work(self) -> None:
        reason = _SHUTTING_DOWN
        try:
            while self._admission.wait(lambda: self._scheduler.is_busy):
                self._scheduler.turn()
        except Exception:
            reason = "the engine has failed"
            logger.exception("the engine's thread has died")
        finally:
            self._admission.stop(reason)
            self._scheduler.dismiss_all(reason)
