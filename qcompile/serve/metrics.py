"""What /metrics tells Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

if TYPE_CHECKING:
    from qcompile.runtime import Engine

_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


class ServerMetrics:
    """Counters of one server, in a registry of their own. Names begin with `qcompile_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.requests = Counter(
            "qcompile_requests",
            "Requests by path and HTTP status; 499: the client left before the answer",
            ("path", "status"),
            registry=self.registry,
        )
        self.disconnects = self._counter("disconnects", "Answers that a client left before their end")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of ended generations")
        self.reused_tokens = self._counter("reused_prompt_tokens", "Prompt tokens that were still in the KV cache")
        self.generated_tokens = self._counter("generated_tokens", "Tokens generated")
        self.ttft = Histogram(
            "qcompile_time_to_first_token_seconds",
            "From the arrival of a request to its first token",
            buckets=_TTFT_BUCKETS,
            registry=self.registry,
        )
        self.token_time = Histogram(
            "qcompile_time_per_output_token_seconds",
            "Between two tokens of one answer",
            buckets=_TOKEN_BUCKETS,
            registry=self.registry,
        )

    def watch(self, engine: Engine) -> None:
        """Read the engine's gauges whenever Prometheus asks."""
        running = Gauge("qcompile_requests_running", "Generations that hold a KV slot", registry=self.registry)
        running.set_function(lambda: engine.num_running)
        waiting = Gauge("qcompile_requests_waiting", "Generations that wait for a slot", registry=self.registry)
        waiting.set_function(lambda: engine.num_waiting)
        used = Gauge("qcompile_kv_tokens_used", "KV entries that running requests fill", registry=self.registry)
        used.set_function(lambda: engine.kv_usage[0])
        reserved = Gauge(
            "qcompile_kv_tokens_reserved", "KV entries that memory is set aside for", registry=self.registry
        )
        reserved.set_function(lambda: engine.kv_usage[1])

    def page(self) -> bytes:
        """Return the exposition text."""
        return generate_latest(self.registry)

    def _counter(self, name: str, meaning: str) -> Counter:
        return Counter(f"qcompile_{name}", meaning, registry=self.registry)
