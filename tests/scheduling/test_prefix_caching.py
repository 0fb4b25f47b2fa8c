from __future__ import annotations

import pytest
from scheduling_mocks import MockRunner, drain, expected_tokens, make_request, make_scheduler, step

from refengine.request import Request
from refengine.scheduling.scheduler import Scheduler


def make(**fields: object) -> tuple[Scheduler, MockRunner]:
    return make_scheduler(**({"enable_prefix_caching": True} | fields))


def serve(scheduler: Scheduler, runner: MockRunner, *requests: Request) -> None:
    """Serve requests to their ends, and see that each got its own tokens."""
    for request in requests:
        scheduler.add_request(request)
    drain(scheduler, runner)
    for request in requests:
        assert request.output_token_ids == expected_tokens(request)


@pytest.mark.parametrize(
    ("prompt", "hit"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12)]
)
def test_full_blocks_are_found_and_the_last_token_is_computed_again(prompt: int, hit: int) -> None:
    scheduler, runner = make()
    serve(scheduler, runner, make_request("a", prompt=prompt))
    assert scheduler.num_hit_tokens == 0
    computed = runner.num_computed_tokens
    again = make_request("b", prompt=prompt)
    serve(scheduler, runner, again)
    assert again.num_cached_tokens == scheduler.num_hit_tokens == hit
    assert scheduler.num_queried_tokens == 2 * prompt
    assert runner.num_computed_tokens == 2 * computed - hit


def test_without_prefix_caching_nothing_is_found() -> None:
    scheduler, runner = make(enable_prefix_caching=False)
    serve(scheduler, runner, make_request("a", prompt=9))
    again = make_request("b", prompt=9)
    serve(scheduler, runner, again)
    assert (again.num_cached_tokens, scheduler.num_hit_tokens) == (0, 0)


def test_generated_tokens_are_found_too() -> None:
    scheduler, runner = make()
    first = make_request("a", prompt=5, max_tokens=8)
    serve(scheduler, runner, first)
    turn = make_request("b", prompt=(*first.token_ids(), 1, 2, 3))
    serve(scheduler, runner, turn)
    # 13 tokens, of which the last was never computed: three full blocks.
    assert turn.num_cached_tokens == 12


def test_a_block_is_found_only_by_the_tokens_before_it_as_well() -> None:
    scheduler, runner = make()
    serve(scheduler, runner, make_request("a", prompt=(1, 1, 1, 1, 2, 2, 2, 2, 3)))
    other = make_request("b", prompt=(9, 1, 1, 1, 2, 2, 2, 2, 3))
    serve(scheduler, runner, other)
    assert other.num_cached_tokens == 0
    part = make_request("c", prompt=(1, 1, 1, 1, 2, 2, 9, 2, 3))
    serve(scheduler, runner, part)
    assert part.num_cached_tokens == 4


def test_requests_of_different_salts_share_nothing() -> None:
    scheduler, runner = make()
    for name, salt, hit in (
        ("a", None, 0),
        ("b", "x", 0),
        ("c", "y", 0),
        ("d", "", 0),
        ("e", "None", 0),
        ("f", "x", 8),
        ("g", None, 8),
    ):
        request = make_request(name, prompt=9, cache_salt=salt)
        serve(scheduler, runner, request)
        assert request.num_cached_tokens == hit, name


def test_blocks_are_shared_while_their_owner_runs() -> None:
    scheduler, runner = make()
    first = make_request("a", prompt=9, max_tokens=20)
    scheduler.add_request(first)
    step(scheduler, runner)
    second = make_request("b", prompt=9, max_tokens=20, seed=1)
    scheduler.add_request(second)
    batch = step(scheduler, runner)
    assert [(r.request_id, r.start, r.num_tokens) for r in batch.requests] == [
        ("a", 9, 1),
        ("b", 8, 1),
    ]
    assert batch.new_requests[0].num_computed_tokens == 8
    assert scheduler.kv.block_ids("a")[:2] == scheduler.kv.block_ids("b")[:2]
    assert scheduler.kv.block_ids("a")[2] != scheduler.kv.block_ids("b")[2]
    assert batch.decisions[-1].reason == "computes 1 of 9 tokens, 8 are there already"
    scheduler.abort_request("a")
    drain(scheduler, runner)
    assert second.output_token_ids == expected_tokens(second)


def test_what_a_step_computes_is_found_only_after_its_update() -> None:
    scheduler, runner = make()
    requests = [make_request(name, prompt=9, seed=i) for i, name in enumerate("ab")]
    serve(scheduler, runner, *requests)
    assert [request.num_cached_tokens for request in requests] == [0, 0]
    # A step whose output never comes leaves nothing to be found.
    gone = make_request("c", prompt=(7,) * 9)
    scheduler.add_request(gone)
    batch = scheduler.schedule()
    scheduler.abort_request("c")
    scheduler.update(batch, runner.execute(batch))
    again = make_request("d", prompt=(7,) * 9)
    serve(scheduler, runner, again)
    assert again.num_cached_tokens == 0


def test_pieces_of_a_prompt_are_found_as_they_are_computed() -> None:
    scheduler, runner = make(max_num_batched_tokens=6)
    scheduler.add_request(make_request("a", prompt=20))
    step(scheduler, runner)
    step(scheduler, runner)
    assert len(scheduler.kv.match_prefix(make_request("b", prompt=20))) == 3
    scheduler.kv.free("b")
    drain(scheduler, runner)


@pytest.mark.parametrize("params", [{"prompt_logprobs": 1}, {"pooling": "mean", "max_tokens": 1}])
def test_what_every_token_gives_something_to_is_computed_whole(params: dict[str, object]) -> None:
    scheduler, runner = make()
    serve(scheduler, runner, make_request("a", prompt=9))
    asking = make_request("b", prompt=9, **params)  # type: ignore[arg-type]
    serve(scheduler, runner, asking)
    assert asking.num_cached_tokens == 0


def test_the_ends_of_prefixes_are_evicted_first() -> None:
    scheduler, runner = make(num_blocks=6)
    serve(scheduler, runner, make_request("a", prompt=17, max_tokens=1))
    # Four full blocks of "a" are left; five blocks now go to "b", two of which were never found.
    serve(scheduler, runner, make_request("b", prompt=(1,) * 16, max_tokens=1))
    again = make_request("c", prompt=17, max_tokens=1)
    serve(scheduler, runner, again)
    assert again.num_cached_tokens == 8


def test_reset_forgets_what_was_computed_before_also_by_running_requests() -> None:
    scheduler, runner = make()
    running = make_request("a", prompt=6, max_tokens=30)
    scheduler.add_request(running)
    step(scheduler, runner)
    scheduler.reset_prefix_cache()
    scheduler.check_invariants()
    drain(scheduler, runner)
    assert running.output_token_ids == expected_tokens(running)
    assert scheduler.kv.pool.num_indexed == 0
    serve(scheduler, runner, make_request("b", prompt=9))
    assert scheduler.num_hit_tokens == 0
    serve(scheduler, runner, make_request("c", prompt=9))
    assert scheduler.num_hit_tokens == 8


def test_a_preempted_request_finds_what_is_left_of_its_own_blocks() -> None:
    scheduler, runner = make(num_blocks=5)
    requests = [make_request(name, (i,) * 8, max_tokens=6) for i, name in enumerate("ab")]
    serve(scheduler, runner, *requests)
    assert requests[1].num_preemptions == 1
    # Resuming is no new query, and what it finds is no hit.
    assert (scheduler.num_queried_tokens, scheduler.num_hit_tokens) == (16, 0)
    assert runner.num_computed_tokens < 2 * 13 + 8


def test_hits_count_against_the_free_blocks_that_they_take() -> None:
    scheduler, runner = make(num_blocks=5)
    serve(scheduler, runner, make_request("a", prompt=9, max_tokens=1))
    scheduler.add_request(make_request("b", prompt=(5,) * 8, max_tokens=4))
    # Three blocks are free, two of them those that "c" would find: it needs a third and a fourth.
    late = make_request("c", prompt=tuple(range(100, 109)) + (0,) * 4, max_tokens=1)
    scheduler.add_request(late)
    batch = step(scheduler, runner)
    assert [r.request_id for r in batch.requests] == ["b"]
    assert batch.decisions[-1].reason == "1 block short"
    drain(scheduler, runner)
    assert late.output_token_ids == expected_tokens(late)
