"""Figures of the server for Prometheus. Each server has its own registry."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from dsmoe_local.engine.load.machine import resident_memory
from dsmoe_local.protocol.replies import Reply
from dsmoe_local.serve.models import Models

_FIRST_TOKEN = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SPEEDS = (1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """Counts what the server does. `/metrics` shows it.

    `running` and `queued` return how many replies are decoded, and how many wait for a slot.
    """

    def __init__(self, models: Models, running: Callable[[], int], queued: Callable[[], int]) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter("dsmoe_requests", "Requests, by HTTP status.", ["status"], registry=registry)
        self._prompt = Counter("dsmoe_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._cached = Counter(
            "dsmoe_cached_tokens", "Tokens of prompts that were in the KV cache.", registry=registry
        )
        self._generated = Counter("dsmoe_generated_tokens", "Generated tokens.", registry=registry)
        self._first = Histogram(
            "dsmoe_time_to_first_token_seconds",
            "Time from a request to its first token.",
            buckets=_FIRST_TOKEN,
            registry=registry,
        )
        self._speed = Histogram(
            "dsmoe_tokens_per_second", "Decoding speed of a reply.", buckets=_SPEEDS, registry=registry
        )
        gauges = {
            "dsmoe_replies_running": ("Replies that are decoded.", running),
            "dsmoe_replies_queued": ("Replies that wait for a slot.", queued),
            "dsmoe_models_loaded": ("Models in memory.", lambda: len(models.loaded)),
            "dsmoe_engine_crashes": (
                "Engine processes of loaded models that crashed and were replaced.",
                lambda: sum(model.engine.crashes for model in models.loaded),
            ),
            "dsmoe_engine_resident_bytes": (
                "Resident memory of the engine processes.",
                lambda: sum(resident_memory(model.engine.pid) for model in models.loaded),
            ),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=registry).set_function(value)
        # Memory, CPU time and open files of this process, where the system has /proc.
        ProcessCollector(namespace="dsmoe_server", registry=registry)

    def count_request(self, status: int) -> None:
        """Count a request."""
        self._requests.labels(str(status)).inc()

    def count_reply(self, reply: Reply, first_seconds: float | None) -> None:
        """Count the tokens and times of a reply."""
        self._prompt.inc(reply.n_prompt_tokens)
        self._cached.inc(reply.n_cached_tokens)
        self._generated.inc(reply.n_completion_tokens)
        if first_seconds is not None:
            self._first.observe(first_seconds)
        for usage in reply.usages:
            if usage.tokens_per_second:
                self._speed.observe(usage.tokens_per_second)

    def text(self) -> bytes:
        """Return all figures in Prometheus's text format."""
        return generate_latest(self._registry)
