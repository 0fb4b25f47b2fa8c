"""EngineClient: the HTTP side of the pipe; one thread takes the events to their requests."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from refengine.server.engine_server import Connection
from refengine.server.messages import (
    AbortRequests,
    AddRequest,
    Command,
    Delta,
    EngineInfo,
    Failed,
    Ready,
    Shutdown,
    StepEvents,
)
from refengine.server.statistics import EngineStatistics

log = logging.getLogger("refengine.server")

Sink = Callable[[Delta], None]


class EngineSource(Protocol):
    """What starts and ends engines (``EngineProcess``)."""

    def start(self) -> Connection:
        """Start an engine; return the pipe to it."""

    def end(self, timeout: float) -> None:
        """Wait for its end, and enforce it after ``timeout`` seconds."""


class TooManyRequestsError(Exception):
    """No more may be in flight; the message says how many are."""


class EngineUnavailableError(Exception):
    """There is no engine to serve a request; the message says why."""


class EngineClient:
    """Sends requests to an engine and hands what it gives to their sinks.

    Args:
        source: starts engines.
        restart: start another engine when one has died.
        on_death: called once, on the client's own thread, when an engine has died for good.

    Attributes:
        info: the running engine's numbers; None until it is ready.
        statistics: the newest ones.
        state: "starting", "ready", "dead" or "stopped".
    """

    def __init__(
        self,
        source: EngineSource,
        *,
        restart: bool = False,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self.info: EngineInfo | None = None
        self.statistics = EngineStatistics()
        self.state = "starting"
        self.reason = "the engine is starting"
        self.num_restarts = 0
        self._source = source
        self._restart = restart
        self.on_death = on_death
        self._sinks: dict[str, Sink] = {}
        self._lock = threading.Lock()  # guards the pipe's sending side, the sinks and the state
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._run, name="engine-events", daemon=True)

    def start(self) -> None:
        """Start the engine; ``state`` says when it is ready."""
        self._connection = self._source.start()
        self._thread.start()

    @property
    def num_in_flight(self) -> int:
        """Engine requests that have not ended."""
        return len(self._sinks)

    def submit(self, requests: Sequence[tuple[AddRequest, Sink]], limit: int) -> None:
        """Queue requests, all or none.

        Args:
            requests: each with what its deltas are given to, on the client's own thread: it must
                be quick and raise nothing. The last delta has a finish_reason or an error.
            limit: of requests in flight, with these.

        Raises:
            TooManyRequestsError: where there would be more.
            EngineUnavailableError: where there is no engine.
        """
        with self._lock:
            if self.state != "ready":
                raise EngineUnavailableError(self.reason)
            if len(self._sinks) + len(requests) > limit:
                raise TooManyRequestsError(
                    f"{len(self._sinks)} requests are in flight and {limit} may be (--max-queue)"
                )
            for request, sink in requests:
                self._sinks[request.request_id] = sink
            for request, _ in requests:
                self._send(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests and forget their sinks; those that have ended are ignored."""
        with self._lock:
            known = tuple(r for r in request_ids if self._sinks.pop(r, None) is not None)
            if known and self.state == "ready":
                self._send(AbortRequests(known))

    def stop(self, timeout: float = 5.0) -> None:
        """End the engine; whatever still runs gets an error."""
        with self._lock:
            if self.state != "dead":
                self.reason = "the server is shutting down"
            self.state = "stopped"
            self._send(Shutdown())
        self._source.end(timeout)
        self._fail_all("the server is shutting down")

    def _send(self, command: Command) -> None:
        try:
            if self._connection is not None:
                self._connection.send(command)
        except (OSError, ValueError):
            pass  # the engine has died: the receiving thread finds out and tells everyone

    def _run(self) -> None:
        """Receive until the engine ends; then say so to everyone who waits."""
        while True:
            reason = self._receive()
            with self._lock:
                if self.state == "stopped":
                    return
                # One that could not even start would fail the same way again.
                again = self._restart and self.state == "ready"
                self.reason, self.info = f"the engine has died: {reason}", None
                self.state = "starting" if again else "dead"
            log.error("engine died", extra={"fields": {"reason": reason}})
            self._fail_all(self.reason)
            self.statistics = EngineStatistics()
            self._source.end(1.0)
            if not again:
                self.on_death()
                return
            self.num_restarts += 1
            self._connection = self._source.start()

    def _receive(self) -> str:
        """Deliver events until there are no more; return why."""
        reason = "its process ended"
        connection = self._connection
        while connection is not None:
            try:
                event = connection.recv()
            except (EOFError, OSError):
                return reason
            if isinstance(event, StepEvents):
                if event.statistics is not None:
                    self.statistics = event.statistics
                sinks = self._sinks
                for delta in event.deltas:
                    if delta.finish_reason is None and delta.error is None:
                        sink = sinks.get(delta.request_id)
                    else:
                        sink = sinks.pop(delta.request_id, None)
                    if sink is not None:  # None: aborted
                        sink(delta)
            elif isinstance(event, Ready):
                self.info = event.info
                with self._lock:
                    if self.state == "starting":
                        self.state, self.reason = "ready", ""
                log.info("engine ready", extra={"fields": {"pid": event.info.pid}})
            elif isinstance(event, Failed):
                reason = event.message
        return reason

    def _fail_all(self, reason: str) -> None:
        with self._lock:
            sinks, self._sinks = self._sinks, {}
        for request_id, sink in sinks.items():
            sink(Delta(request_id, "", (), error=(503, reason)))
