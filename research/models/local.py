"""A model in this process, with many sequences at a time: whole ones to score, the server's engine to generate."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from research.models.model import Progress, Scored, TokenIds, no_progress
from yunmin.errors import DataError, MissingExtraError, TokenizerError, YunminError
from yunmin.language_model import LanguageModel
from yunmin.sampling import SamplingParams
from yunmin.tokenizer import Tokenizer

_CHUNK = 2048  # tokens of one sequence read at once; what is longer is read on from its state
_LOGITS = 1 << 28  # most numbers of logits at once: 1 GiB
_CACHE_BYTES = 1 << 28  # of states of prefixes, which few-shot prompts share
_NO_DEADLINE_S = 1e9


class LocalModel:
    """A loaded model as a `TextModel`.

    Args:
        model: to run; has a tokenizer.
        batch_size: sequences at a time.
        progress: told how far it is.

    Raises:
        TokenizerError: it has none.
    """

    def __init__(self, model: LanguageModel, *, batch_size: int = 16, progress: Progress = no_progress) -> None:
        if model.tokenizer is None:
            raise TokenizerError(f"{model.folder}: no tokenizer.json, so text cannot be scored")
        self.name = str(model.folder)
        self.tokenizer: Tokenizer = model.tokenizer
        self._model = model
        self._batch_size = batch_size
        self._progress = progress

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
        """As `TextModel.complete`, through the serving engine.

        Raises:
            RequestError: an impossible parameter; names it.
            MissingExtraError: prometheus-client is not installed.
        """
        params = SamplingParams(max_tokens, temperature, top_p=top_p, seed=seed, stop=tuple(stop))
        empty = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        ids = [self._model.encode(found or empty) for found in self.tokenizer.encode_batch(prompts)]
        return asyncio.run(self._complete(ids, params, n))

    async def _complete(self, prompts: list[list[int]], params: SamplingParams, n: int) -> list[list[str]]:
        try:
            from prometheus_client import CollectorRegistry  # the engine counts with it
        except ModuleNotFoundError:
            raise MissingExtraError(
                "prometheus_client", "research", "generating with a model in this process"
            ) from None
        from serving.engine.engine import Engine
        from serving.engine.job import Job
        from serving.metrics import Metrics

        engine = Engine(
            self._model.runtime,
            self.tokenizer,
            slots=self._batch_size,
            queue=2 * self._batch_size + n,
            metrics=Metrics(CollectorRegistry()),
            prefill_chunk=_CHUNK,
            decode_stall=_NO_DEADLINE_S,  # nobody waits for a next token here
            cache_bytes=_CACHE_BYTES,
        )
        room = asyncio.Semaphore(max(1, 2 * self._batch_size // n))
        done = 0

        async def completions(index: int, prompt_ids: list[int]) -> list[str]:
            nonlocal done
            seed = params.seed
            own = [replace(params, seed=None if seed is None else seed + index * n + copy) for copy in range(n)]
            async with room:
                streams = engine.submit_all(Job(prompt_ids, params, _NO_DEADLINE_S), own)
                texts = ["".join([piece.text async for piece in stream]) for stream in streams]
            done += 1
            self._progress("prompts", done, len(prompts))
            return texts

        engine.start()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(completions(i, ids)) for i, ids in enumerate(prompts)]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            await asyncio.to_thread(engine.stop)
        return [task.result() for task in tasks]

    def score(self, sequences: Sequence[TokenIds], first: Sequence[int] | None = None) -> list[Scored]:
        """As `TextModel.score`; long sequences are read piece by piece, with the state carried on."""
        starts = [1] * len(sequences) if first is None else first
        for ids, begin in zip(sequences, starts, strict=True):
            if not 1 <= begin < len(ids):
                raise DataError(f"scoring a sequence of {len(ids)} tokens from {begin}: expected one in 1..{len(ids)}")
        found: dict[int, Scored] = {}
        for batch in self._batches(sequences):
            scored = self._score([sequences[i] for i in batch], [starts[i] for i in batch])
            found.update(zip(batch, scored, strict=True))
            self._progress("sequences", len(found), len(sequences))
        return [found[i] for i in range(len(sequences))]

    def _batches(self, sequences: Sequence[TokenIds]) -> Iterator[list[int]]:
        """Sequences of like length, as many as memory has room for; long ones alone."""
        batch: list[int] = []
        vocabulary = self._model.config.vocab_size
        for index in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
            length = len(sequences[index if not batch else batch[0]])
            rows = 1 if length > _CHUNK else min(self._batch_size, max(1, _LOGITS // (length * vocabulary)))
            if len(batch) >= rows:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    @torch.inference_mode()
    def _score(self, rows: list[TokenIds], starts: list[int]) -> Iterator[Scored]:
        """Scores a batch, the longest first: what pads the others stands behind them, where they cannot see it."""
        if len(rows[0]) - 1 > _CHUNK:
            yield self._score_long(rows[0], starts[0])
            return
        inputs = torch.zeros(len(rows), len(rows[0]) - 1, dtype=torch.int64)
        for row, ids in enumerate(rows):
            inputs[row, : len(ids) - 1] = torch.as_tensor(ids[:-1])
        logits = self._model.runtime.forward(inputs)  # (B, L, V)
        for row, (ids, begin) in enumerate(zip(rows, starts, strict=True)):
            yield self._scored(logits[row, begin - 1 : len(ids) - 1], ids[begin:])

    def _score_long(self, ids: TokenIds, begin: int) -> Scored:
        state, parts = None, []
        for start in range(0, len(ids) - 1, _CHUNK):
            end = min(start + _CHUNK, len(ids) - 1)
            logits, state = self._model.runtime.score(ids[start:end], state)  # (L, V)
            skipped = max(0, begin - 1 - start)
            if start + skipped < end:
                parts.append(self._scored(logits[skipped:], ids[start + skipped + 1 : end + 1]))
        return Scored(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("logprobs", "greedy")))

    def _scored(self, logits: Tensor, targets: TokenIds) -> Scored:
        """Of logits (n, V) and the tokens that follow."""
        logits = logits[:, : self._model.config.n_tokens].float()
        wanted = torch.as_tensor(targets, device=logits.device)[:, None]
        picked = logits.gather(1, wanted)[:, 0]
        logprobs = picked - torch.logsumexp(logits, 1)
        if bool(logprobs.isnan().any()):
            raise YunminError(f"{self.name}: the model gave logits that are not finite")
        greedy = picked >= logits.amax(1)
        return Scored(logprobs.double().cpu().numpy(), greedy.cpu().numpy())
