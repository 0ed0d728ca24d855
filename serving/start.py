"""From a model and settings to a running engine, for whatever carries its requests: HTTP, files, Triton."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from serving.engine.engine import Engine
from serving.metrics import Metrics
from serving.settings import Settings
from yunmin.language_model import LanguageModel


def start_engine(model: LanguageModel, settings: Settings, counted: CollectorRegistry | Metrics) -> Engine:
    """An engine that runs as the settings say, whose first request finds everything compiled.

    Args:
        model: to generate with.
        settings: slots, queue, chunks, cache.
        counted: where its metrics are registered, or those of the engine that it takes over from.
    """
    engine = Engine(
        model.runtime,
        model.tokenizer,
        slots=settings.slots,
        queue=settings.queue,
        metrics=counted if isinstance(counted, Metrics) else Metrics(counted),
        prefill_chunk=settings.prefill_chunk,
        decode_stall=settings.decode_stall,
        cache_bytes=settings.cache_bytes,
        cache_interval=settings.cache_interval,
    )
    model.generate([0], max_tokens=2, temperature=1.0, seed=0)
    engine.start()
    return engine
