"""What crosses between the HTTP side and the engine: plain data, pickled over a pipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from refengine.sampling_params import SamplingParams
from refengine.server.statistics import EngineStatistics
from refengine.step import Logprob


@dataclass(frozen=True, slots=True)
class AddRequest:
    """Queue a request."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling_params: SamplingParams
    stream: bool = False
    priority: int = 0
    cache_salt: str | None = None


@dataclass(frozen=True, slots=True)
class AbortRequests:
    """Drop requests; ids that have ended are ignored."""

    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End the engine."""


Command = AddRequest | AbortRequests | Shutdown


class Delta(NamedTuple):
    """What a step gave one request: a tuple, since there is one a token."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    num_cached_tokens: int = 0
    embedding: tuple[float, ...] | None = None
    error: tuple[int, str] | None = None  # HTTP status and message; nothing follows it


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the HTTP side must know of a running engine."""

    pid: int
    backend: str
    dtype: str
    vocab_size: int
    hidden_size: int
    max_model_len: int
    num_kv_blocks: int
    block_size: int
    max_num_seqs: int
    startup_seconds: dict[str, float]

    @property
    def max_request_tokens(self) -> int:
        """Tokens, prompt and answer, that one request may have."""
        # The last token is never computed, so it needs no slot.
        return min(self.max_model_len, self.num_kv_blocks * self.block_size + 1)


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine serves from now on."""

    info: EngineInfo


@dataclass(frozen=True, slots=True)
class StepEvents:
    """All that one step gave, in one message; statistics come when a request ended, or seldom."""

    deltas: list[Delta]
    statistics: EngineStatistics | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine has stopped; nothing follows."""

    message: str


Event = Ready | StepEvents | Failed
