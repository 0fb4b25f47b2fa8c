"""From sampled token ids to what the user sees: text, log-probabilities, stop texts, times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from refengine.request import CompletionOutput, Request, RequestMetrics, RequestOutput
from refengine.step import Logprob, RequestStepOutput


class Detokenizer(Protocol):
    """Turns a growing list of token ids into a growing text."""

    def append(self, token_ids: list[int]) -> str:
        """New text that is certain by now: no half characters, no beginning of a stop text."""

    def finish(self) -> str:
        """What was held back, once nothing more will come."""

    @property
    def text(self) -> str:
        """All text emitted so far, cut at a stop text."""

    @property
    def stop_reason(self) -> str | None:
        """The stop text that was met, if any."""


@dataclass(slots=True)
class RequestTracker:
    """What has been shown of one request so far.

    A streamed request gets an output whenever it has new text or tokens, holding only what is new.
    Any other gets one output at its end: carrying all tokens in every step would cost more than
    making them.
    """

    request: Request
    prompt: str | None
    detokenizer: Detokenizer | None
    stream: bool
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    finished_time: float | None = None
    embedding: tuple[float, ...] | None = None
    _shown_tokens: int = 0
    _pending_text: str = ""

    def take(
        self,
        output: RequestStepOutput,
        token_ids: list[int],
        now: float,
        stop_at: Callable[[str], None],
    ) -> None:
        """Record a step's result.

        Args:
            output: what the runner gave.
            token_ids: those of its tokens that the scheduler accepted.
            now: the engine's clock, seconds.
            stop_at: called with the stop text that the new tokens completed.
        """
        self.token_times += [now] * len(token_ids)
        if output.embedding is not None:
            self.embedding = output.embedding
        if output.logprobs is not None:
            self.logprobs += output.logprobs[: len(token_ids)]
        if output.prompt_logprobs is not None:
            if not self.prompt_logprobs:
                self.prompt_logprobs.append(None)  # nothing predicts the first token
            # A request that was preempted computes its prompt again.
            missing = self.request.num_prompt_tokens - len(self.prompt_logprobs)
            self.prompt_logprobs += output.prompt_logprobs[:missing]
        if self.detokenizer is None:
            return
        ends_by_token = self.request.is_finished and self.request.finish_reason == "stop"
        # The token that ends an answer is not part of its text, unless asked for.
        keep = self.request.sampling_params.include_stop_str_in_output
        shown = token_ids[:-1] if ends_by_token and not keep else token_ids
        self._pending_text += self.detokenizer.append(shown)
        if self.detokenizer.stop_reason is not None:
            stop_at(self.detokenizer.stop_reason)

    def output(self) -> RequestOutput | None:
        """What to tell the user now, or None."""
        request = self.request
        finished = request.is_finished
        if finished and self.detokenizer is not None:
            before = self.detokenizer.stop_reason
            self._pending_text += self.detokenizer.finish()
            stop_reason = self.detokenizer.stop_reason
            if stop_reason != before:  # completed by what was held back
                request.finish_reason, request.stop_reason = "stop", stop_reason
        if self.stream:
            start, text = self._shown_tokens, self._pending_text
            self._shown_tokens, self._pending_text = request.num_output_tokens, ""
            if not finished and not text and start == request.num_output_tokens:
                return None
        elif finished:
            start = 0
            text = "" if self.detokenizer is None else self.detokenizer.text
        else:
            return None
        logprobs = (
            tuple(self.logprobs[start:]) if request.sampling_params.logprobs is not None else None
        )
        completion = CompletionOutput(
            index=0,
            text=text,
            token_ids=tuple(request.output_token_ids[start:]),
            cumulative_logprob=self._cumulative_logprob(),
            logprobs=logprobs,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
        )
        return RequestOutput(
            request_id=request.request_id,
            prompt=self.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=(completion,),
            finished=finished,
            prompt_logprobs=tuple(self.prompt_logprobs) if self.prompt_logprobs else None,
            num_cached_tokens=request.num_cached_tokens,
            num_preemptions=request.num_preemptions,
            metrics=RequestMetrics(
                arrival_time=request.arrival_time,
                first_scheduled_time=request.first_scheduled_time,
                first_token_time=self.token_times[0] if self.token_times else None,
                finished_time=self.finished_time,
                token_times=tuple(self.token_times) if finished else (),
            ),
            embedding=self.embedding,
        )

    def _cumulative_logprob(self) -> float | None:
        """Sum over the generated tokens, where log-probabilities were asked for."""
        if not self.logprobs:
            return None
        return sum(
            entry[token_id].logprob
            for entry, token_id in zip(self.logprobs, self.request.output_token_ids, strict=False)
        )
