"""Prometheus' metrics: of HTTP requests as they are answered, and of scheduler, cache and pools when they are read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import permutations
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ..client import EngineClient
from ..kvcache.base import Tier
from ..request import RequestOutput
from ..system import System

# Seconds: from a cached prompt's first token on a GPU to a long prefill on a CPU.
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
OTHERS = "(others)"  # no client is named so
SCHEDULER_COUNTERS = {
    "batches": "batches computed",
    "prefill_tokens": "tokens of prompts computed",
    "decode_tokens": "tokens of answers computed",
    "cached_tokens": "prompt tokens whose cached KV was used",
    "loaded_tokens": "cached tokens that were loaded to the device on demand",
    "recomputed_tokens": "cached tokens that were computed again, as that was faster than loading",
    "preemptions": "requests that gave up their memory for others",
    "stalled_s": "seconds that requests waited for loads",
    "stores": "payloads stored in the cache",
    "stores_refused": "payloads that found no room in the cache",
}


class SystemCollector(Collector):
    """Reads the counters of a system. The numbers are those of one moment each, not of one moment together."""

    def __init__(self, client: EngineClient, system: System) -> None:
        self._client, self._system = client, system

    def collect(self) -> Iterator[Any]:
        health, scheduler, tiers = self._client.health(), self._system.scheduler.metrics, self._system.tiers
        yield GaugeMetricFamily("tenure_engine_alive", "1 while the engine's thread runs", float(health.alive))
        yield GaugeMetricFamily("tenure_requests_waiting", "requests without a token so far", health.num_waiting)
        yield GaugeMetricFamily("tenure_requests_running", "requests with a token", health.num_running)
        yield GaugeMetricFamily("tenure_last_step_age_seconds", "since the last step ended", health.last_step_age_s)
        for name, text in SCHEDULER_COUNTERS.items():
            unit = name.removesuffix("_s") + ("_seconds" if name.endswith("_s") else "")
            yield CounterMetricFamily(f"tenure_{unit}", text, getattr(scheduler, name))
        finished = CounterMetricFamily("tenure_requests_finished", "requests that have ended", labels=["reason"])
        for reason, count in scheduler.finished.items():
            finished.add_metric([reason.name.lower()], count)
        yield finished
        capacity = GaugeMetricFamily("tenure_pool_capacity_bytes", "size of a tier", labels=["tier"])
        used = GaugeMetricFamily("tenure_pool_used_bytes", "bytes allocated in a tier", labels=["tier"])
        for tier, pool in tiers.pools.items():
            capacity.add_metric([tier.name.lower()], pool.capacity)
            used.add_metric([tier.name.lower()], pool.used)
        yield from (capacity, used)
        moved = CounterMetricFamily("tenure_moved_bytes", "bytes copied between tiers", labels=["source", "target"])
        nothing = dict.fromkeys(permutations(tiers.pools, 2), 0)  # a series that begins with its first copy has no rate
        for (source, target), nbytes in {**nothing, **tiers.statistics.bytes_moved}.items():
            moved.add_metric([Tier(source).name.lower(), Tier(target).name.lower()], nbytes)
        yield moved


class HttpMetrics:
    """The server's metrics.

    Labels are the routes and statuses of this server and the clients of its keys, never what a client has sent.

    Args:
        max_clients: that have series of their own; further ones share those of `OTHERS`.
    """

    def __init__(self, client: EngineClient, system: System, max_clients: int) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(SystemCollector(client, system))
        options: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter("tenure_http_requests", "answered requests", ["route", "status"], **options)
        self._first_token = Histogram(
            "tenure_first_token_seconds", "from arrival to the first token", buckets=BUCKETS, **options
        )
        self._answer = Histogram("tenure_answer_seconds", "from arrival to the end", buckets=BUCKETS, **options)
        self._client_requests = Counter(
            "tenure_client_requests", "answered requests of a client", ["client", "status"], **options
        )
        self._client_tokens = Counter(
            "tenure_client_tokens", "tokens of a client's answered requests, by kind", ["client", "kind"], **options
        )
        self._max_clients, self._clients = max_clients, set[str]()
        self.started_s = time.time()

    def observe_request(self, route: str, status: int, client: str | None) -> None:
        """A request has been answered.

        Args:
            client: None: it had no key that is known.
        """
        self.requests.labels(route, str(status)).inc()
        if client is not None:
            self._client_requests.labels(self._label(client), str(status)).inc()

    def _label(self, client: str) -> str:
        if client not in self._clients and len(self._clients) >= self._max_clients:
            return OTHERS
        self._clients.add(client)
        return client

    def observe(self, output: RequestOutput) -> None:
        """An answer is complete."""
        times = output.times
        if times.first_token is not None:
            self._first_token.observe(times.first_token - times.arrived)
        if times.finished is not None:
            self._answer.observe(times.finished - times.arrived)
        client = self._label(output.request.client)
        # `n` answers have the same prompt; the metric counts it once for each, as the scheduler's do.
        counts = (("prompt", len(output.request.prompt)), ("cached", output.cached_tokens))
        for kind, tokens in (*counts, ("answer", output.num_output_tokens)):
            self._client_tokens.labels(client, kind).inc(tokens)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
