"""What crosses the seams in one step: plain, frozen data made of ints, floats, tuples and names.

Nothing here holds a tensor or a callback, so a step can be printed, recorded, sent to another
rank, replayed and asserted on. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from refengine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class NewRequest:
    """What a runner must know of a request before its first step, or its first after preemption."""

    request_id: str
    token_ids: tuple[int, ...]  # prompt and, after a preemption, what had been generated
    num_prompt_tokens: int
    sampling_params: SamplingParams
    seed: int  # the request's own seed, drawn by the engine where the user named none
    # Each forbidden text as the token sequences that would spell it.
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    num_computed_tokens: int = 0  # of these, computed already: a prefix hit, a fork, a swap


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One request's part of a step: compute tokens ``start .. start + num_tokens - 1``."""

    request_id: str
    start: int  # num_computed_tokens before the step
    num_tokens: int  # tokens to compute, draft tokens included
    new_block_ids: tuple[int, ...]  # blocks added to its table since its last step
    samples: bool  # whether the last position's logits give a token
    draft_token_ids: tuple[int, ...] = ()
    # Where new_block_ids go in its table, replacing what is there; None: at the table's end.
    # A number comes with a copy-on-write: block_copies fills the first of them.
    new_blocks_start: int | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """Why the scheduler did what it did to a request, for traces and lessons."""

    request_id: str
    action: str  # "admitted", "waits", "preempted", "resumed", "finished"
    reason: str


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step's plan, made by ``Scheduler.schedule()`` and carried out by ``Runner.execute()``.

    A runner applies it in this order: forget ``dropped_request_ids``, take in ``new_requests``,
    move blocks (``swap_out``, then ``swap_in``, then ``block_copies``), compute ``requests``.
    """

    step: int
    requests: tuple[ScheduledRequest, ...]
    new_requests: tuple[NewRequest, ...] = ()
    dropped_request_ids: tuple[str, ...] = ()  # finished, aborted or preempted since the last step
    block_copies: tuple[tuple[int, int], ...] = ()  # (source block, destination block)
    swap_out: tuple[tuple[int, int], ...] = ()  # (device block, host block)
    swap_in: tuple[tuple[int, int], ...] = ()  # (host block, device block)
    decisions: tuple[Decision, ...] = ()

    @property
    def num_scheduled_tokens(self) -> int:
        """Tokens computed in this step, over all requests."""
        return sum(request.num_tokens for request in self.requests)


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log-probability and its rank in the vocabulary (1 is the most likely)."""

    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class RequestStepOutput:
    """What a step gave one request."""

    request_id: str
    token_ids: tuple[int, ...]  # sampled, or accepted and sampled; empty if it did not sample
    # One mapping {token id: Logprob} a sampled token, where logprobs were asked for.
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    # The same for prompt tokens whose logits this step computed: positions start + 1 .. .
    prompt_logprobs: tuple[dict[int, Logprob], ...] | None = None
    embedding: tuple[float, ...] | None = None  # [hidden], of a pooling request's whole prompt


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What ``Runner.execute()`` returns: one entry per scheduled request, in the batch's order."""

    requests: tuple[RequestStepOutput, ...]
    seconds: dict[str, float] = field(default_factory=dict)  # time by part of the step


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step as observers see it."""

    batch: ScheduledBatch
    output: StepOutput
    num_waiting: int
    num_running: int
    num_free_blocks: int
    num_blocks: int
    started: float  # the engine's clock, seconds
    ended: float
