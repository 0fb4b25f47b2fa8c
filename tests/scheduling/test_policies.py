from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
from scheduling_mocks import MockRunner, drain, expected_tokens, make_request, make_scheduler, step

from refengine.errors import QueueFullError, RequestError
from refengine.request import Request
from refengine.scheduling.policies import OVERTAKINGS_PER_PRIORITY, load_policy
from refengine.scheduling.scheduler import Scheduler, SchedulerConfig


def make(policy: str, **fields: object) -> tuple[Scheduler, MockRunner]:
    """A scheduler of one policy that serves one request at a time unless told otherwise."""
    return make_scheduler(**({"max_num_seqs": 1} | fields), policy=policy)


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


def test_the_shortest_job_goes_first_and_the_longest_gives_way() -> None:
    scheduler, runner = make("shortest-job-first")
    for name, max_tokens in (("a", 9), ("b", 3), ("c", None), ("d", 1)):
        scheduler.add_request(make_request(name, max_tokens=max_tokens))
    assert order_of_admission(scheduler, runner) == "dbac"
    scheduler, runner = make("shortest-job-first", num_blocks=4, max_num_seqs=2)
    long = make_request("long", prompt=4, max_tokens=10)
    short = make_request("short", prompt=4, max_tokens=6)
    scheduler.add_request(long)
    scheduler.add_request(short)
    drain(scheduler, runner)
    assert (long.num_preemptions, short.num_preemptions) == (1, 0)


def test_whose_prefix_is_cached_goes_first() -> None:
    scheduler, runner = make("longest-prefix-match", enable_prefix_caching=True)
    x, y = (1,) * 9, (2,) * 17
    for index, prompt in enumerate((x, y, (3,) * 9, (*y, 5), (*x, 5), (*y, 6))):
        scheduler.add_request(make_request(f"{index}", prompt, max_tokens=1))
    # "0" leads to "4", which shares its prefix; then "1" leads to "3" and "5".
    assert order_of_admission(scheduler, runner) == "041352"


def test_prefixes_that_are_not_cached_go_by_arrival() -> None:
    scheduler, runner = make("longest-prefix-match", enable_prefix_caching=False)
    for name in "abc":
        scheduler.add_request(make_request(name, prompt=9))
    assert order_of_admission(scheduler, runner) == "abc"


def flood(policy: str, patient: Request, others: Iterator[Request], limit: int) -> int:
    """Feed one more rival each time that a seat is free; return how many were served first."""
    scheduler, runner = make(policy, enable_prefix_caching=True)
    scheduler.add_request(next(others))
    step(scheduler, runner)
    scheduler.add_request(patient)
    for count in range(limit):
        scheduler.add_request(next(others))
        step(scheduler, runner)
        if patient.first_scheduled_time is not None:
            return count
    raise AssertionError(f"{policy} let a request starve for {limit} steps")


def rivals(**fields: object) -> Iterator[Request]:
    """Requests that take one step each, without end."""
    for index in itertools.count():
        yield make_request(f"rival {index}", **({"prompt": 9, "max_tokens": 1} | fields))  # type: ignore[arg-type]


def test_a_low_priority_does_not_starve() -> None:
    patient = make_request("patient", priority=1)
    served_first = flood("priority", patient, rivals(priority=0), 1000)
    assert OVERTAKINGS_PER_PRIORITY - 5 < served_first < OVERTAKINGS_PER_PRIORITY + 5


def test_a_long_job_does_not_starve() -> None:
    patient = make_request("patient", max_tokens=40)
    assert 30 < flood("shortest-job-first", patient, rivals(), 1000) < 50


def test_a_prefix_that_nobody_shares_does_not_starve() -> None:
    patient = make_request("patient", prompt=(7,) * 9)
    assert 4 < flood("longest-prefix-match", patient, rivals(prompt=(1,) * 9), 1000) < 20


def test_arrivals_in_order_are_no_overtakings() -> None:
    # However many wait, a better priority goes first.
    scheduler, runner = make("priority")
    for index in range(OVERTAKINGS_PER_PRIORITY + 50):
        scheduler.add_request(make_request(f"low {index}", priority=1))
    step(scheduler, runner)
    scheduler.add_request(make_request("high", priority=0))
    order = []
    while scheduler.has_unfinished_requests():
        order += [new.request_id for new in step(scheduler, runner).new_requests]
    assert order[0] == "high"


def test_a_priority_may_be_changed_in_any_state() -> None:
    scheduler, runner = make("priority", num_blocks=4, max_num_seqs=2)
    for name in "abc":
        scheduler.add_request(make_request(name, prompt=6, max_tokens=4))
    step(scheduler, runner)
    scheduler.set_priority("c", -1)
    scheduler.set_priority("a", 5)
    scheduler.set_priority("nobody", 5)
    scheduler.check_invariants()
    batch = step(scheduler, runner)
    # "a" needs no block yet; it is served last, and is the one to give way.
    assert [r.request_id for r in batch.requests] == ["b", "a"]
    ended: list[str] = []
    while scheduler.has_unfinished_requests():
        ended += [d.request_id for d in step(scheduler, runner).decisions if d.action == "finished"]
    # The end of the last one is told with the step after it.
    assert ended == ["b", "c"]


class LatestFirst:
    """A policy of one's own: last come, first served; the oldest gives way."""

    def admission_key(self, request: Request) -> float:
        return -request.arrival_index

    def victim(self, running: Sequence[Request]) -> tuple[Request, str]:
        return running[0], "oldest of those that may go"


class NoVictim:
    def admission_key(self, request: Request) -> float:
        return 0.0


class WrongVictim(LatestFirst):
    def victim(self, running: Sequence[Request]) -> tuple[Request, str]:
        return make_request("stranger"), "no reason"


def test_a_policy_of_ones_own_is_loaded_by_module_and_class() -> None:
    scheduler, runner = make("test_policies:LatestFirst", num_blocks=4, max_num_seqs=3)
    requests = [make_request(name, prompt=4, max_tokens=9) for name in "abc"]
    for request in requests:
        scheduler.add_request(request)
    batch = step(scheduler, runner)
    assert [r.request_id for r in batch.requests] == ["c", "b", "a"]
    # The victim is never one that the step has served, whatever a policy would like.
    reasons = set()
    while scheduler.has_unfinished_requests():
        batch = step(scheduler, runner)
        reasons |= {d.reason for d in batch.decisions if d.action == "preempted"}
    assert "oldest of those that may go" in reasons
    assert requests[2].num_preemptions == 0
    for request in requests:
        assert request.output_token_ids == expected_tokens(request)


def test_a_victim_that_may_not_go_is_an_error() -> None:
    scheduler, runner = make("test_policies:WrongVictim", num_blocks=2, max_num_seqs=2)
    for name in "ab":
        scheduler.add_request(make_request(name, prompt=4, max_tokens=4))
    step(scheduler, runner)
    with pytest.raises(RuntimeError, match="named 'stranger', which may not be preempted"):
        step(scheduler, runner)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lifo", r"fcfs, priority.*or module:Class, got 'lifo'"),
        ("no_such_module:Policy", "can't be loaded: No module named 'no_such_module'"),
        ("test_policies:Missing", "can't be loaded: module 'test_policies' has no attribute"),
        ("test_policies:NoVictim", "has no method victim"),
        (":Policy", "can't be loaded"),
    ],
)
def test_what_is_no_policy_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_policy(name)
    with pytest.raises(ValueError, match=message):
        SchedulerConfig(num_blocks=1, policy=name)


# ----- limits that go with the order


def test_a_full_queue_refuses_and_takes_more_later() -> None:
    scheduler, runner = make("fcfs", max_queue=2)
    for name in "ab":
        scheduler.add_request(make_request(name, max_tokens=1))
    with pytest.raises(QueueFullError, match="'c' is refused: 2 requests wait, and max_queue is 2"):
        scheduler.add_request(make_request("c"))
    assert issubclass(QueueFullError, RequestError)
    step(scheduler, runner)
    scheduler.add_request(make_request("c"))
    drain(scheduler, runner)


def test_a_long_prompt_is_computed_in_pieces_beside_others() -> None:
    scheduler, runner = make("fcfs", long_prefill_token_threshold=4, max_num_seqs=9)
    scheduler.add_request(make_request("long", prompt=10))
    scheduler.add_request(make_request("short", prompt=3))
    steps = [
        [(r.request_id, r.num_tokens) for r in step(scheduler, runner).requests] for _ in range(3)
    ]
    assert steps[0] == [("long", 4), ("short", 3)]
    assert steps[2] == [("long", 2), ("short", 1)]
    drain(scheduler, runner)
