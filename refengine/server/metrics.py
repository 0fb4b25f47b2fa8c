"""``/metrics``: the engine's statistics in Prometheus' format, under vLLM's names."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from refengine.server.context import Context

PREFIX = "refengine:"

GAUGES = {
    "num_requests_running": "Requests in the engine's batch.",
    "num_requests_waiting": "Requests that wait for a place in it.",
    "kv_cache_usage_perc": "Share of the KV cache's blocks in use; 1 is all.",
}
COUNTERS = {
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found there.",
    "num_preemptions": "Times that a request lost its blocks to others.",
    "prompt_tokens": "Prompt tokens of requests that were admitted.",
    "generation_tokens": "Tokens generated.",
}
HISTOGRAM_TEXTS = {
    "time_to_first_token_seconds": "From a request's arrival to its first token.",
    "inter_token_latency_seconds": "Between two tokens of a request.",
    "e2e_request_latency_seconds": "From a request's arrival to its end.",
    "request_queue_time_seconds": "From a request's arrival to its first step.",
    "request_prefill_time_seconds": "From a request's first step to its first token.",
    "request_decode_time_seconds": "From a request's first token to its last.",
    "iteration_tokens_total": "Tokens computed in a step.",
}


class EngineCollector(Collector):
    """Reads the newest statistics whenever it is asked."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        statistics = self._context.client.statistics
        labels, values = ["model_name"], [self._context.model_name]
        for name, text in GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=labels)
            gauge.add_metric(values, getattr(statistics, name))
            yield gauge
        for name, text in COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=labels)
            counter.add_metric(values, getattr(statistics, name))
            yield counter
        success = CounterMetricFamily(
            PREFIX + "request_success", "Requests that ended.", labels=[*labels, "finished_reason"]
        )
        for reason, count in list(statistics.request_success.items()):
            success.add_metric([*values, reason], count)
        yield success
        for name, histogram in statistics.histograms.items():
            family = HistogramMetricFamily(PREFIX + name, HISTOGRAM_TEXTS[name], labels=labels)
            buckets, total = [], 0
            bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
            for bound, count in zip(bounds, histogram.counts, strict=True):
                total += count
                buckets.append((bound, total))
            family.add_metric(values, buckets, histogram.total)
            yield family


def make_registry(context: Context) -> CollectorRegistry:
    """A registry of this server's own metrics."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(context))
    return registry
