"""Counts and histograms of a running engine, kept where the steps are: an Observer.

Plain lists and a bisection cost well under a microsecond a token; the HTTP side turns a copy of
them into Prometheus' format when it is asked (``metrics.py``). Names are vLLM's.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import pairwise

from refengine.request import RequestMetrics
from refengine.step import StepRecord

FINISH_REASONS = ("stop", "length", "abort")

_SECONDS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
            120.0, 240.0, 480.0, 960.0, 1920.0)  # fmt: skip
# Upper bounds of the buckets.
HISTOGRAMS: dict[str, tuple[float, ...]] = {
    "time_to_first_token_seconds": (
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
        10.0, 20.0, 40.0, 80.0, 160.0),
    "inter_token_latency_seconds": (
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0,
        2.5, 5.0, 10.0, 20.0, 40.0, 80.0),
    "e2e_request_latency_seconds": _SECONDS,
    "request_queue_time_seconds": (0.001, 0.01, 0.1, *_SECONDS),
    "request_prefill_time_seconds": (0.001, 0.01, 0.1, *_SECONDS),
    "request_decode_time_seconds": (0.01, 0.1, *_SECONDS),
    "iteration_tokens_total": (
        1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
}  # fmt: skip


@dataclass(slots=True)
class Histogram:
    """Counts by bucket (the last one is for everything above), and the sum of the values."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        """Empty buckets."""
        if not self.counts:
            self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True)
class EngineStatistics:
    """A running engine in numbers; counters only grow."""

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage_perc: float = 0.0  # 1 is full
    prefix_cache_queries: int = 0  # tokens
    prefix_cache_hits: int = 0  # tokens
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    request_success: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(FINISH_REASONS, 0)
    )
    histograms: dict[str, Histogram] = field(
        default_factory=lambda: {name: Histogram(bounds) for name, bounds in HISTOGRAMS.items()}
    )

    def on_step(self, record: StepRecord) -> None:
        """Take note of a step (``Observer``)."""
        batch = record.batch
        self.gauges(record.num_running, record.num_waiting, record.num_free_blocks,
                    record.num_blocks)  # fmt: skip
        if batch.requests:
            self.histograms["iteration_tokens_total"].observe(batch.num_scheduled_tokens)
        self.generation_tokens += sum(len(part.token_ids) for part in record.output.requests)
        admitted = {d.request_id for d in batch.decisions if d.action == "admitted"}
        for new in batch.new_requests:
            if new.request_id in admitted:
                self.prompt_tokens += new.num_prompt_tokens
                self.prefix_cache_queries += new.num_prompt_tokens
                self.prefix_cache_hits += new.num_computed_tokens
        self.num_preemptions += sum(d.action == "preempted" for d in batch.decisions)

    def gauges(self, running: int, waiting: int, free_blocks: int, blocks: int) -> None:
        """Set what is so now."""
        self.num_requests_running = running
        self.num_requests_waiting = waiting
        self.kv_cache_usage_perc = 1.0 - free_blocks / blocks

    def finished(self, reason: str, metrics: RequestMetrics | None) -> None:
        """Take note of a request that has ended."""
        self.request_success[reason] = self.request_success.get(reason, 0) + 1
        if metrics is None or metrics.finished_time is None:
            return
        arrival, started = metrics.arrival_time, metrics.first_scheduled_time
        observe = {name: histogram.observe for name, histogram in self.histograms.items()}
        observe["e2e_request_latency_seconds"](metrics.finished_time - arrival)
        times = metrics.token_times
        if started is None:
            return
        observe["request_queue_time_seconds"](started - arrival)
        if not times:
            return
        observe["time_to_first_token_seconds"](times[0] - arrival)
        observe["request_prefill_time_seconds"](times[0] - started)
        observe["request_decode_time_seconds"](times[-1] - times[0])
        between = observe["inter_token_latency_seconds"]
        for earlier, later in pairwise(times):
            between(later - earlier)
