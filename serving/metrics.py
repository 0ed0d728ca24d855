"""What a server counts, in Prometheus' terms."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_REQUEST_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_GAP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
_STORE_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)


class Metrics:
    """The engine's counters, gauges and histograms.

    Args:
        registry: to register with; tests give each engine its own.

    Attributes:
        requests: sequences by how they ended: stop, length, cancelled, deadline, error, refused.
        prompt_tokens: tokens read.
        generated_tokens: tokens sampled, without the end-of-text token.
        running, waiting, slots: sequences with a slot, without one, and how many slots there are.
        first_token_s: from arrival to the first token.
        token_gap_s: between two tokens of one sequence.
        request_s: from arrival to the end.
        cache_lookups: in the prefix cache by what they found; see `serving.engine.prefix_cache.Outcome`.
        cache_tokens: prompt tokens that were not read again.
        cache_checkpoints: in the prefix cache.
        cache_evictions: of checkpoints that gave way to others.
        state_bytes: memory of states by place: slots, prefix_cache.
        http_requests: answered over HTTP, by path (as the routes have it, so that there are only so many) and status.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter("yunmin_requests", "Sequences by how they ended", ["outcome"], registry=registry)
        self.prompt_tokens = Counter("yunmin_prompt_tokens", "Prompt tokens read", registry=registry)
        self.generated_tokens = Counter("yunmin_generated_tokens", "Tokens generated", registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            # one engine per server: after a restart the value of the process before it must not be added
            return Gauge(name, text, registry=registry, multiprocess_mode="mostrecent")

        self.running = gauge("yunmin_running_sequences", "Sequences that hold a state slot")
        self.waiting = gauge("yunmin_waiting_sequences", "Requests waiting for a state slot")
        self.slots = gauge("yunmin_state_slots", "State slots in the pool")
        self.first_token_s = Histogram(
            "yunmin_time_to_first_token_seconds",
            "Time from arrival to the first token",
            registry=registry,
            buckets=_TTFT_BUCKETS_S,
        )
        self.token_gap_s = Histogram(
            "yunmin_inter_token_seconds",
            "Time between two tokens of one sequence",
            registry=registry,
            buckets=_GAP_BUCKETS_S,
        )
        self.request_s = Histogram(
            "yunmin_request_seconds", "Time from arrival to the end", registry=registry, buckets=_REQUEST_BUCKETS_S
        )
        self.cache_lookups = Counter(
            "yunmin_prefix_cache_lookups", "Lookups by what they found", ["outcome"], registry=registry
        )
        self.cache_tokens = Counter(
            "yunmin_prefix_cache_tokens", "Prompt tokens that were not read again", registry=registry
        )
        self.cache_evictions = Counter(
            "yunmin_prefix_cache_evictions", "States that gave way to others", registry=registry
        )
        self.cache_checkpoints = gauge("yunmin_prefix_cache_checkpoints", "States that the prefix cache holds")
        self.http_requests = Counter(
            "yunmin_http_requests", "HTTP requests by path and status", ["path", "status"], registry=registry
        )
        self.state_bytes = Gauge(
            "yunmin_state_bytes",
            "Memory of states by place",
            ["place"],
            registry=registry,
            multiprocess_mode="mostrecent",
        )


class SessionMetrics:
    """What is counted of sessions.

    Args:
        registry: to register with; tests give each keeper its own.

    Attributes:
        sessions: kept by the store.
        state_bytes: of their states.
        save_s: until a version is where it survives.
        restore_s: from the request to a snapshot to go on from.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.sessions = Gauge(
            "yunmin_sessions", "Sessions that are kept", registry=registry, multiprocess_mode="mostrecent"
        )
        self.state_bytes = Gauge(
            "yunmin_session_bytes", "States of sessions", registry=registry, multiprocess_mode="mostrecent"
        )
        self.save_s = Histogram(
            "yunmin_session_save_seconds", "Time to save a session", registry=registry, buckets=_STORE_BUCKETS_S
        )
        self.restore_s = Histogram(
            "yunmin_session_restore_seconds", "Time to restore a session", registry=registry, buckets=_STORE_BUCKETS_S
        )
