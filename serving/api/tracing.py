"""Spans for what happens to a request in the engine, beneath the span that BentoML's middleware has opened for it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from opentelemetry import trace

from serving.api.record import Record
from serving.engine.streams import TokenStream

_NS = 1_000_000_000


def trace_run(record: Record, streams: Sequence[TokenStream]) -> None:
    """Adds the spans of sequences that have ended, if this request is being traced.

    Each sequence has up to three: `yunmin.queue`, `yunmin.prefill` and `yunmin.decode`.

    Args:
        record: of the request.
        streams: its sequences.
    """
    parent = trace.get_current_span()
    if not parent.is_recording():
        return
    parent.set_attributes(
        {
            "yunmin.request_id": record.id,
            "gen_ai.request.model": record.backend.settings.served_name,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.output_tokens": record.completion_tokens,
            "yunmin.cached_tokens": record.cached_tokens,
        }
    )
    tracer = trace.get_tracer("yunmin.serving")
    offset = time.time() - time.monotonic()
    for index, stream in enumerate(streams):
        timings = stream.timings
        end = timings.finished or time.monotonic()
        marks = [timings.submitted, timings.admitted or end, timings.first_token or end, end]
        for name, begin, finish in zip(("queue", "prefill", "decode"), marks, marks[1:], strict=False):
            if begin < finish:
                span = tracer.start_span(
                    f"yunmin.{name}",
                    start_time=int((begin + offset) * _NS),
                    attributes={"yunmin.sequence": index},
                )
                if name == "prefill":
                    span.set_attribute("yunmin.prompt_tokens", stream.prompt_tokens)
                    span.set_attribute("yunmin.cached_tokens", stream.cached_tokens)
                elif name == "decode":
                    span.set_attribute("yunmin.generated_tokens", len(stream.generation.token_ids))
                span.end(int((finish + offset) * _NS))
