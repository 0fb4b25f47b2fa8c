"""Microseconds that the scheduler takes a step, apart from any model.

    python benchmarks/scheduling.py [--json]

Every request decodes; a block fills every 16 steps. The time must grow with the number of running
requests only: not with the number of blocks, nor with the length of the contexts.
"""

from __future__ import annotations

import argparse
import json
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


def main() -> None:
    """Print one line a case, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    cases = []
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
