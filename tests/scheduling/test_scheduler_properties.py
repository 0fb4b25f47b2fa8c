"""The scheduler under random loads: no mechanism may change an answer, lose a block or a request.

``MockRunner`` checks every slot that a request reads, so a block shared, copied, moved or freed
wrongly shows at once; the state machine adds what must hold over whole lives.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from scheduling_mocks import MockRunner, drain, expected_tokens, make_request, step

from refengine.errors import RequestError
from refengine.request import Request
from refengine.scheduling.policies import POLICIES
from refengine.scheduling.scheduler import Scheduler, SchedulerConfig

MAX_MODEL_LEN = 40


@st.composite
def configs(draw: st.DrawFn) -> SchedulerConfig:
    """Small limits, so that everything runs short all the time."""
    block_size = draw(st.sampled_from([1, 2, 4, 16]))
    minimum = -(-MAX_MODEL_LEN // block_size)
    return SchedulerConfig(
        num_blocks=draw(st.integers(minimum, 3 * minimum)),
        block_size=block_size,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(1, 48)),
        enable_chunked_prefill=draw(st.booleans()),
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 1, 5])),
        policy=draw(st.sampled_from(sorted(POLICIES))),
        enable_prefix_caching=draw(st.booleans()),
        preemption_mode=draw(st.sampled_from(["recompute", "swap", "auto"])),
        num_host_blocks=draw(st.sampled_from([0, minimum, 4 * minimum])),
        swap_seconds_per_block=1.0,
        recompute_seconds_per_token=0.3,
        kv_allocation=draw(st.sampled_from(["paged", "paged", "static"])),
        batching=draw(st.sampled_from(["continuous", "continuous", "static", "none"])),
    )


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=30).map(tuple)


@settings(deadline=None, max_examples=100)
@given(
    config=configs(),
    loads=st.lists(st.tuples(prompts, st.integers(1, 9), st.integers(0, 2)), max_size=12),
)
def test_every_request_gets_its_own_tokens(
    config: SchedulerConfig, loads: list[tuple[tuple[int, ...], int, int]]
) -> None:
    scheduler = Scheduler(config)
    runner = MockRunner(config.num_blocks, config.block_size, config.num_host_blocks)
    requests = []
    for index, (prompt, max_tokens, priority) in enumerate(loads):
        request = make_request(f"{index}", prompt, max_tokens, priority=priority, seed=index)
        try:
            scheduler.add_request(request)
        except RequestError:
            assert len(prompt) > config.max_num_batched_tokens
            assert not config.enable_chunked_prefill
            continue
        requests.append(request)
    drain(scheduler, runner)
    for request in requests:
        assert request.output_token_ids == expected_tokens(request)
        assert request.num_output_tokens == request.sampling_params.max_tokens


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, aborts and ends at random moments, also while a step is being computed."""

    @initialize(config=configs())
    def start(self, config: SchedulerConfig) -> None:
        self.scheduler = Scheduler(config, clock=lambda: float(self.num_steps))
        self.runner = MockRunner(config.num_blocks, config.block_size, config.num_host_blocks)
        self.requests: list[Request] = []  # all that were accepted
        self.cut_short: set[str] = set()
        self.given: dict[str, int] = {}  # output tokens that a fork was born with
        self.num_steps = 0

    @rule(
        prompt=prompts,
        max_tokens=st.integers(1, 12),
        priority=st.integers(0, 2),
        salt=st.sampled_from([None, None, "x"]),
        samples=st.sampled_from([1, 1, 1, 2, 4]),
    )
    def arrive(
        self,
        prompt: tuple[int, ...],
        max_tokens: int,
        priority: int,
        salt: str | None,
        samples: int,
    ) -> None:
        config = self.scheduler.config
        if len(prompt) > config.max_num_batched_tokens and not config.enable_chunked_prefill:
            return
        requests = [
            make_request(
                f"{len(self.requests) + index}",
                prompt,
                max_tokens,
                priority=priority,
                cache_salt=salt,
                seed=index,
            )
            for index in range(samples)
        ]
        self.scheduler.add_request(requests[0], forks=requests[1:])
        self.requests += requests

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), token_id=st.integers(0, 49))
    def fork(self, data: st.DataObject, token_id: int) -> None:
        parent = data.draw(st.sampled_from(self.requests))
        if parent.is_finished:
            return
        child = make_request(f"{len(self.requests)}", parent.prompt_token_ids, 15, seed=9)
        child.cache_salt = parent.cache_salt
        child.output_token_ids = list(parent.output_token_ids)
        if child.output_token_ids:
            child.output_token_ids[-1] = token_id
        self.given[child.request_id] = len(child.output_token_ids)
        self.scheduler.fork_request(parent.request_id, child)
        self.requests.append(child)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), priority=st.integers(-1, 3))
    def change_priority(self, data: st.DataObject, priority: int) -> None:
        request = data.draw(st.sampled_from(self.requests))
        self.scheduler.set_priority(request.request_id, priority)

    @rule()
    def reset(self) -> None:
        self.scheduler.reset_prefix_cache()
        assert self.scheduler.kv.pool.num_indexed == 0

    @rule(count=st.integers(1, 4))
    def steps(self, count: int) -> None:
        for _ in range(count):
            step(self.scheduler, self.runner)
            self.num_steps += 1

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        was_finished = request.is_finished
        assert (self.scheduler.abort_request(request.request_id) is None) == was_finished
        if not was_finished:
            self.cut_short.add(request.request_id)
        assert self.scheduler.kv.block_ids(request.request_id) == ()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def end_during_a_step(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        batch = self.scheduler.schedule()
        output = self.runner.execute(batch)
        before = list(request.output_token_ids)
        if self.scheduler.finish_request(request.request_id, "stop", "text") is not None:
            self.cut_short.add(request.request_id)
            assert request not in self.scheduler.update(batch, output)
            assert request.output_token_ids == before
        else:
            self.scheduler.update(batch, output)

    @rule(executed=st.booleans())
    def fail(self, executed: bool) -> None:
        """A step is lost, before or after the runner has done it."""
        batch = self.scheduler.schedule()
        if executed:
            self.runner.execute(batch)
        self.scheduler.discard(batch)
        assert self.scheduler.num_running == 0

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_invariants()

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        drain(self.scheduler, self.runner)
        for request in self.requests:
            assert request.is_finished
            expected = expected_tokens(request, self.given.get(request.request_id, 0))
            expected = expected[: MAX_MODEL_LEN - request.num_prompt_tokens]
            if request.request_id in self.cut_short:
                assert request.output_token_ids == expected[: request.num_output_tokens]
            else:
                assert request.output_token_ids == expected


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)
