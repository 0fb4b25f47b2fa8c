from __future__ import annotations

import pytest
from scheduling_mocks import MockRunner, drain, make_request, step

from refengine.scheduling.policies import load_policy
from refengine.scheduling.scheduler import Scheduler, SchedulerConfig


def make(policy: str, **fields: int) -> tuple[Scheduler, MockRunner]:
    """A scheduler of one policy that serves one request at a time unless told otherwise."""
    config = SchedulerConfig(
        **({"num_blocks": 64, "block_size": 4, "max_num_seqs": 1} | fields), policy=policy
    )
    return Scheduler(config), MockRunner(config.num_blocks, config.block_size)


def order_of_admission(scheduler: Scheduler, runner: MockRunner) -> str:
    """The ids of the requests in the order in which they were first computed."""
    order = []
    while scheduler.has_unfinished_requests():
        order += [new.request_id for new in step(scheduler, runner).new_requests]
    return "".join(order)


def test_first_come_first_served_looks_at_nothing_else() -> None:
    scheduler, runner = make("fcfs")
    for name, priority, prompt in (("a", 5, 9), ("b", 0, 2), ("c", -3, 30)):
        scheduler.add_request(make_request(name, prompt, priority=priority))
    assert order_of_admission(scheduler, runner) == "abc"


def test_smaller_priority_goes_first_and_equal_ones_by_arrival() -> None:
    scheduler, runner = make("priority")
    for name, priority in (("a", 2), ("b", 0), ("c", 2), ("d", 0), ("e", -1)):
        scheduler.add_request(make_request(name, priority=priority))
    assert order_of_admission(scheduler, runner) == "ebdac"


def test_the_lowest_priority_gives_way_even_if_it_came_first() -> None:
    scheduler, runner = make("priority", num_blocks=3, max_num_seqs=2)
    low = make_request("low", prompt=4, max_tokens=5, priority=1)
    high = make_request("high", prompt=4, max_tokens=5, priority=0)
    scheduler.add_request(low)
    scheduler.add_request(high)
    drain(scheduler, runner)
    assert (low.num_preemptions, high.num_preemptions) == (1, 0)


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"fcfs, priority.*got 'lifo'"):
        load_policy("lifo")
    with pytest.raises(ValueError, match="'lifo'"):
        SchedulerConfig(num_blocks=1, policy="lifo")
