"""Static memory, static batches and no batches: what paging and continuous batching replaced."""

from __future__ import annotations

import pytest
from scheduling_mocks import drain, expected_tokens, make_request, make_scheduler, step

from refengine.errors import RequestError
from refengine.scheduling.scheduler import SchedulerConfig


def test_static_memory_is_reserved_for_the_longest_request() -> None:
    scheduler, runner = make_scheduler(kv_allocation="static", num_blocks=40)
    for name in "abc":
        scheduler.add_request(make_request(name, prompt=3, max_tokens=9))
    batch = step(scheduler, runner)
    assert [len(r.new_block_ids) for r in batch.requests] == [16, 16]
    assert batch.decisions[-1].reason == "8 blocks short"
    assert step(scheduler, runner).requests[0].new_block_ids == ()
    drain(scheduler, runner)


def test_static_memory_refuses_where_not_one_reservation_fits() -> None:
    scheduler, _ = make_scheduler(kv_allocation="static", num_blocks=15)
    with pytest.raises(RequestError, match="needs 16 blocks of 4, and the whole KV cache has 15"):
        scheduler.add_request(make_request("a", prompt=1, max_tokens=1))


def test_paged_memory_fits_many_more_of_the_same_requests() -> None:
    running = {}
    for kind in ("static", "paged"):
        scheduler, runner = make_scheduler(kv_allocation=kind, num_blocks=64)
        for index in range(40):
            scheduler.add_request(make_request(f"{index}", prompt=3, max_tokens=9))
        step(scheduler, runner)
        running[kind] = scheduler.num_running
        drain(scheduler, runner)
    assert running == {"static": 4, "paged": 40}


def test_a_static_batch_admits_nobody_before_all_have_ended() -> None:
    scheduler, runner = make_scheduler(batching="static", max_num_seqs=2)
    requests = [
        make_request(name, max_tokens=n) for name, n in zip("abcd", (1, 3, 2, 2), strict=True)
    ]
    for request in requests:
        scheduler.add_request(request)
    batches = []
    while scheduler.has_unfinished_requests():
        batch = step(scheduler, runner)
        batches.append("".join(r.request_id for r in batch.requests))
        waits = {d.reason for d in batch.decisions if d.action == "waits"}
        assert waits <= {"max_num_seqs is 2", "the static batch has not ended"}
    assert batches == ["ab", "b", "b", "cd", "cd"]


def test_a_static_batch_may_fill_over_several_steps() -> None:
    scheduler, runner = make_scheduler(batching="static", max_num_batched_tokens=6)
    for name in "abc":
        scheduler.add_request(make_request(name, prompt=5, max_tokens=8))
    members = ["".join(r.request_id for r in step(scheduler, runner).requests) for _ in range(3)]
    assert members == ["ab", "abc", "abc"]
    step(scheduler, runner)
    scheduler.add_request(make_request("late", max_tokens=1))
    assert [r.request_id for r in step(scheduler, runner).requests] == ["a", "b", "c"]
    drain(scheduler, runner)


def test_no_batching_serves_one_at_a_time() -> None:
    scheduler, runner = make_scheduler(batching="none")
    requests = [make_request(name, max_tokens=2) for name in "abc"]
    for request in requests:
        scheduler.add_request(request)
    order = []
    while scheduler.has_unfinished_requests():
        (one,) = step(scheduler, runner).requests
        order.append(one.request_id)
    assert order == list("aabbcc")
    assert all(request.output_token_ids == expected_tokens(request) for request in requests)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("kv_allocation", "paged, static"),
        ("batching", "continuous, static, none"),
        ("preemption_mode", "recompute, swap, auto"),
    ],
)
def test_unknown_choices_are_refused(name: str, choices: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of {choices}, got 'x'"):
        SchedulerConfig(num_blocks=1, **{name: "x"})  # type: ignore[arg-type]
