from __future__ import annotations

import pytest
from scheduling_mocks import drain, expected_tokens, make_request, make_scheduler, step

from refengine.errors import RequestError
from refengine.request import RequestState
from refengine.scheduling.scheduler import SchedulerConfig
from refengine.step import Decision, RequestStepOutput, ScheduledBatch, StepOutput


def shape(batch: ScheduledBatch) -> list[tuple[str, int, int, bool]]:
    """What a batch computes, in short."""
    return [(r.request_id, r.start, r.num_tokens, r.samples) for r in batch.requests]


def answer(batch: ScheduledBatch, token_id: int) -> StepOutput:
    """An output in which each request that samples gets this token."""
    return StepOutput(
        tuple(
            RequestStepOutput(r.request_id, (token_id,) if r.samples else ())
            for r in batch.requests
        )
    )


# ----- what a step holds


def test_one_request_from_prompt_to_last_token() -> None:
    scheduler, runner = make_scheduler()
    request = make_request("a", prompt=5, max_tokens=3, seed=7)
    scheduler.add_request(request)
    assert request.state is RequestState.WAITING
    first = step(scheduler, runner)
    assert first.step == 1
    assert shape(first) == [("a", 0, 5, True)]
    (new,) = first.new_requests
    assert (new.token_ids, new.num_prompt_tokens, new.seed) == (request.prompt_token_ids, 5, 7)
    assert len(first.requests[0].new_block_ids) == 2
    assert request.state is RequestState.RUNNING
    assert (request.first_scheduled_time, request.first_token_time) == (0, 1)
    second = step(scheduler, runner)
    assert shape(second) == [("a", 5, 1, True)]
    assert (second.new_requests, second.requests[0].new_block_ids) == ((), ())
    step(scheduler, runner)
    assert request.output_token_ids == expected_tokens(request)
    assert (request.state, request.finish_reason) == (RequestState.FINISHED, "length")
    assert request.num_computed_tokens == request.num_tokens - 1
    assert not scheduler.has_unfinished_requests()
    # What the runner has to forget goes out with the next batch, with the reason.
    last = scheduler.schedule()
    assert (last.requests, last.dropped_request_ids) == ((), ("a",))
    assert last.decisions == (Decision("a", "finished", "length"),)
    assert scheduler.update(last, StepOutput(())) == []


def test_update_returns_those_that_got_tokens() -> None:
    scheduler, runner = make_scheduler(max_num_batched_tokens=7)
    for request_id, prompt in (("a", 5), ("b", 4)):
        scheduler.add_request(make_request(request_id, prompt=prompt, max_tokens=1))
    batch = scheduler.schedule()
    changed = scheduler.update(batch, runner.execute(batch))
    assert [(r.request_id, r.is_finished) for r in changed] == [("a", True)]
    batch = scheduler.schedule()
    assert [r.request_id for r in scheduler.update(batch, runner.execute(batch))] == ["b"]


def test_decodes_and_pieces_of_prompts_share_a_step() -> None:
    scheduler, runner = make_scheduler(max_num_batched_tokens=6)
    scheduler.add_request(make_request("a", prompt=3, max_tokens=9))
    scheduler.add_request(make_request("b", prompt=9, max_tokens=9))
    scheduler.add_request(make_request("c", prompt=2, max_tokens=9))
    assert shape(step(scheduler, runner)) == [("a", 0, 3, True), ("b", 0, 3, False)]
    assert shape(step(scheduler, runner)) == [("a", 3, 1, True), ("b", 3, 5, False)]
    assert shape(step(scheduler, runner)) == [
        ("a", 4, 1, True),
        ("b", 8, 1, True),
        ("c", 0, 2, True),
    ]
    drain(scheduler, runner)


def test_without_chunked_prefill_a_prompt_waits_until_it_fits_whole() -> None:
    scheduler, runner = make_scheduler(max_num_batched_tokens=8, enable_chunked_prefill=False)
    scheduler.add_request(make_request("a", prompt=3, max_tokens=3))
    scheduler.add_request(make_request("b", prompt=8, max_tokens=2))
    scheduler.add_request(make_request("c", prompt=1, max_tokens=1))
    first = step(scheduler, runner)
    assert shape(first) == [("a", 0, 3, True)]
    assert first.decisions[-1] == Decision("b", "waits", "5 tokens are left in this step")
    step(scheduler, runner)
    step(scheduler, runner)
    assert shape(step(scheduler, runner)) == [("b", 0, 8, True)]
    drain(scheduler, runner)


def test_without_chunked_prefill_one_that_outgrew_a_step_still_resumes() -> None:
    scheduler, runner = make_scheduler(
        num_blocks=5, max_num_batched_tokens=6, enable_chunked_prefill=False
    )
    requests = [make_request(name, prompt=4, max_tokens=12) for name in "ab"]
    for request in requests:
        scheduler.add_request(request)
    drain(scheduler, runner, max_steps=60)
    assert requests[1].num_preemptions > 0
    for request in requests:
        assert request.output_token_ids == expected_tokens(request)


def test_max_num_seqs_bounds_who_runs() -> None:
    scheduler, runner = make_scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add_request(make_request(name, max_tokens=2))
    batch = step(scheduler, runner)
    assert [r.request_id for r in batch.requests] == ["a", "b"]
    assert batch.decisions == (
        Decision("a", "admitted", "computes 5 of 5 tokens"),
        Decision("b", "admitted", "computes 5 of 5 tokens"),
        Decision("c", "waits", "max_num_seqs is 2"),
    )
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    assert scheduler.get_num_unfinished_requests() == 3
    step(scheduler, runner)
    assert [r.request_id for r in step(scheduler, runner).requests] == ["c"]


def test_who_waits_for_blocks_is_not_overtaken() -> None:
    scheduler, runner = make_scheduler(num_blocks=4)
    scheduler.add_request(make_request("a", prompt=8, max_tokens=4))
    scheduler.add_request(make_request("b", prompt=12, max_tokens=1))
    scheduler.add_request(make_request("c", prompt=1, max_tokens=1))
    batch = step(scheduler, runner)
    assert [r.request_id for r in batch.requests] == ["a"]
    assert batch.decisions[-1] == Decision("b", "waits", "1 block short")
    drain(scheduler, runner)


# ----- preemption


def test_the_latest_arrival_gives_way_and_is_computed_again() -> None:
    scheduler, runner = make_scheduler(num_blocks=4)
    a, b, c = requests = [make_request(name, prompt=4, max_tokens=8) for name in "abc"]
    for request in requests:
        scheduler.add_request(request)
    assert len(step(scheduler, runner).requests) == 3
    batch = step(scheduler, runner)
    assert [r.request_id for r in batch.requests] == ["a", "b"]
    assert batch.dropped_request_ids == ("c",)
    assert Decision("c", "preempted", "latest arrival") in batch.decisions
    assert (c.state, c.num_computed_tokens, c.num_preemptions) == (RequestState.PREEMPTED, 0, 1)
    generated = list(c.output_token_ids)
    while c.state is not RequestState.RUNNING:
        batch = step(scheduler, runner)
    (new,) = (new for new in batch.new_requests if new.request_id == "c")
    assert new.token_ids == c.prompt_token_ids + tuple(generated)
    assert new.num_prompt_tokens == 4
    assert "resumed" in {d.action for d in batch.decisions if d.request_id == "c"}
    drain(scheduler, runner)
    assert (a.num_preemptions, b.num_preemptions > 0) == (0, True)
    for request in requests:
        assert request.output_token_ids == expected_tokens(request)


def test_the_last_in_order_preempts_only_itself() -> None:
    scheduler, runner = make_scheduler(num_blocks=4)
    scheduler.add_request(make_request("a", prompt=8, max_tokens=8))
    scheduler.add_request(make_request("b", prompt=8, max_tokens=2))
    step(scheduler, runner)
    a_grows = step(scheduler, runner)
    assert [r.request_id for r in a_grows.requests] == ["a"]
    assert scheduler.num_running == 1
    drain(scheduler, runner)


def test_a_preempted_request_comes_before_later_arrivals() -> None:
    scheduler, runner = make_scheduler(num_blocks=3, max_num_seqs=2)
    for name in "abc":
        scheduler.add_request(make_request(name, prompt=4, max_tokens=5))
    batch = step(scheduler, runner)
    while not batch.dropped_request_ids:
        batch = step(scheduler, runner)
    assert batch.dropped_request_ids == ("b",)
    order = []
    while scheduler.has_unfinished_requests():
        order += [new.request_id for new in step(scheduler, runner).new_requests]
    assert order[0] == "b"
    assert order[-1] == "c"


def test_the_smallest_pool_serves_everybody_in_turn() -> None:
    scheduler, runner = make_scheduler(num_blocks=3)
    requests = [make_request(f"{i}", prompt=5, max_tokens=8, seed=i) for i in range(6)]
    for request in requests:
        scheduler.add_request(request)
    drain(scheduler, runner, max_steps=200)
    for request in requests:
        assert request.output_token_ids == expected_tokens(request)


# ----- ends


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_end_of_sequence_ends_unless_ignored(ignore_eos: bool) -> None:
    scheduler, _ = make_scheduler()
    request = make_request("a", max_tokens=3, ignore_eos=ignore_eos, eos_token_ids=(9,))
    scheduler.add_request(request)
    for _ in range(3 if ignore_eos else 1):
        batch = scheduler.schedule()
        scheduler.update(batch, answer(batch, 9))
    assert request.is_finished
    assert request.output_token_ids == [9] * (3 if ignore_eos else 1)
    assert request.finish_reason == ("length" if ignore_eos else "stop")
    assert request.stop_reason is None


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_stop_token_ends_and_is_named(ignore_eos: bool) -> None:
    scheduler, _ = make_scheduler()
    request = make_request("a", stop_token_ids=(8, 9), ignore_eos=ignore_eos)
    scheduler.add_request(request)
    batch = scheduler.schedule()
    scheduler.update(batch, answer(batch, 9))
    assert (request.finish_reason, request.stop_reason) == ("stop", 9)


def test_nothing_stops_before_min_tokens() -> None:
    scheduler, _ = make_scheduler()
    request = make_request("a", max_tokens=6, min_tokens=3, stop_token_ids=(9,), eos_token_ids=(9,))
    scheduler.add_request(request)
    while not request.is_finished:
        batch = scheduler.schedule()
        scheduler.update(batch, answer(batch, 9))
    assert request.num_output_tokens == 3


@pytest.mark.parametrize("max_tokens", [None, 100])
def test_the_models_length_ends_a_request(max_tokens: int | None) -> None:
    scheduler, runner = make_scheduler(max_model_len=8, num_blocks=2)
    request = make_request("a", prompt=7, max_tokens=max_tokens)
    scheduler.add_request(request)
    drain(scheduler, runner)
    assert (request.num_tokens, request.finish_reason) == (8, "length")


def test_the_engine_may_finish_a_request() -> None:
    scheduler, runner = make_scheduler()
    request = make_request("a")
    scheduler.add_request(request)
    step(scheduler, runner)
    assert scheduler.finish_request("a", "stop", "END") is request
    assert (request.finish_reason, request.stop_reason) == ("stop", "END")
    assert scheduler.num_free_blocks == scheduler.num_blocks
    assert scheduler.finish_request("a", "stop") is None


def test_abort_frees_everything_at_once_in_any_state() -> None:
    scheduler, runner = make_scheduler(num_blocks=4, max_num_seqs=2)
    running, preempted, waiting = (
        make_request(name, prompt=6, max_tokens=6) for name in ("r", "p", "w")
    )
    for request in (running, preempted, waiting):
        scheduler.add_request(request)
    while preempted.state is not RequestState.PREEMPTED:
        step(scheduler, runner)
    for request in (preempted, running, waiting):
        assert scheduler.abort_request(request.request_id) is request
        scheduler.check_invariants()
        assert (request.state, request.finish_reason) == (RequestState.FINISHED, "abort")
    assert scheduler.abort_request("r") is None
    assert scheduler.num_free_blocks == 4
    assert not scheduler.has_unfinished_requests()
    # The runner forgot "p" when it was preempted, and never heard of "w".
    assert scheduler.schedule().dropped_request_ids == ("r",)


def test_what_is_computed_for_an_aborted_request_is_ignored() -> None:
    scheduler, runner = make_scheduler()
    aborted, other = make_request("a", prompt=4), make_request("b", prompt=4)
    scheduler.add_request(aborted)
    scheduler.add_request(other)
    batch = scheduler.schedule()
    output = runner.execute(batch)
    scheduler.abort_request("a")
    # Its id may even be in use again.
    again = make_request("a", prompt=(1, 2, 3))
    scheduler.add_request(again)
    assert scheduler.update(batch, output) == [other]
    scheduler.check_invariants()
    assert (aborted.output_token_ids, again.output_token_ids) == ([], [])
    assert again.num_computed_tokens == 0
    following = step(scheduler, runner)
    assert following.dropped_request_ids == ("a",)
    assert [new.token_ids for new in following.new_requests] == [(1, 2, 3)]
    drain(scheduler, runner)
    assert again.output_token_ids == expected_tokens(again)


# ----- refusals


@pytest.mark.parametrize(
    ("fields", "prompt", "max_tokens", "numbers"),
    [
        ({}, 0, 1, ["empty"]),
        ({"max_model_len": 8}, 9, 1, ["9 tokens", "max_model_len is 8"]),
        ({"max_model_len": 8}, 8, 1, ["8 tokens", "at least 1 new token"]),
        ({"num_blocks": 3}, 5, 9, ["14 tokens", "4 blocks of 4", "cache has 3"]),
        ({"num_blocks": 3}, 5, None, ["64 tokens", "16 blocks of 4"]),
        (
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 6},
            7,
            1,
            ["7 tokens", "takes 6"],
        ),
    ],
)
def test_what_can_never_fit_is_refused_with_the_numbers(
    fields: dict[str, object], prompt: int, max_tokens: int | None, numbers: list[str]
) -> None:
    scheduler, _ = make_scheduler(**fields)
    with pytest.raises(RequestError) as error:
        scheduler.add_request(make_request("a", prompt=prompt, max_tokens=max_tokens))
    for number in ["'a'", *numbers]:
        assert number in str(error.value)
    assert not scheduler.has_unfinished_requests()
    scheduler.check_invariants()


@pytest.mark.parametrize(
    ("fields", "prompt", "max_tokens"),
    [
        ({"max_model_len": 8}, 7, 9),
        ({"num_blocks": 3}, 5, 8),  # 13 tokens, and the last is never written: 12 slots
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 6}, 6, 3),
    ],
)
def test_what_just_fits_is_served(fields: dict[str, object], prompt: int, max_tokens: int) -> None:
    scheduler, runner = make_scheduler(**fields)
    scheduler.add_request(make_request("a", prompt=prompt, max_tokens=max_tokens))
    drain(scheduler, runner)


def test_an_id_in_use_is_refused() -> None:
    scheduler, _ = make_scheduler()
    scheduler.add_request(make_request("a"))
    with pytest.raises(RequestError, match="'a' is already being served"):
        scheduler.add_request(make_request("a"))


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("num_blocks", 1),
        ("block_size", 1),
        ("max_model_len", 1),
        ("max_num_seqs", 1),
        ("max_num_batched_tokens", 1),
        ("max_queue", 1),
        ("long_prefill_token_threshold", 0),
        ("num_host_blocks", 0),
        ("swap_seconds_per_block", 0),
        ("recompute_seconds_per_token", 0),
    ],
)
def test_a_config_checks_its_numbers(name: str, least: int) -> None:
    SchedulerConfig(**({"num_blocks": 4} | {name: least}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{name} must be at least {least}, got {least - 1}"):
        SchedulerConfig(**({"num_blocks": 4} | {name: least - 1}))  # type: ignore[arg-type]


# ----- misuse by the engine


def test_update_wants_the_batch_that_was_planned() -> None:
    scheduler, runner = make_scheduler()
    for name in "ab":
        scheduler.add_request(make_request(name))
    batch = scheduler.schedule()
    with pytest.raises(RuntimeError, match="step 1 was planned and never given to update"):
        scheduler.schedule()
    output = runner.execute(batch)
    scheduler.update(batch, output)
    with pytest.raises(ValueError, match="step 1 is not being computed"):
        scheduler.update(batch, output)


def test_a_step_that_failed_is_computed_again() -> None:
    scheduler, runner = make_scheduler(enable_prefix_caching=True)
    gone, *requests = [make_request(name, prompt=6, seed=i) for i, name in enumerate("xab")]
    scheduler.add_request(gone)
    step(scheduler, runner)
    scheduler.abort_request("x")
    for request in requests:
        scheduler.add_request(request)
    batch = scheduler.schedule()
    assert batch.dropped_request_ids == ("x",)
    scheduler.discard(batch)
    scheduler.discard(batch)
    scheduler.check_invariants()
    assert scheduler.num_free_blocks == scheduler.num_blocks
    following = step(scheduler, runner)
    assert following.dropped_request_ids[0] == "x"
    assert shape(following) == [("a", 4, 2, True), ("b", 4, 2, True)]
    drain(scheduler, runner)
    for request in requests:
        assert request.output_token_ids == expected_tokens(request)


def test_update_wants_one_answer_each_in_order() -> None:
    for mend in (lambda answers: answers[::-1], lambda answers: answers[:1]):
        scheduler, runner = make_scheduler()
        for name in "ab":
            scheduler.add_request(make_request(name))
        batch = scheduler.schedule()
        output = runner.execute(batch)
        with pytest.raises(ValueError, match=r"answered for request 'b'|shorter"):
            scheduler.update(batch, StepOutput(mend(output.requests)))
