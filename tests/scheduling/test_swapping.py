from __future__ import annotations

import pytest
from scheduling_mocks import MockRunner, drain, expected_tokens, make_request, make_scheduler, step

from refengine.request import Request, RequestState
from refengine.scheduling.kv_cache_manager import KVCacheManager
from refengine.scheduling.scheduler import Scheduler, SchedulerConfig
from refengine.step import Decision


def start_pair(**fields: object) -> tuple[Scheduler, MockRunner, Request, Request]:
    """Two requests of 8 tokens in 5 blocks of 4: the second has to give way in the second step."""
    settings = {"num_blocks": 5, "num_host_blocks": 8, "preemption_mode": "swap"}
    scheduler, runner = make_scheduler(**(settings | fields))
    first = make_request("a", (1,) * 8, max_tokens=6)
    second = make_request("b", (2,) * 8, max_tokens=6)
    scheduler.add_request(first)
    scheduler.add_request(second)
    step(scheduler, runner)
    return scheduler, runner, first, second


def test_a_victim_moves_out_and_in_again_and_computes_nothing_twice() -> None:
    scheduler, runner, first, second = start_pair()
    table = scheduler.kv.block_ids("b")
    batch = step(scheduler, runner)
    assert tuple(block for block, _ in batch.swap_out) == table
    assert batch.dropped_request_ids == ("b",)
    assert Decision("b", "preempted", "latest arrival, swapped out") in batch.decisions
    assert (second.state, second.num_computed_tokens) == (RequestState.SWAPPED, 8)
    assert scheduler.kv.num_free_host_blocks == 6
    host = tuple(host_block for _, host_block in batch.swap_out)
    while second.state is RequestState.SWAPPED:
        batch = step(scheduler, runner)
    assert tuple(host_block for host_block, _ in batch.swap_in) == host
    assert scheduler.kv.num_free_host_blocks == 8
    (new,) = batch.new_requests
    assert (new.request_id, new.num_computed_tokens, len(new.token_ids)) == ("b", 8, 9)
    assert [(r.start, r.num_tokens) for r in batch.requests if r.request_id == "b"] == [(8, 1)]
    drain(scheduler, runner)
    assert runner.num_computed_tokens == 2 * 13
    for request in (first, second):
        assert request.output_token_ids == expected_tokens(request)
    assert (second.num_preemptions, second.num_cached_tokens) == (1, 0)


def test_full_host_memory_means_recomputing() -> None:
    scheduler, runner, _, second = start_pair(num_host_blocks=1)
    batch = step(scheduler, runner)
    assert (batch.swap_out, second.state) == ((), RequestState.PREEMPTED)
    drain(scheduler, runner)
    assert second.output_token_ids == expected_tokens(second)


def test_abort_frees_host_memory_at_once() -> None:
    scheduler, runner, _, second = start_pair()
    step(scheduler, runner)
    assert second.state is RequestState.SWAPPED
    scheduler.abort_request("b")
    assert scheduler.kv.num_free_host_blocks == 8
    scheduler.check_invariants()
    drain(scheduler, runner)


def test_what_the_prefix_cache_still_holds_is_not_moved_in() -> None:
    scheduler, runner, first, second = start_pair(enable_prefix_caching=True, num_blocks=6)
    while second.state is not RequestState.SWAPPED:
        batch = step(scheduler, runner)
    assert (len(batch.swap_out), second.num_computed_tokens) == (3, 12)
    scheduler.abort_request("a")
    batch = step(scheduler, runner)
    # Of its three blocks the first two are still found; the first request has taken the third.
    assert len(batch.swap_in) == 1
    assert batch.new_requests[0].num_computed_tokens == 12
    assert scheduler.kv.num_free_host_blocks == 8
    drain(scheduler, runner)
    assert second.output_token_ids == expected_tokens(second)
    assert first.is_finished


@pytest.mark.parametrize(
    ("swap", "recompute", "swaps"),
    [(1.0, 0.49, False), (1.0, 0.51, True), (0.0, 1.0, True), (1.0, 0.0, False)],
)
def test_auto_takes_what_costs_less(swap: float, recompute: float, swaps: bool) -> None:
    # Two blocks out and in again are four moves; eight tokens are computed again.
    scheduler, runner, _, second = start_pair(
        preemption_mode="auto", swap_seconds_per_block=swap, recompute_seconds_per_token=recompute
    )
    step(scheduler, runner)
    assert (second.state is RequestState.SWAPPED) == swaps
    drain(scheduler, runner)
    assert second.output_token_ids == expected_tokens(second)


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_a_fixed_mode_looks_at_no_costs(mode: str) -> None:
    config = SchedulerConfig(num_blocks=1, preemption_mode=mode, swap_seconds_per_block=1e9)
    assert config.prefers_swap(100) == (mode == "swap")


def test_a_step_that_fails_leaves_nothing_in_host_memory_to_trust() -> None:
    scheduler, runner, first, second = start_pair()
    batch = scheduler.schedule()
    assert batch.swap_out
    scheduler.discard(batch)
    scheduler.check_invariants()
    assert scheduler.kv.num_free_host_blocks == 8
    assert {first.state, second.state} == {RequestState.PREEMPTED}
    following = step(scheduler, runner)
    assert set(following.dropped_request_ids) == {"a", "b"}
    assert (following.swap_out, following.swap_in) == ((), ())
    drain(scheduler, runner)
    for request in (first, second):
        assert request.output_token_ids == expected_tokens(request)


@pytest.mark.parametrize("params", [{"prompt_logprobs": 0}, {"pooling": "mean", "max_tokens": 1}])
def test_what_every_token_gives_something_to_is_not_swapped(params: dict[str, object]) -> None:
    scheduler, runner = make_scheduler(
        num_blocks=4, num_host_blocks=8, preemption_mode="swap", max_num_batched_tokens=10
    )
    scheduler.add_request(make_request("a", (1,) * 8, max_tokens=6))
    whole = make_request("b", (2,) * 12, **params)  # type: ignore[arg-type]
    scheduler.add_request(whole)
    while scheduler.has_unfinished_requests():
        assert step(scheduler, runner).swap_out == ()
    assert whole.num_preemptions > 0
    assert whole.output_token_ids == expected_tokens(whole)


def test_only_what_was_computed_is_moved() -> None:
    kv = KVCacheManager(8, 4, num_host_blocks=8, reserved_tokens=32)
    request = make_request("a", prompt=5)
    kv.allocate(request, 5)
    request.num_computed_tokens = 5
    assert kv.swap_out(request)
    _, swap_out, _ = kv.take_moves()
    assert len(swap_out) == 2
    kv.check_invariants()


def test_many_requests_swap_in_turn_in_the_smallest_pool() -> None:
    scheduler, runner = make_scheduler(num_blocks=4, num_host_blocks=12, preemption_mode="swap")
    requests = [make_request(f"{i}", (i,) * 3, max_tokens=13, seed=i) for i in range(6)]
    for request in requests:
        scheduler.add_request(request)
    drain(scheduler, runner, max_steps=200)
    assert runner.num_computed_tokens == 6 * 15
    assert sum(request.num_preemptions for request in requests) > 3
    for request in requests:
        assert request.output_token_ids == expected_tokens(request)
