"""Run a workload through an engine and report what a user would feel."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from refengine.engine import Engine
from refengine.request import RequestMetrics
from refengine.sampling_params import SamplingParams
from refengine.step import StepRecord
from refengine.workload import WorkItem


@dataclass(slots=True)
class PartTimes:
    """Observer that adds up where the steps' time went."""

    seconds: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    step_seconds: float = 0.0

    def on_step(self, record: StepRecord) -> None:
        """Add one step."""
        self.steps += 1
        self.step_seconds += record.ended - record.started
        for part, value in record.output.seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + value


def run_workload(
    engine: Engine,
    items: Sequence[WorkItem],
    *,
    temperature: float = 0.0,
    progress: bool = False,
) -> dict[str, Any]:
    """Send all requests at once and step until the last has ended.

    Args:
        engine: an idle engine, warmed up.
        items: the requests.
        temperature: of every request.
        progress: show a bar on standard error.

    Returns:
        The figures that ``refengine bench --json`` prints; times are milliseconds, but for
        ``seconds`` and ``seconds_by_part``. TTFT counts from the moment the request was sent,
        waiting included; ITL is the time between two tokens of one request.
    """
    parts = PartTimes()
    engine.observers.append(parts)
    began = time.perf_counter()
    for number, item in enumerate(items):
        params = SamplingParams(
            temperature=temperature, max_tokens=item.output_len, ignore_eos=True, seed=number
        )
        engine.add_request(f"bench-{number}", item.prompt_token_ids, params)
    metrics: list[RequestMetrics] = []
    with tqdm(total=len(items), desc="measuring", unit="request", disable=not progress) as bar:
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.metrics is not None:
                    metrics.append(output.metrics)
                bar.update()
    seconds = time.perf_counter() - began
    engine.observers.remove(parts)
    output_tokens = sum(len(m.token_times) for m in metrics)
    ttft = [(m.token_times[0] - m.arrival_time) * 1e3 for m in metrics if m.token_times]
    itl = [
        (later - earlier) * 1e3
        for m in metrics
        for earlier, later in zip(m.token_times, m.token_times[1:], strict=False)
    ]
    seconds_by_part = {name: round(value, 4) for name, value in parts.seconds.items()}
    inside = sum(parts.seconds.values())
    seconds_by_part["scheduling and outputs"] = round(seconds - inside, 4)
    return {
        "num_requests": len(items),
        "prompt_tokens": sum(len(item.prompt_token_ids) for item in items),
        "output_tokens": output_tokens,
        "seconds": round(seconds, 4),
        "output_tokens_per_s": round(output_tokens / seconds, 2),
        "ttft_ms": summarize(ttft),
        "itl_ms": summarize(itl),
        "steps": parts.steps,
        "seconds_by_part": seconds_by_part,
    }


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Mean, median and 99th percentile (nearest rank); zeros where there is nothing."""
    if not values:
        return {"mean": 0.0, "p50": 0.0, "p99": 0.0}
    ordered = sorted(values)

    def rank(share: float) -> float:
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    return {
        "mean": round(sum(ordered) / len(ordered), 3),
        "p50": round(rank(0.50), 3),
        "p99": round(rank(0.99), 3),
    }
