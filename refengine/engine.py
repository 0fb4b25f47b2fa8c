"""Engine: the loop that ties scheduler, runner and outputs together.

It knows the scheduler and the ``Runner`` protocol, never a tensor: with a simulated runner the same
loop serves capacity planning and lessons.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from refengine.errors import RequestError
from refengine.execution.runner import Runner
from refengine.output_processor import Detokenizer, RequestTracker
from refengine.request import Request, RequestOutput
from refengine.sampling_params import SamplingParams
from refengine.scheduling.scheduler import Scheduler
from refengine.step import StepRecord


class EngineTokenizer(Protocol):
    """What the engine needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    def encode(self, text: str) -> list[int]:
        """Text to token ids, with the special tokens that the model expects around it."""

    def bad_words_token_ids(self, bad_words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The token sequences that would spell each of the texts."""

    def detokenizer(self, params: SamplingParams, prompt_token_ids: Sequence[int]) -> Detokenizer:
        """An incremental detokenizer for one request."""


class Observer(Protocol):
    """Sees every step: metrics, traces, the live page, the labs."""

    def on_step(self, record: StepRecord) -> None:
        """Take note of one step."""


class Engine:
    """Serves requests: ``add_request``, then ``step`` until nothing is left.

    Args:
        scheduler: decides what each step computes.
        runner: computes it.
        vocab_size: token ids of a request must lie below it.
        tokenizer: None serves token ids alone, without texts.
        eos_token_ids: the model's own end-of-sequence tokens.
        clock: gives seconds; nothing else in the engine asks what time it is.
        observers: told of every step.
        seed: from which requests without a seed of their own draw one.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        vocab_size: int,
        tokenizer: EngineTokenizer | None = None,
        eos_token_ids: tuple[int, ...] = (),
        clock: Callable[[], float] = time.monotonic,
        observers: Sequence[Observer] = (),
        seed: int = 0,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.clock = clock
        self.observers = list(observers)
        self._seeds = random.Random(seed)
        self._trackers: dict[str, RequestTracker] = {}

    def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        *,
        stream: bool = False,
        priority: int = 0,
        cache_salt: str | None = None,
        arrival_time: float | None = None,
        prompt_text: str | None = None,
    ) -> Request:
        """Queue a request.

        Args:
            request_id: names the request; must not be in use.
            prompt: a text, or token ids.
            sampling_params: None means the defaults.
            stream: give an output after every step instead of one at the end.
            priority: smaller is sooner, where the policy looks at it.
            cache_salt: requests share cached prefixes only with those of the same salt.
            arrival_time: seconds by the engine's clock; None means now.
            prompt_text: the text that given token ids stand for, to be shown in outputs.

        Raises:
            RequestError: an empty prompt, a token id outside the vocabulary, a prompt or a request
                that can never fit.
        """
        params = sampling_params or SamplingParams()
        if request_id in self._trackers:
            raise RequestError(f"request id {request_id!r} is in use; give each request its own")
        if isinstance(prompt, str):
            prompt_text = prompt
            token_ids = self._need_tokenizer("a text prompt").encode(prompt)
        else:
            token_ids = list(prompt)
        self._check_token_ids(token_ids, params)
        request = Request(
            request_id=request_id,
            prompt_token_ids=tuple(token_ids),
            sampling_params=params,
            arrival_time=self.clock() if arrival_time is None else arrival_time,
            priority=priority,
            cache_salt=cache_salt,
            seed=self._seeds.getrandbits(64) if params.seed is None else params.seed,
            eos_token_ids=self.eos_token_ids,
        )
        if params.bad_words:
            tokenizer = self._need_tokenizer("bad_words")
            request.bad_words_token_ids = tokenizer.bad_words_token_ids(params.bad_words)
        if params.stop:
            self._need_tokenizer("stop")
        self.scheduler.add_request(request)
        detokenizer = None
        if self.tokenizer is not None:
            detokenizer = self.tokenizer.detokenizer(params, token_ids)
        self._trackers[request_id] = RequestTracker(request, prompt_text, detokenizer, stream)
        return request

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """Drop a request in any state and free its blocks.

        Returns:
            What it had so far, with ``finish_reason`` "abort"; None if no such request runs.
        """
        tracker = self._trackers.pop(request_id, None)
        if tracker is None:
            return None
        self.scheduler.abort_request(request_id)
        tracker.finished_time = self.clock()
        return tracker.output()

    def has_unfinished_requests(self) -> bool:
        """Whether another step has work to do."""
        return self.scheduler.has_unfinished_requests()

    def step(self) -> list[RequestOutput]:
        """Compute one step and return what it gave to whom.

        Whatever the runner raises comes through; the requests stay, and the next step computes
        their tokens again.
        """
        started = self.clock()
        # 1 Who computes how many tokens, and in which blocks.
        batch = self.scheduler.schedule()
        # 2 The tokens.
        try:
            output = self.runner.execute(batch)
        except BaseException:  # a fault, or Ctrl-C: whoever goes on begins from a sound state
            self.scheduler.discard(batch)
            raise
        now = self.clock()
        # 3 Requests grow, and some end.
        self.scheduler.update(batch, output)
        # 4 Texts, and stop texts, which only the text can show.
        results = []
        for part in output.requests:
            tracker = self._trackers.get(part.request_id)
            if tracker is None:  # aborted while its step was under way
                continue
            request = tracker.request
            new = request.output_token_ids[len(tracker.token_times) :]
            tracker.take(part, new, now, self._stopper(request))
            if request.is_finished:
                tracker.finished_time = now
                del self._trackers[part.request_id]
            result = tracker.output()
            if result is not None:
                results.append(result)
        # 5 Whoever watches.
        if self.observers:
            record = StepRecord(
                batch=batch,
                output=output,
                num_waiting=self.scheduler.num_waiting,
                num_running=self.scheduler.num_running,
                num_free_blocks=self.scheduler.num_free_blocks,
                num_blocks=self.scheduler.num_blocks,
                started=started,
                ended=now,
            )
            for observer in self.observers:
                observer.on_step(record)
        return results

    def close(self) -> None:
        """Release the runner."""
        self.runner.close()

    def _stopper(self, request: Request) -> Callable[[str], None]:
        """Ends a request at a stop text, even one that its last allowed token completed."""

        def stop_at(text: str) -> None:
            if request.is_finished:
                request.finish_reason, request.stop_reason = "stop", text
            else:
                self.scheduler.finish_request(request.request_id, "stop", text)

        return stop_at

    def _need_tokenizer(self, what: str) -> EngineTokenizer:
        if self.tokenizer is None:
            raise RequestError(f"{what} needs a tokenizer, and this engine was made without one")
        return self.tokenizer

    def _check_token_ids(self, token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise RequestError on ids outside the vocabulary, or an empty prompt."""
        if not token_ids:
            raise RequestError("the prompt is empty; give at least one token")
        named = (
            ("prompt_token_ids", token_ids),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", tuple(params.logit_bias or ())),
        )
        for name, ids in named:
            if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
                wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
                raise RequestError(
                    f"{name} holds {wrong}, outside this model's vocabulary of "
                    f"{self.vocab_size} tokens (0 to {self.vocab_size - 1})"
                )
