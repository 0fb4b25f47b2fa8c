from __future__ import annotations

import pytest
from scheduling_mocks import MockRunner, drain, expected_tokens, make_request, make_scheduler, step

from refengine.errors import RequestError
from refengine.request import Request, RequestState


def samples(count: int, **fields: object) -> list[Request]:
    """Requests of one prompt that differ in their seeds."""
    return [make_request(f"s{i}", seed=i, **fields) for i in range(count)]  # type: ignore[arg-type]


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("prompt", [1, 2, 4, 5, 7, 8, 9])
def test_samples_share_the_prompt_and_copy_what_they_write(prompt: int, caching: bool) -> None:
    scheduler, runner = make_scheduler(enable_prefix_caching=caching)
    first, *others = requests = samples(3, prompt=prompt, max_tokens=6)
    scheduler.add_request(first, forks=others)
    assert scheduler.get_num_unfinished_requests() == scheduler.num_waiting == 3
    assert [r.request_id for r in step(scheduler, runner).requests] == ["s0"]
    shared = (prompt - 1) // 4
    partial = (prompt - 1) % 4 > 0
    batch = step(scheduler, runner)
    assert [(r.request_id, r.start, r.num_tokens) for r in batch.requests] == [
        ("s0", prompt, 1),
        ("s1", prompt - 1, 1),
        ("s2", prompt - 1, 1),
    ]
    assert [other.num_cached_tokens for other in others] == [prompt - 1] * 2
    assert {d.action for d in batch.decisions} == {"forked"}
    # Whoever writes first copies; the last one to write has the block for itself. A parent that
    # goes on in the next block does not write, so both children copy.
    assert len(batch.block_copies) == (2 if partial else 0)
    tables = [scheduler.kv.block_ids(request.request_id) for request in requests]
    for table in tables[1:]:
        assert table[:shared] == tables[0][:shared]
    owned = [block for table in tables for block in table[shared:]]
    assert len(owned) == len(set(owned))
    parent_copies = partial and prompt % 4 > 0
    assert batch.requests[0].new_blocks_start == (shared if parent_copies else None)
    drain(scheduler, runner)
    for request in requests:
        assert request.output_token_ids == expected_tokens(request)


def test_a_copy_replaces_the_shared_block_in_the_runners_table() -> None:
    scheduler, runner = make_scheduler()
    first, second = samples(2, prompt=6, max_tokens=6)
    scheduler.add_request(first, forks=[second])
    step(scheduler, runner)
    before = scheduler.kv.block_ids("s0")
    batch = step(scheduler, runner)
    ((source, copy),) = batch.block_copies
    assert (source, copy) == (before[1], scheduler.kv.block_ids("s0")[1])
    assert (batch.requests[0].new_blocks_start, batch.requests[0].new_block_ids) == (1, (copy,))
    assert scheduler.kv.block_ids("s1") == before
    drain(scheduler, runner)


@pytest.mark.parametrize("caching", [False, True])
def test_samples_outlive_a_parent_that_ends_with_its_first_token(caching: bool) -> None:
    scheduler, runner = make_scheduler(enable_prefix_caching=caching)
    parent = make_request("p", prompt=8, max_tokens=1)
    child = make_request("c", prompt=8, max_tokens=5, seed=1)
    scheduler.add_request(parent, forks=[child])
    drain(scheduler, runner)
    assert child.output_token_ids == expected_tokens(child)
    assert child.num_cached_tokens == 7


@pytest.mark.parametrize("state", ["waiting", "running"])
def test_samples_outlive_a_parent_that_is_aborted_before_its_first_token(state: str) -> None:
    scheduler, runner = make_scheduler(max_num_batched_tokens=4)
    parent, *children = samples(3, prompt=9, max_tokens=3)
    scheduler.add_request(parent, forks=children)
    if state == "running":
        step(scheduler, runner)
    scheduler.abort_request("s0")
    scheduler.check_invariants()
    drain(scheduler, runner)
    for child in children:
        assert child.output_token_ids == expected_tokens(child)


def test_a_sample_may_be_aborted_while_it_waits_for_the_prompt() -> None:
    scheduler, runner = make_scheduler()
    parent, aborted, other = samples(3, prompt=9)
    scheduler.add_request(parent, forks=[aborted, other])
    assert scheduler.abort_request("s1") is aborted
    scheduler.check_invariants()
    drain(scheduler, runner)
    assert aborted.output_token_ids == []
    assert other.output_token_ids == expected_tokens(other)


def test_samples_without_a_seat_queue_as_any_other() -> None:
    scheduler, runner = make_scheduler(max_num_seqs=2)
    requests = samples(5, prompt=9, max_tokens=6)
    scheduler.add_request(requests[0], forks=requests[1:])
    step(scheduler, runner)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 3)
    drain(scheduler, runner)
    for request in requests:
        assert request.output_token_ids == expected_tokens(request)


def test_samples_in_the_smallest_pool() -> None:
    scheduler, runner = make_scheduler(num_blocks=4, enable_prefix_caching=True)
    requests = samples(4, prompt=8, max_tokens=9)
    scheduler.add_request(requests[0], forks=requests[1:])
    drain(scheduler, runner, max_steps=200)
    assert sum(request.num_preemptions for request in requests) > 0
    for request in requests:
        assert request.output_token_ids == expected_tokens(request)


def beam(parent: Request, name: str, token_id: int) -> Request:
    """A request that goes on where another stands, with another last token."""
    child = make_request(name, parent.prompt_token_ids, max_tokens=20)
    child.output_token_ids = [*parent.output_token_ids[:-1], token_id]
    return child


def test_beams_fork_and_end_at_every_step() -> None:
    scheduler, runner = make_scheduler(enable_prefix_caching=True)
    root = make_request("0", prompt=6, max_tokens=20)
    scheduler.add_request(root)
    step(scheduler, runner)
    beams = [root]
    for depth in range(9):
        children = []
        for index, parent in enumerate(beams[:2]):
            for token_id in (depth, 40):
                child = beam(parent, f"{depth}.{index}.{token_id}", token_id)
                scheduler.fork_request(parent.request_id, child)
                children.append(child)
        for parent in beams:
            scheduler.finish_request(parent.request_id, "stop")
        beams = children
        scheduler.check_invariants()
        batch = step(scheduler, runner)
        # Each beam computes its newest token alone: all before it is shared or copied.
        assert [r.num_tokens for r in batch.requests] == [1] * len(beams)
        assert len(batch.block_copies) <= len(beams)
    for one in beams:
        scheduler.abort_request(one.request_id)
    assert scheduler.num_free_blocks == scheduler.num_blocks


def test_forking_what_does_not_run_queues_the_child() -> None:
    scheduler, runner = make_scheduler()
    scheduler.add_request(make_request("a", prompt=6))
    child = make_request("b", prompt=6, seed=1)
    scheduler.fork_request("a", child)
    assert child.state is RequestState.WAITING
    drain(scheduler, runner)
    assert child.output_token_ids == expected_tokens(child)


def test_what_can_not_be_forked_is_refused_and_leaves_nothing() -> None:
    scheduler, runner = make_scheduler()
    scheduler.add_request(make_request("a", prompt=6))
    step(scheduler, runner)
    with pytest.raises(RequestError, match="no request 'x' for 'b' to fork"):
        scheduler.fork_request("x", make_request("b", prompt=6))
    with pytest.raises(RequestError, match="can't fork 'a': their first 6 tokens or their salts"):
        scheduler.fork_request("a", make_request("b", prompt=(9,) * 7))
    with pytest.raises(RequestError, match="their first 6 tokens or their salts"):
        scheduler.fork_request("a", make_request("b", prompt=7, cache_salt="x"))
    with pytest.raises(RequestError, match="'a' is already being served"):
        scheduler.fork_request("a", make_request("a", prompt=6))
    with pytest.raises(RequestError, match="can't fork 'c'"):
        scheduler.add_request(make_request("c", prompt=6), forks=[make_request("d", prompt=5)])
    twins = [make_request("d", prompt=6), make_request("d", prompt=6)]
    with pytest.raises(RequestError, match="'d' is already being served"):
        scheduler.add_request(make_request("c", prompt=6), forks=twins)
    scheduler.check_invariants()
    assert scheduler.get_num_unfinished_requests() == 1


def test_a_lone_child_takes_its_shared_block_out_of_the_index_instead_of_copying() -> None:
    # The pool holds just one request at its full length: there is no room for a copy.
    scheduler, runner = make_scheduler(
        num_blocks=3, enable_prefix_caching=True, max_model_len=13, max_num_seqs=2
    )
    parent = make_request("p", prompt=8, max_tokens=5)
    child = make_request("c", prompt=8, max_tokens=5, seed=1)
    scheduler.add_request(parent, forks=[child])
    step(scheduler, runner)
    scheduler.abort_request("p")
    batch = step(scheduler, runner)
    assert batch.block_copies == ()
    assert [(r.request_id, r.start) for r in batch.requests] == [("c", 7)]
    drain(scheduler, runner)
    assert child.output_token_ids == expected_tokens(child)


def test_a_child_that_turns_off_earlier_does_not_spoil_what_others_find() -> None:
    scheduler, runner = make_scheduler(enable_prefix_caching=True)
    parent = make_request("p", prompt=6, max_tokens=8)
    scheduler.add_request(parent)
    for _ in range(6):
        step(scheduler, runner)
    child = make_request("c", prompt=6, max_tokens=6)
    child.output_token_ids = [parent.output_token_ids[0], 49 - parent.output_token_ids[1]]
    scheduler.fork_request("p", child)
    scheduler.abort_request("p")
    # The child writes its eighth token where the parent's lies, in a block that could be found.
    assert step(scheduler, runner).block_copies == ()
    again = make_request("a", prompt=parent.token_ids(0, 9), max_tokens=2)
    scheduler.add_request(again)
    drain(scheduler, runner)
    assert again.num_cached_tokens == 4
    assert again.output_token_ids == expected_tokens(again)
    assert child.output_token_ids == expected_tokens(child, num_given=2)


def test_a_fork_of_what_was_computed_before_a_reset_is_not_found() -> None:
    scheduler, runner = make_scheduler(enable_prefix_caching=True)
    parent, child = samples(2, prompt=9, max_tokens=12)
    scheduler.add_request(parent)
    step(scheduler, runner)
    scheduler.reset_prefix_cache()
    scheduler.fork_request("s0", child)
    drain(scheduler, runner)
    assert scheduler.kv.pool.num_indexed == 0


def test_mock_runner_sees_a_missing_copy() -> None:
    """The check that these tests stand on: without the copy, a read is wrong."""

    class Forgetful(MockRunner):
        def move(self, batch):  # type: ignore[no-untyped-def]
            pass

    scheduler, _ = make_scheduler()
    runner = Forgetful(64, 4)
    first, second = samples(2, prompt=6, max_tokens=6)
    scheduler.add_request(first, forks=[second])
    with pytest.raises(AssertionError, match="reads a wrong slot"):
        drain(scheduler, runner)
