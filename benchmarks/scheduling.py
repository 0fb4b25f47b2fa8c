"""Microseconds that the scheduler takes a step, apart from any model.

    python benchmarks/scheduling.py [--load] [--json]

Every request decodes; a block fills every 16 steps. The time must grow with the number of running
requests only: not with the number of blocks, nor with the length of the contexts.

``--load`` lets 10,000 requests arrive over 100,000 steps instead, with shared prefixes and output
lengths of every kind, and reports the time by the number of requests that a step served.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

from refengine.request import Request
from refengine.sampling_params import SamplingParams
from refengine.scheduling.scheduler import Scheduler, SchedulerConfig
from refengine.step import RequestStepOutput, ScheduledBatch, StepOutput

RUNNING = (1, 4, 16, 64, 256)
BLOCKS = (1_000, 10_000, 100_000)
STEPS = 320


def answer(batch: ScheduledBatch) -> StepOutput:
    """What a runner would return: token 1 for whoever samples."""
    return StepOutput(
        tuple(RequestStepOutput(r.request_id, (1,) if r.samples else ()) for r in batch.requests)
    )


def microseconds_per_step(num_running: int, num_blocks: int, context: int) -> float:
    """The median time of ``schedule()`` and ``update()`` together, in a steady state."""
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=num_blocks,
            max_num_seqs=num_running,
            max_num_batched_tokens=max(2048, num_running * context),
            max_model_len=context + STEPS + 2,
        )
    )
    for index in range(num_running):
        prompt = tuple(range(index, index + context))
        params = SamplingParams(max_tokens=STEPS + 1)
        scheduler.add_request(Request(f"request-{index}", prompt, params))
    times = []
    for number in range(STEPS):
        started = time.perf_counter()
        batch = scheduler.schedule()
        planned = time.perf_counter()
        output = answer(batch)
        answered = time.perf_counter()
        scheduler.update(batch, output)
        ended = time.perf_counter()
        if number:  # the first step admits everybody
            times.append(ended - answered + planned - started)
    if len(batch.requests) != num_running:
        raise RuntimeError(f"{len(batch.requests)} requests ran, {num_running} were to")
    return statistics.median(times) * 1e6


def simulated_load(num_blocks: int, num_requests: int = 10_000) -> dict[str, object]:
    """Serve requests that arrive one every ten steps; the waits of a runner are left out."""
    draw = random.Random(0)
    prefixes = [tuple(draw.randrange(1 << 15) for _ in range(256)) for _ in range(20)]
    config = SchedulerConfig(num_blocks=num_blocks, max_num_seqs=256, max_model_len=2048)
    scheduler = Scheduler(config)
    times: dict[int, list[float]] = {}  # by the number of requests served, in classes of 10
    num_steps = num_added = 0
    busy = 0.0
    while num_added < num_requests or scheduler.has_unfinished_requests():
        request = None
        if num_steps % 10 == 0 and num_added < num_requests:
            own = tuple(draw.randrange(1 << 15) for _ in range(draw.randint(1, 200)))
            params = SamplingParams(max_tokens=draw.randint(16, 700))
            request = Request(f"request-{num_added}", draw.choice(prefixes) + own, params)
            num_added += 1
        started = time.perf_counter()
        if request is not None:
            scheduler.add_request(request)
        batch = scheduler.schedule()
        planned = time.perf_counter()
        output = answer(batch)
        answered = time.perf_counter()
        scheduler.update(batch, output)
        seconds = time.perf_counter() - answered + planned - started
        times.setdefault(len(batch.requests) // 10 * 10, []).append(seconds)
        busy += seconds
        num_steps += 1
    curve = [
        {"served": served, "us_per_step": round(statistics.median(times[served]) * 1e6, 1)}
        for served in sorted(times)
        if len(times[served]) > 100
    ]
    return {
        "num_blocks": num_blocks,
        "num_requests": num_requests,
        "num_steps": num_steps,
        "us_per_step": round(busy / num_steps * 1e6, 1),
        "hit_rate": round(scheduler.num_hit_tokens / scheduler.num_queried_tokens, 3),
        "curve": curve,
    }


def main() -> None:
    """Print one line a case, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--load", action="store_true", help="simulate 10,000 requests")
    options = parser.parse_args()
    cases: list[dict[str, object]] = []
    if options.load:
        for num_blocks in BLOCKS:
            cases.append(simulated_load(num_blocks))
            if not options.json:
                print(*(f"{name} {value}" for name, value in cases[-1].items()), sep="  ")
        if options.json:
            print(json.dumps({"cases": cases}))
        return
    for num_blocks in BLOCKS:
        for context in (16, 1024):
            for num_running in RUNNING:
                if num_running * (context + STEPS + 16) // 16 > num_blocks:
                    continue
                microseconds = microseconds_per_step(num_running, num_blocks, context)
                case = {"num_running": num_running, "num_blocks": num_blocks, "context": context}
                cases.append(case | {"us_per_step": round(microseconds, 1)})
                if not options.json:
                    print(*(f"{name} {value:>8}" for name, value in cases[-1].items()), sep="  ")
    if options.json:
        print(json.dumps({"cases": cases}))


if __name__ == "__main__":
    main()
