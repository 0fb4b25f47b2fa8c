"""Scheduler: what each step computes, for whom, and in which blocks.

There is no prefill phase and no decode phase. Each step brings every request's
``num_computed_tokens`` nearer to its ``num_tokens``, inside a budget of tokens: decodes and pieces
of prompts mix in one batch (continuous batching, Yu et al. 2022, Orca, section 3; chunked prefill,
Agrawal et al. 2024, Sarathi-Serve, arXiv 2403.02310, section 4).

The engine's loop is ``batch = schedule()``, ``output = runner.execute(batch)``, ``update(batch,
output)``. Every batch must reach the runner, also one with no requests: it names what to forget.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass

from refengine.errors import RequestError
from refengine.request import Request, RequestState
from refengine.scheduling.kv_cache_manager import KVCacheManager
from refengine.scheduling.policies import Policy, load_policy
from refengine.step import Decision, NewRequest, ScheduledBatch, ScheduledRequest, StepOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits and choices of a scheduler.

    Raises:
        ValueError: where a number is below 1, or no policy has this name.
    """

    num_blocks: int  # of the KV cache
    block_size: int = 16  # tokens
    max_model_len: int = 2048  # tokens that a request may have, prompt and output
    max_num_seqs: int = 256  # requests in one step
    max_num_batched_tokens: int = 2048  # tokens in one step
    enable_chunked_prefill: bool = True  # False: a prompt is computed in one step or not at all
    policy: str = "fcfs"

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("num_blocks", "block_size", "max_model_len", "max_num_seqs",
                     "max_num_batched_tokens"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        load_policy(self.policy)


class _Plan:
    """A step while it is being planned."""

    __slots__ = ("budget", "in_flight", "new_requests", "requests")

    def __init__(self, budget: int) -> None:
        self.budget = budget  # tokens that the step may still take
        self.requests: list[ScheduledRequest] = []
        self.in_flight: list[Request] = []  # the same requests, as the scheduler knows them
        self.new_requests: list[NewRequest] = []

    def add(self, request: Request, num_tokens: int, new_block_ids: tuple[int, ...]) -> None:
        """Compute the next ``num_tokens`` tokens of a request."""
        start = request.num_computed_tokens
        samples = start + num_tokens == request.num_tokens
        self.budget -= num_tokens
        self.in_flight.append(request)
        self.requests.append(
            ScheduledRequest(request.request_id, start, num_tokens, new_block_ids, samples)
        )


class Scheduler:
    """Keeps the requests, and plans steps; it never sees a tensor or a model.

    Args:
        config: limits and choices.
        clock: seconds, for ``first_scheduled_time`` and ``first_token_time``.
        policy: instead of the one that ``config.policy`` names.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        policy: Policy | None = None,
    ) -> None:
        self.config = config
        self.policy = load_policy(config.policy) if policy is None else policy
        self.kv = KVCacheManager(config.num_blocks, config.block_size)
        self._clock = clock
        self._requests: dict[str, Request] = {}  # all that are not finished
        # Both in the policy's order. An entry is (key, arrival index, request): no two are equal.
        self._waiting: list[tuple[float, int, Request]] = []
        self._running: list[Request] = []
        self._max_tokens: dict[str, int] = {}  # tokens at which a request ends
        self._step = 0
        self._num_arrivals = 0
        self._in_flight: dict[int, list[Request]] = {}  # by step
        self._known: set[str] = set()  # to the runner
        self._dropped: list[str] = []  # since the last step
        self._decisions: list[Decision] = []  # since the last step

    @property
    def num_waiting(self) -> int:
        """Requests that wait, preempted ones included."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold blocks and are served."""
        return len(self._running)

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache."""
        return self.kv.pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no request holds."""
        return self.kv.pool.num_free

    def get_num_unfinished_requests(self) -> int:
        """Requests that wait or run."""
        return len(self._requests)

    def has_unfinished_requests(self) -> bool:
        """Whether there is anything to schedule."""
        return bool(self._requests)

    def add_request(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: if it could never be served, with the numbers; or if its id is taken.
        """
        limit = self._check_fits(request)
        request.arrival_index = self._num_arrivals
        self._num_arrivals += 1
        self._requests[request.request_id] = request
        self._max_tokens[request.request_id] = limit
        request.state = RequestState.WAITING
        insort(self._waiting, self._entry(request))

    def abort_request(self, request_id: str) -> Request | None:
        """End a request in any state, and free what it holds at once.

        A step that is being computed for it is ignored by ``update``.

        Returns:
            The request, or None if there is no such request (any more).
        """
        return self.finish_request(request_id, "abort")

    def finish_request(
        self, request_id: str, reason: str, stop_reason: int | str | None = None
    ) -> Request | None:
        """End a request for a reason that the scheduler can't see, such as a stop text.

        Returns:
            The request, or None if there is no such request (any more).
        """
        request = self._requests.get(request_id)
        if request is not None:
            if request.state is RequestState.RUNNING:
                self._running.remove(request)
            else:
                self._remove_waiting(request)
            self._finish(request, reason, stop_reason)
        return request

    def schedule(self) -> ScheduledBatch:
        """Plan the next step.

        Raises:
            RuntimeError: if the step before has not come back to ``update``.
        """
        if self._in_flight:
            raise RuntimeError(f"step {self._step} was planned and never given to update()")
        self._step += 1
        plan = _Plan(self.config.max_num_batched_tokens)
        # 1 Running requests go on, in order; where blocks run out, the last in order give way.
        preempted = self._schedule_running(plan)
        # 2 Waiting requests take what is left, unless someone has just had to give way.
        if not preempted:
            self._schedule_waiting(plan)
        # 3 The plan becomes plain data.
        batch = ScheduledBatch(
            step=self._step,
            requests=tuple(plan.requests),
            new_requests=tuple(plan.new_requests),
            dropped_request_ids=tuple(self._dropped),
            decisions=tuple(self._decisions),
        )
        self._in_flight[self._step] = plan.in_flight
        self._dropped.clear()
        self._decisions.clear()
        return batch

    def update(self, batch: ScheduledBatch, output: StepOutput) -> list[Request]:
        """Take in what a step computed.

        Returns:
            The requests that got tokens or finished, in the batch's order.

        Raises:
            ValueError: if the output is not one entry for each scheduled request, in order.
        """
        in_flight = self._in_flight.pop(batch.step, None)
        if in_flight is None:
            raise ValueError(f"step {batch.step} is not being computed")
        now = self._clock()
        changed: list[Request] = []
        num_finished = 0
        for request, scheduled, result in zip(
            in_flight, batch.requests, output.requests, strict=True
        ):
            if result.request_id != scheduled.request_id:
                raise ValueError(
                    f"the runner answered for request {result.request_id!r} where request "
                    f"{scheduled.request_id!r} was scheduled"
                )
            if request.state is not RequestState.RUNNING:
                continue  # aborted while the step was computed
            request.num_computed_tokens = scheduled.start + scheduled.num_tokens
            if not scheduled.samples:
                continue
            changed.append(request)
            if request.first_token_time is None:
                request.first_token_time = now
            for token_id in result.token_ids:
                request.output_token_ids.append(token_id)
                if self._finish_if_done(request, token_id):
                    num_finished += 1
                    break
        if num_finished:
            self._running = [r for r in self._running if r.state is RequestState.RUNNING]
        return changed

    def discard(self, batch: ScheduledBatch) -> None:
        """Take back a step that the runner could not finish.

        Nobody knows how much of it was done, so nothing that lies in blocks is trusted: every
        running request is preempted and computes its tokens again.
        """
        if self._in_flight.pop(batch.step, None) is None:
            return
        for request in list(self._running):
            self._preempt(request, "its step was not finished")
        self._dropped[:0] = batch.dropped_request_ids

    def check_invariants(self) -> None:
        """Walk everything; a test calls this after every step.

        Raises:
            RuntimeError: naming the first rule that is broken.
        """
        self.kv.check_invariants()
        waiting = [request for _, _, request in self._waiting]
        known = {request.request_id for request in waiting + self._running}
        if known != self._requests.keys() or len(waiting) + len(self._running) != len(known):
            raise RuntimeError("a request is neither waiting nor running, or is both")
        if self._waiting != sorted(self._waiting):
            raise RuntimeError("the queue is out of order")
        if self._running != sorted(self._running, key=self._entry):
            raise RuntimeError("the running requests are out of order")
        if len(self._running) > self.config.max_num_seqs:
            raise RuntimeError(
                f"{len(self._running)} requests run, max_num_seqs is {self.config.max_num_seqs}"
            )
        for request in waiting:
            if request.state not in (RequestState.WAITING, RequestState.PREEMPTED):
                raise RuntimeError(f"request {request.request_id!r} waits as {request.state}")
            if self.kv.block_ids(request.request_id):
                raise RuntimeError(f"request {request.request_id!r} waits and holds blocks")
        for request in self._running:
            if request.state is not RequestState.RUNNING:
                raise RuntimeError(f"request {request.request_id!r} runs as {request.state}")
            held = len(self.kv.block_ids(request.request_id)) * self.config.block_size
            if held < request.num_computed_tokens:
                raise RuntimeError(
                    f"request {request.request_id!r} has computed {request.num_computed_tokens} "
                    f"tokens in {held} slots"
                )
        if not self._requests and self.num_free_blocks != self.num_blocks:
            raise RuntimeError("blocks are in use, and there are no requests")

    def _check_fits(self, request: Request) -> int:
        """Refuse what could never be served; otherwise return the tokens at which it ends."""
        config, name = self.config, f"request {request.request_id!r}"
        prompt = request.num_prompt_tokens
        if request.request_id in self._requests:
            raise RequestError(f"{name} is already being served: give each request its own id")
        if prompt == 0:
            raise RequestError(f"{name} has an empty prompt: give it at least 1 token")
        if prompt >= config.max_model_len:
            raise RequestError(
                f"{name} has a prompt of {prompt} tokens, and max_model_len is "
                f"{config.max_model_len}, prompt and at least 1 new token together: shorten the "
                "prompt or raise max_model_len"
            )
        if prompt > config.max_num_batched_tokens and not config.enable_chunked_prefill:
            raise RequestError(
                f"{name} has a prompt of {prompt} tokens, a step takes "
                f"{config.max_num_batched_tokens} (max_num_batched_tokens) and chunked prefill is "
                "off: shorten the prompt, raise the limit or enable chunked prefill"
            )
        max_tokens = request.sampling_params.max_tokens
        limit = config.max_model_len
        if max_tokens is not None:
            limit = min(limit, prompt + max_tokens)
        # The last token is never computed: nothing comes after it.
        needed = self.kv.num_blocks_for(limit - 1)
        if needed > self.num_blocks:
            raise RequestError(
                f"{name} may grow to {limit} tokens and then needs {needed} blocks of "
                f"{config.block_size}, and the whole KV cache has {self.num_blocks}: lower "
                "max_tokens or give the cache more memory"
            )
        return limit

    def _schedule_running(self, plan: _Plan) -> bool:
        """Give every running request its next tokens; return whether one was preempted."""
        running, preempted = self._running, False
        index = 0
        while index < len(running) and plan.budget > 0:
            request = running[index]
            num_tokens = self._next_tokens(request, plan.budget)
            index += 1
            if num_tokens == 0:
                continue
            new_block_ids = self.kv.allocate(request, num_tokens)
            # Only those after this one in order may have to go, or itself if there is none.
            while new_block_ids is None:
                preempted = True
                victim = request
                if index < len(running):
                    victim, reason = self.policy.victim(running[index:])
                else:
                    reason = "nobody after it in order is left to preempt"
                self._preempt(victim, reason)
                if victim is request:
                    return True
                new_block_ids = self.kv.allocate(request, num_tokens)
            plan.add(request, num_tokens, new_block_ids)
        return preempted

    def _schedule_waiting(self, plan: _Plan) -> None:
        """Admit requests in order until one has to wait: nobody overtakes it."""
        now = None
        while self._waiting:
            _, _, request = self._waiting[0]
            num_tokens = self._next_tokens(request, plan.budget)
            if len(self._running) >= self.config.max_num_seqs:
                self._decide(request, "waits", f"max_num_seqs is {self.config.max_num_seqs}")
                return
            if num_tokens == 0:
                self._decide(request, "waits", f"{plan.budget} tokens are left in this step")
                return
            new_block_ids = self.kv.allocate(request, num_tokens)
            if new_block_ids is None:
                short = self.kv.blocks_short(request, num_tokens)
                self._decide(request, "waits", f"{short} block{'s'[: short > 1]} short")
                return
            if now is None:
                now = self._clock()
            self._admit(request, num_tokens, now)
            plan.new_requests.append(
                NewRequest(
                    request.request_id,
                    request.token_ids(),
                    request.num_prompt_tokens,
                    request.sampling_params,
                    request.seed,
                    request.bad_words_token_ids,
                )
            )
            plan.add(request, num_tokens, new_block_ids)

    def _admit(self, request: Request, num_tokens: int, now: float) -> None:
        """Move the head of the queue among the running requests."""
        self._waiting.pop(0)
        resumed = request.state is RequestState.PREEMPTED
        request.state = RequestState.RUNNING
        if request.first_scheduled_time is None:
            request.first_scheduled_time = now
        insort(self._running, request, key=self._entry)
        self._known.add(request.request_id)
        self._decide(
            request,
            "resumed" if resumed else "admitted",
            f"computes {num_tokens} of {request.num_tokens} tokens",
        )

    def _preempt(self, victim: Request, reason: str) -> None:
        """Take a running request's blocks away; it computes its tokens again later."""
        self._running.remove(victim)
        self.kv.free(victim.request_id)
        victim.state = RequestState.PREEMPTED
        victim.num_computed_tokens = 0
        victim.num_preemptions += 1
        insort(self._waiting, self._entry(victim))
        self._drop(victim.request_id)
        self._decide(victim, "preempted", reason)

    def _next_tokens(self, request: Request, budget: int) -> int:
        """How many tokens of a request the next step may compute, given what it may still take."""
        remaining = request.num_tokens - request.num_computed_tokens
        if remaining <= budget:
            return remaining
        # Without chunked prefill a prompt is computed whole; only a preempted request that has
        # outgrown a whole step has to be computed in pieces nevertheless.
        whole = not self.config.enable_chunked_prefill
        if whole and remaining <= self.config.max_num_batched_tokens:
            return 0
        return budget

    def _finish_if_done(self, request: Request, token_id: int) -> bool:
        """Finish a request if the token it has just got is its last."""
        params = request.sampling_params
        if request.num_output_tokens >= params.min_tokens:
            if token_id in request.eos_token_ids and not params.ignore_eos:
                self._finish(request, "stop")
                return True
            if token_id in params.stop_token_ids:
                self._finish(request, "stop", token_id)
                return True
        if request.num_tokens >= self._max_tokens[request.request_id]:
            self._finish(request, "length")
            return True
        return False

    def _finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        """End a request that the caller takes out of its queue."""
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason
        self.kv.free(request.request_id)
        del self._requests[request.request_id]
        del self._max_tokens[request.request_id]
        self._drop(request.request_id)
        self._decide(request, "finished", reason)

    def _drop(self, request_id: str) -> None:
        """Have the runner forget a request, if it knows it."""
        if request_id in self._known:
            self._known.remove(request_id)
            self._dropped.append(request_id)

    def _entry(self, request: Request) -> tuple[float, int, Request]:
        return self.policy.admission_key(request), request.arrival_index, request

    def _remove_waiting(self, request: Request) -> None:
        del self._waiting[bisect_left(self._waiting, self._entry(request))]

    def _decide(self, request: Request, action: str, reason: str) -> None:
        self._decisions.append(Decision(request.request_id, action, reason))
