"""``--time``: how fast a kernel is, against what this machine can do at most."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np

from refengine.conformance.calling import Outcome, call_plain
from refengine.conformance.case import Case, load_cases
from refengine.conformance.guarded import Guarded
from refengine.conformance.implementation import Implementation
from refengine.conformance.kernels import KERNELS
from refengine.conformance.runner import make_runner

SECONDS = 1.0  # of runs a case, after one to warm up
MIN_RUNS, MAX_RUNS = 5, 200
FLUSH_BYTES = 256 * 2**20  # more than any cache in use

Row = dict[str, Any]


def time_implementation(
    implementation: Implementation, dtypes: Iterable[str], time_limit: float | None = None
) -> list[Row]:
    """Time the cases of the set "time".

    Args:
        implementation: what to time; it runs in a process of its own where it can be imported.
        dtypes: of the cases.
        time_limit: seconds a case may take; None for two minutes.

    Returns:
        One row a case: ``us`` (median), ``GB/s`` and ``GFLOP/s`` of what the case must move and
        compute, and ``share``: of the time that this machine's measured ceilings allow, in percent.
    """
    cases = load_cases(implementation.kernel, "time", dtypes=dtypes)
    runner = make_runner(implementation, time_limit or 120.0)
    rows = []
    try:
        for case in cases:
            runner.start("time", case)
            answer = runner.finish()
            if isinstance(answer, Outcome):
                answer = {"case": case.label, "us": answer.message}
            rows.append(answer)
    finally:
        runner.close()
    return rows


def time_case(implementation: Implementation, function: Callable[..., Any], case: Case) -> Row:
    """Time one case in this process, with caches flushed before every run."""
    spec = KERNELS[case.kernel]
    problem = spec.build(case)
    moved, operations = spec.traffic(problem)
    kind, device = implementation.kind, implementation.device
    values = {
        name: Guarded(value, 0, kind, device).argument if isinstance(value, np.ndarray) else value
        for name, value in problem.arguments.items()
    }

    def call() -> None:
        call_plain(function, spec, values)

    seconds = _on_device(call, kind) if device == "cuda" else _on_host(call)
    bandwidth, rate = _ceilings(kind, device, case.dtype)
    least = max(moved / bandwidth, operations / rate if rate else 0.0)
    return {
        "case": case.label,
        "us": seconds * 1e6,
        "MB": moved / 1e6,
        "GB/s": moved / seconds / 1e9,
        "of GB/s": bandwidth / 1e9,
        "GFLOP/s": operations / seconds / 1e9,
        "of GFLOP/s": rate / 1e9,
        "bound by": "bytes" if moved / bandwidth >= least else "operations",
        "share %": 100 * least / seconds,
    }


def _on_host(call: Callable[[], None]) -> float:
    flush = np.zeros(FLUSH_BYTES // 4, np.float32)
    times: list[float] = []
    call()
    until = time.perf_counter() + SECONDS
    while len(times) < MIN_RUNS or (len(times) < MAX_RUNS and time.perf_counter() < until):
        flush += 1
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def _on_device(call: Callable[[], None], kind: str) -> float:
    """With events around each run; the flush before it also hides the launch."""
    make: Callable[[], Any]
    elapsed: Callable[[Any, Any], float]
    fill: Callable[[], Any]
    wait: Callable[[], Any]
    if kind == "torch":
        import torch

        make = partial(torch.cuda.Event, enable_timing=True)
        elapsed, wait = torch.cuda.Event.elapsed_time, torch.cuda.synchronize
        fill = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_
    else:
        import cupy

        make, elapsed = cupy.cuda.Event, cupy.cuda.get_elapsed_time
        wait = cupy.cuda.Device().synchronize
        fill = partial(cupy.empty(FLUSH_BYTES, np.uint8).fill, 0)
    for _ in range(3):
        call()
    wait()
    times = []
    for _ in range(50):
        fill()
        first, last = make(), make()
        first.record()
        call()
        last.record()
        wait()
        times.append(elapsed(first, last) / 1e3)
    return float(np.median(times))


@cache
def _ceilings(kind: str, device: str, dtype: str) -> tuple[float, float]:
    """Bytes and operations a second that this machine reaches on the simplest work there is."""
    if device == "cuda":
        return _device_ceilings(kind, dtype)
    workers = os.cpu_count() or 1
    parts = [np.ones(32 * 2**20, np.float32) for _ in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        bandwidth = 0.0
        for _ in range(5):
            began = time.perf_counter()
            list(pool.map(lambda part: float(np.dot(part, part)), parts))
            bandwidth = max(bandwidth, 4 * workers * parts[0].size / (time.perf_counter() - began))
    a = np.ones((1024, 1024), np.float32)
    best = min(_timed(lambda: a @ a) for _ in range(5))
    return bandwidth, 2 * 1024**3 / best


def _timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _device_ceilings(kind: str, dtype: str) -> tuple[float, float]:
    if kind != "torch":
        import cupy

        x = cupy.ones(2**28, np.float32)
        return 4 * x.size / _on_device(x.sum, kind), 0.0
    import torch

    name = {"float32": torch.float32, "float16": torch.float16}.get(dtype, torch.bfloat16)
    x = torch.ones(2**28, dtype=torch.float32, device="cuda")
    bandwidth = 4 * x.numel() / _on_device(x.sum, kind)
    a = torch.randn(8192, 8192, dtype=torch.float32, device="cuda").to(name)
    return bandwidth, 2 * 8192**3 / _on_device(lambda: a @ a, kind)
