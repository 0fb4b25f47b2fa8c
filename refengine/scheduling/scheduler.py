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
from bisect import insort
from collections.abc import Callable, Iterator, Sequence

from refengine.errors import QueueFullError, RequestError
from refengine.request import Request, RequestState
from refengine.scheduling.config import SchedulerConfig
from refengine.scheduling.kv_cache_manager import KVCacheManager, NewBlocks
from refengine.scheduling.policies import Policy, PrefixPolicy, load_policy
from refengine.scheduling.request_queue import RequestQueue
from refengine.step import Decision, NewRequest, ScheduledBatch, ScheduledRequest, StepOutput

__all__ = ["Scheduler", "SchedulerConfig"]

# Waiting requests whose prefixes a policy may compare in one step.
PREFIX_WINDOW = 64


class _Plan:
    """A step while it is being planned."""

    __slots__ = ("budget", "in_flight", "new_requests", "requests")

    def __init__(self, budget: int) -> None:
        self.budget = budget  # tokens that the step may still take
        self.requests: list[ScheduledRequest] = []
        self.in_flight: list[Request] = []  # the same requests, as the scheduler knows them
        self.new_requests: list[NewRequest] = []


class Scheduler:
    """Keeps the requests, and plans steps; it never sees a tensor or a model.

    Args:
        config: limits and choices.
        clock: seconds, for ``first_scheduled_time`` and ``first_token_time``.
        policy: instead of the one that ``config.policy`` names.

    Attributes:
        kv: the blocks, and who holds them.
        num_queried_tokens: tokens of all requests when they were first admitted.
        num_hit_tokens: how many of those the prefix cache held.
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
        self._prefix_policy = self.policy if isinstance(self.policy, PrefixPolicy) else None
        self.kv = KVCacheManager(
            config.num_blocks,
            config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            num_host_blocks=config.num_host_blocks,
            reserved_tokens=config.reserved_tokens,
        )
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self._clock = clock
        self._max_num_seqs = 1 if config.batching == "none" else config.max_num_seqs
        self._queue = RequestQueue(config, self.policy)
        self._running: list[Request] = []  # in order
        self._forks: dict[str, list[Request]] = {}  # by the request whose prompt they wait for
        self._step = 0
        self._batch_open = True  # whether a static batch still takes members
        self._in_flight: dict[int, list[Request]] = {}  # by step
        self._known: set[str] = set()  # to the runner
        self._dropped: list[str] = []  # since the last step
        self._decisions: list[Decision] = []  # since the last step

    @property
    def num_waiting(self) -> int:
        """Requests that wait: new, preempted, swapped out, or for the prompt of another."""
        return len(self._queue.places) - len(self._running)

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
        return len(self._queue.places)

    def has_unfinished_requests(self) -> bool:
        """Whether there is anything to schedule."""
        return bool(self._queue.places)

    def add_request(self, request: Request, forks: Sequence[Request] = ()) -> None:
        """Queue a request, and other samples of the same prompt.

        The forks wait until the prompt has been computed once, then share its blocks and go on as
        requests of their own, each of which may be aborted.

        Raises:
            RequestError: if a request could never be served, with the numbers; or if an id is
                taken, or a fork has another prompt.
            QueueFullError: if ``max_queue`` requests wait already.
        """
        limit = self.config.max_queue
        if limit is not None and self.num_waiting >= limit:
            raise QueueFullError(
                f"request {request.request_id!r} is refused: {self.num_waiting} requests wait, and "
                f"max_queue is {limit}; try again later"
            )
        for fork in forks:
            self._check_shares(request, fork, request.num_prompt_tokens)
        self._queue.register(request, *forks)
        self._queue.add(request)
        if forks:
            self._forks[request.request_id] = list(forks)

    def fork_request(self, parent_id: str, child: Request) -> None:
        """Add a request that begins with what another has computed, and shares its blocks.

        This is for beams, between ``update`` and ``schedule``: ``child.output_token_ids`` holds the
        parent's tokens, with another last one. Where the parent does not run, or there is no seat
        (``max_num_seqs``), the child queues as any other.

        Raises:
            RequestError: as ``add_request``; or if there is no such parent, or its tokens differ.
        """
        if parent_id not in self._queue.places:
            raise RequestError(
                f"there is no request {parent_id!r} for {child.request_id!r} to fork"
            )
        parent = self._queue.places[parent_id].request
        self._check_shares(parent, child, min(parent.num_computed_tokens, child.num_tokens - 1))
        self._queue.register(child)
        self._fork(parent, child)

    def abort_request(self, request_id: str) -> Request | None:
        """End a request in any state, and free what it holds at once.

        A step that is being computed for it is ignored by ``update``. Its forks live on.

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
        if request_id not in self._queue.places:
            return None
        request = self._queue.places[request_id].request
        self._finish(request, reason, stop_reason)
        return request

    def set_priority(self, request_id: str, priority: int) -> None:
        """Change a request's priority; an id that is not being served is ignored."""
        if request_id in self._queue.places:
            self._queue.set_priority(self._queue.places[request_id].request, priority)
            self._running.sort(key=self._queue.place)

    def reset_prefix_cache(self) -> None:
        """Forget all prefixes computed until now, as when the weights change."""
        self.kv.reset_prefix_cache()

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
        block_copies, swap_out, swap_in = self.kv.take_moves()
        batch = ScheduledBatch(
            step=self._step,
            requests=tuple(plan.requests),
            new_requests=tuple(plan.new_requests),
            dropped_request_ids=tuple(self._dropped),
            block_copies=block_copies,
            swap_out=swap_out,
            swap_in=swap_in,
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
        block_size, caching = self.config.block_size, self.config.enable_prefix_caching
        changed: list[Request] = []
        for request, scheduled, result in zip(
            in_flight, batch.requests, output.requests, strict=True
        ):
            if result.request_id != scheduled.request_id:
                raise ValueError(
                    f"the runner answered for request {result.request_id!r} where request "
                    f"{scheduled.request_id!r} was scheduled"
                )
            if request.state is not RequestState.RUNNING:
                continue  # it ended while the step was computed
            # 1 What was computed can be shared: full blocks with all, a prompt with its forks.
            start = scheduled.start
            request.num_computed_tokens = end = start + scheduled.num_tokens
            if caching and end // block_size > start // block_size:
                self.kv.index_computed(request, start)
            if not scheduled.samples:
                continue
            if self._forks:
                for fork in self._forks.pop(request.request_id, ()):
                    self._fork(request, fork)
            # 2 New tokens, of which one may be the last.
            changed.append(request)
            if request.first_token_time is None:
                request.first_token_time = now
            for token_id in result.token_ids:
                request.output_token_ids.append(token_id)
                if self._finish_if_done(request, token_id):
                    break
        return changed

    def discard(self, batch: ScheduledBatch) -> None:
        """Take back a step that the runner could not finish.

        Nobody knows how much of it was done, so nothing that it could have moved or written is
        trusted: all that run or are swapped out compute their tokens again. The prefix cache never
        knew of the step's blocks.
        """
        if self._in_flight.pop(batch.step, None) is None:
            return
        for request in list(self._running):
            self._preempt(request, "its step was not finished", may_swap=False)
        for place in self._queue.waiting:
            self._lose_blocks(place.request)
        self._dropped[:0] = batch.dropped_request_ids

    def check_invariants(self) -> None:
        """Walk everything; a test calls this after every step.

        Raises:
            RuntimeError: naming the first rule that is broken.
        """
        self.kv.check_invariants()
        waiting = [place.request for place in self._queue.waiting]
        waiting += [fork for forks in self._forks.values() for fork in forks]
        ids = [request.request_id for request in waiting + self._running]
        if len(ids) != len(self._queue.places) or self._queue.places.keys() != set(ids):
            raise RuntimeError("a request is neither waiting nor running, or is both")
        if self._queue.waiting != sorted(self._queue.waiting):
            raise RuntimeError("the waiting requests are out of order")
        if self._running != sorted(self._running, key=self._queue.place):
            raise RuntimeError("the running requests are out of order")
        if len(self._running) > self._max_num_seqs:
            raise RuntimeError(f"{len(self._running)} requests run, not {self._max_num_seqs}")
        for request in waiting + self._running:
            runs, held = request in self._running, self.kv.block_ids(request.request_id)
            if runs != (request.state is RequestState.RUNNING) or request.is_finished:
                raise RuntimeError(f"{request.request_id!r} is {request.state}, runs: {runs}")
            if held and not runs:
                raise RuntimeError(f"request {request.request_id!r} waits and holds {held}")
            if runs and len(held) * self.config.block_size < request.num_computed_tokens:
                raise RuntimeError(
                    f"request {request.request_id!r} has computed more than it holds"
                )
        if not self._queue.places and self.num_free_blocks != self.num_blocks:
            raise RuntimeError("blocks are in use, and there are no requests")

    def _schedule_running(self, plan: _Plan) -> bool:
        """Give every running request its next tokens; return whether one was preempted."""
        running, preempted = self._running, False
        index = 0
        while index < len(running) and plan.budget > 0:
            request = running[index]
            index += 1
            num_tokens = self._next_tokens(request, request.num_computed_tokens, plan.budget)
            if num_tokens == 0:
                continue
            new_blocks = self.kv.allocate(request, num_tokens)
            # Only those after this one in order may have to go, or itself if there is none.
            while new_blocks is None:
                preempted = True
                may_go = running[index:] or [request]
                victim, reason = self.policy.victim(may_go)
                if victim not in may_go:
                    raise RuntimeError(
                        f"the policy named {victim.request_id!r}, which may not be preempted"
                    )
                self._preempt(victim, reason)
                if victim is request:
                    return True
                new_blocks = self.kv.allocate(request, num_tokens)
            self._serve(plan, request, num_tokens, new_blocks)
        return preempted

    def _schedule_waiting(self, plan: _Plan) -> None:
        """Admit requests in order until one has to wait: nobody overtakes it."""
        self._batch_open = self._batch_open or not self._running
        for request in self._admission_order(plan):
            reason = self._no_room(plan) or self._admit(plan, request)
            if reason:
                self._decide(request, "waits", reason)
                break
        self._batch_open = self._batch_open and bool(plan.new_requests)

    def _admission_order(self, plan: _Plan) -> Iterator[Request]:
        if self._prefix_policy is not None and not self._no_room(plan):
            window = [place.request for place in self._queue.waiting[:PREFIX_WINDOW]]
            yield from self._prefix_policy.admission_order(
                window, lambda request: len(self.kv.match_prefix(request)) * self.config.block_size
            )
        else:
            while self._queue.waiting:
                yield self._queue.waiting[0].request

    def _no_room(self, plan: _Plan) -> str:
        """Why this step admits nobody (any more), or an empty text."""
        if len(self._running) >= self._max_num_seqs:
            return f"max_num_seqs is {self._max_num_seqs}"
        if self.config.batching == "static" and not self._batch_open:
            return "the static batch has not ended"
        return "" if plan.budget else "0 tokens are left in this step"

    def _admit(self, plan: _Plan, request: Request) -> str:
        """Move a waiting request among the running ones; otherwise return why it waits."""
        cached = self.kv.match_prefix(request)
        num_cached = len(cached) * self.config.block_size
        start = max(request.num_computed_tokens, num_cached)
        num_tokens = self._next_tokens(request, start, plan.budget)
        if num_tokens == 0:
            return f"{plan.budget} tokens are left in this step"
        new_blocks = self.kv.allocate(request, num_tokens, cached)
        if new_blocks is None:
            short = self.kv.blocks_short(request, num_tokens, cached)
            return f"{short} block{'s'[: short > 1]} short"
        self._queue.remove(request)
        action = "admitted" if request.state is RequestState.WAITING else "resumed"
        reason = f"computes {num_tokens} of {request.num_tokens} tokens"
        if start:
            reason += f", {start} are there already"
        self._decide(request, action, reason)
        if request.first_scheduled_time is None:
            self.num_queried_tokens += request.num_tokens
            self.num_hit_tokens += num_cached
        self._run(request, start)
        self._serve(plan, request, num_tokens, new_blocks)
        return ""

    def _run(self, request: Request, num_computed_tokens: int) -> None:
        """Count a request among the running ones."""
        request.state = RequestState.RUNNING
        request.num_computed_tokens = num_computed_tokens
        if request.first_scheduled_time is None:
            request.first_scheduled_time = self._clock()
            request.num_cached_tokens = num_computed_tokens
        insort(self._running, request, key=self._queue.place)

    def _serve(self, plan: _Plan, request: Request, num_tokens: int, new_blocks: NewBlocks) -> None:
        """Put a running request's next tokens into the step."""
        request_id, start = request.request_id, request.num_computed_tokens
        if request_id not in self._known:
            self._known.add(request_id)
            new_blocks = NewBlocks(self.kv.block_ids(request_id))
            plan.new_requests.append(
                NewRequest(
                    request_id,
                    request.token_ids(),
                    request.num_prompt_tokens,
                    request.sampling_params,
                    request.seed,
                    request.bad_words_token_ids,
                    start,
                )
            )
        plan.budget -= num_tokens
        plan.in_flight.append(request)
        samples = start + num_tokens == request.num_tokens
        plan.requests.append(
            ScheduledRequest(
                request_id, start, num_tokens, new_blocks.block_ids, samples, (), new_blocks.start
            )
        )

    def _next_tokens(self, request: Request, start: int, budget: int) -> int:
        """How many tokens from ``start`` on a step computes that may still take ``budget`` > 0."""
        remaining = request.num_tokens - start
        if remaining == 1:
            return 1
        if self.config.enable_chunked_prefill:
            return min(remaining, budget, self.config.long_prefill_token_threshold or budget)
        # A prompt is computed whole; only a preempted request that has outgrown a whole step has
        # to be computed in pieces nevertheless.
        whole = remaining <= self.config.max_num_batched_tokens
        return 0 if whole and remaining > budget else min(remaining, budget)

    def _preempt(self, victim: Request, reason: str, may_swap: bool = True) -> None:
        """Take a running request's blocks away: to host memory, or to be computed again."""
        self._running.remove(victim)
        swaps = may_swap and self.config.prefers_swap(victim.num_computed_tokens)
        if swaps and self.kv.swap_out(victim):
            victim.state = RequestState.SWAPPED
            reason += ", swapped out"
        else:
            self._lose_blocks(victim)
        victim.num_preemptions += 1
        self._queue.add(victim)
        self._drop(victim.request_id)
        self._decide(victim, "preempted", reason)

    def _lose_blocks(self, request: Request) -> None:
        """Have a request compute all of its tokens again."""
        self.kv.free(request.request_id)
        request.num_computed_tokens = 0
        if request.state is not RequestState.WAITING:
            request.state = RequestState.PREEMPTED

    def _fork(self, parent: Request, child: Request) -> None:
        """Let a registered child share its parent's blocks, or queue it where it can't."""
        if parent.state is RequestState.RUNNING and len(self._running) < self._max_num_seqs:
            self._run(child, min(parent.num_computed_tokens, child.num_tokens - 1))
            self.kv.fork(parent.request_id, child)
            shared = f"shares {child.num_computed_tokens} tokens with {parent.request_id!r}"
            self._decide(child, "forked", shared)
        else:
            self._queue.add(child)

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
        if request.num_tokens >= self._queue.places[request.request_id].final_length:
            self._finish(request, "length")
            return True
        return False

    def _finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        """End a request in any state, and free what it holds."""
        if request.state is RequestState.RUNNING:
            self._running.remove(request)
        elif not self._queue.remove(request):
            for forks in self._forks.values():
                if request in forks:
                    forks.remove(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason
        self.kv.free(request.request_id)
        del self._queue.places[request.request_id]
        self._drop(request.request_id)
        self._decide(request, "finished", reason)
        self._batch_open = False
        for fork in self._forks.pop(request.request_id, ()):
            self._queue.add(fork)

    def _drop(self, request_id: str) -> None:
        """Have the runner forget a request, if it knows it."""
        if request_id in self._known:
            self._known.remove(request_id)
            self._dropped.append(request_id)

    def _check_shares(self, parent: Request, child: Request, num_tokens: int) -> None:
        own = child.cache_salt, child.token_ids(0, num_tokens)
        if own != (parent.cache_salt, parent.token_ids(0, num_tokens)):
            raise RequestError(
                f"request {child.request_id!r} can't fork {parent.request_id!r}: their first "
                f"{num_tokens} tokens or their salts differ"
            )

    def _decide(self, request: Request, action: str, reason: str) -> None:
        self._decisions.append(Decision(request.request_id, action, reason))
