"""A request's life inside the engine, and what the user sees of it. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from refengine.sampling_params import SamplingParams
from refengine.step import Logprob


class RequestState(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"  # waits again; its blocks are gone and will be recomputed
    SWAPPED = "swapped"  # waits again; its blocks lie in host memory
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One request: what was asked, and how far it has come.

    There is no prefill phase and no decode phase: each step brings ``num_computed_tokens`` nearer
    to ``num_tokens``; when they meet, the last position's logits give the next token.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling_params: SamplingParams
    arrival_time: float = 0.0  # the engine's clock, seconds
    priority: int = 0  # smaller is sooner
    cache_salt: str | None = None
    seed: int = 0  # sampling_params.seed, or one drawn by the engine
    eos_token_ids: tuple[int, ...] = ()  # the model's own end-of-sequence tokens
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()  # sampling_params.bad_words, tokenized

    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # of those, how many a prefix hit gave at first admission
    num_preemptions: int = 0
    state: RequestState = RequestState.WAITING
    finish_reason: str | None = None  # "stop", "length", "abort"
    stop_reason: int | str | None = None  # the stop token or text that ended it
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    arrival_index: int = 0  # how many requests came before it; the scheduler counts
    num_overtakings: int = 0  # how many of those had jumped the queue

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known so far: prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self.state is RequestState.FINISHED

    def token_ids(self, start: int = 0, stop: int | None = None) -> tuple[int, ...]:
        """Known tokens ``start .. stop - 1``, prompt first."""
        prompt = self.prompt_token_ids
        if start >= len(prompt):
            first = start - len(prompt)
            last = None if stop is None else stop - len(prompt)
            return tuple(self.output_token_ids[first:last])
        return (prompt + tuple(self.output_token_ids))[start:stop]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer of a request."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None = None
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When what happened to a request: the engine's clock, seconds."""

    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    finished_time: float | None
    # One time a generated token, as the step that gave it ended.
    token_times: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What the user sees of a request, after a step (so far) or at its end (``finished``)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    metrics: RequestMetrics | None = None
    embedding: tuple[float, ...] | None = None  # [hidden], where pooling was asked for
