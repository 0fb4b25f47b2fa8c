"""Generation: all the engine requests that one HTTP request became."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import flask

from refengine.sampling_params import SamplingParams
from refengine.server.context import Context, unavailable
from refengine.server.engine_client import EngineUnavailableError, TooManyRequestsError
from refengine.server.errors import ApiError
from refengine.server.event_stream import EventStream
from refengine.server.messages import AddRequest, Delta

log = logging.getLogger("refengine.server")


@dataclass(slots=True)
class Choice:
    """One answer of an HTTP request, and what it has so far."""

    index: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    first_of_prompt: bool = True  # it alone counts the prompt's tokens
    num_tokens: int = 0
    num_cached_tokens: int = 0
    result: Delta | None = None  # where the answer isn't streamed: all of it
    state: Any = None  # a formatter's own


class Formatter(Protocol):
    """Writes a stream's events; called on the thread that receives the engine's steps."""

    def delta(self, choice: Choice, delta: Delta) -> bytes:
        """What is new of a choice; empty where there is nothing to show."""

    def end(self) -> bytes:
        """What follows the last choice."""

    def error(self, error: ApiError) -> bytes:
        """The stream ends with an error."""


def fan_out(prompts: Sequence[tuple[int, ...]], params: SamplingParams, n: int) -> list[Choice]:
    """``n`` engine requests a prompt; the one place that knows how choices are made.

    Each has a seed of its own: choice 0 the request's, so that it is the answer that n=1 gives.
    """
    choices: list[Choice] = []
    for prompt in prompts:
        for number in range(n):
            own = params
            if number and params.seed is not None:
                own = replace(params, seed=(params.seed + number) % 2**63)
            choices.append(Choice(len(choices), prompt, own, first_of_prompt=number == 0))
    return choices


@dataclass(slots=True)
class Generation:
    """Sends choices to the engine and gathers what comes back.

    Args:
        context: the server's.
        choices: from ``fan_out``.
        priority: smaller is sooner.
        cache_salt: cached prefixes are shared within it.
    """

    context: Context
    choices: list[Choice]
    priority: int = 0
    cache_salt: str | None = None
    error: ApiError | None = None
    client_gone: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    _left: int = 0
    _begun: threading.Event = field(default_factory=threading.Event)
    _ended: threading.Event = field(default_factory=threading.Event)
    _listener: Callable[[Choice | None, Delta | None], None] | None = None

    def run(self, environ: dict[str, Any]) -> None:
        """Wait for all answers; each is then in its choice's ``result``.

        Raises:
            ApiError: whatever went wrong.
        """
        with self.context.disconnects.watch(environ, self.client_left):
            self._start(stream=False, listener=None)
            if not self._ended.wait(self.context.config.request_timeout):
                self.fail(self._timeout_error())
        if self.error is not None:
            raise self.error

    def stream(
        self, environ: dict[str, Any], formatter: Formatter, mimetype: str
    ) -> flask.Response:
        """A response that holds the answers as they are made.

        Raises:
            ApiError: what goes wrong before the first token; later errors end the stream.
        """
        body = EventStream.of(environ)
        deadline = time.monotonic() + self.context.config.request_timeout

        def listener(choice: Choice | None, delta: Delta | None) -> None:
            if choice is None or delta is None:
                body.write(formatter.error(self.error or unavailable("it ended")), last=True)
                return
            data = formatter.delta(choice, delta)
            last = self._left == 0
            body.write(data + formatter.end() if last else data, last)

        def gone() -> None:
            self.client_left()
            body.break_off()

        stack = ExitStack()
        stack.callback(self.abort)
        with stack:
            stack.enter_context(self.context.disconnects.watch(environ, gone))
            self._start(stream=True, listener=listener)
            # Errors that come before anything else have a status of their own.
            if not self._begun.wait(deadline - time.monotonic()):
                self.fail(self._timeout_error())
            if self.error is not None:
                raise self.error
            kept = stack.pop_all()

        def timeout() -> None:
            self.fail(self._timeout_error())

        response = flask.Response(_closing(body.body(deadline, timeout)), mimetype=mimetype)
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Accel-Buffering"] = "no"  # for a proxy that would collect events
        response.call_on_close(kept.close)
        return response

    def abort(self) -> None:
        """Drop what is not finished."""
        self.context.client.abort([self._engine_id(choice) for choice in self.choices])

    def client_left(self) -> None:
        """Nobody waits any more."""
        self.client_gone = True
        self.fail(ApiError(499, "the client has gone"))

    def fail(self, error: ApiError) -> None:
        """End everything with an error, unless it has ended."""
        if self._ended.is_set():
            return
        self.error = error
        self._ended.set()
        self.abort()
        if self._listener is not None and self._begun.is_set():
            self._listener(None, None)
        self._begun.set()

    def _start(
        self, stream: bool, listener: Callable[[Choice | None, Delta | None], None] | None
    ) -> None:
        context = self.context
        context.engine_info()
        limit = context.limit_in_flight(len(self.choices))
        self._left = len(self.choices)
        self._listener = listener
        requests = []
        for choice in self.choices:
            request = AddRequest(
                self._engine_id(choice),
                choice.prompt_token_ids,
                choice.params,
                stream,
                self.priority,
                self.cache_salt,
            )
            requests.append((request, self._sink(choice)))
        try:
            context.client.submit(requests, limit)
        except TooManyRequestsError as error:
            raise ApiError(
                429, str(error), code="queue_full", headers={"Retry-After": "1"}
            ) from None
        except EngineUnavailableError as error:
            raise unavailable(str(error)) from None

    def _sink(self, choice: Choice) -> Callable[[Delta], None]:
        """What takes the engine's deltas of one choice, on the receiving thread."""

        def sink(delta: Delta) -> None:
            if self._ended.is_set():
                return
            if delta.error is not None:
                status, message = delta.error
                headers = {} if status == 400 else {"Retry-After": "1"}
                code = {429: "queue_full", 503: "engine_unavailable"}.get(status)
                self.fail(ApiError(status, message, code=code, headers=headers))
                return
            try:
                choice.num_tokens += len(delta.token_ids)
                choice.num_cached_tokens = delta.num_cached_tokens
                if delta.finish_reason is not None:
                    self._left -= 1
                if self._listener is None:
                    choice.result = delta
                else:
                    self._listener(choice, delta)
            except Exception:
                # The thread that serves everyone must outlive one request's fault.
                log.exception("an event could not be written")
                self.fail(ApiError(500, "the answer could not be written", code="internal_error"))
                return
            if self._left == 0:
                self._ended.set()
            self._begun.set()

        return sink

    def _engine_id(self, choice: Choice) -> str:
        return f"{self.id}-{choice.index}"

    def _timeout_error(self) -> ApiError:
        seconds = self.context.config.request_timeout
        return ApiError(
            504, f"the answer took longer than {seconds:g} s (--request-timeout)", code="timeout"
        )


def _closing(body: Iterator[bytes]) -> Iterator[bytes]:
    """The same, as a generator that WSGI servers may close."""
    yield from body


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens, as OpenAI's API counts them: each prompt once, every answer made."""
    counted = [choice for choice in choices if choice.first_of_prompt]
    prompt = sum(len(choice.prompt_token_ids) for choice in counted)
    completion = sum(choice.num_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(choice.num_cached_tokens for choice in counted)
        },
    }
