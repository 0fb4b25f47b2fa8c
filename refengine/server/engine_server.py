"""EngineServer: the engine's own loop, fed with commands and giving out events.

It knows no HTTP and no process: commands come from, and events go to, whatever connection it is
given. Commands are taken between steps, so an abort takes effect within one step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from refengine.engine import Engine
from refengine.errors import QueueFullError, RefengineError
from refengine.request import RequestOutput
from refengine.server.messages import (
    AbortRequests,
    AddRequest,
    Command,
    Delta,
    Event,
    Failed,
    Shutdown,
    StepEvents,
)
from refengine.server.statistics import EngineStatistics

# Between two reports of the gauges while nothing ends, seconds.
STATISTICS_INTERVAL = 0.25


class Connection(Protocol):
    """One end of a pipe (``multiprocessing.connection.Connection``)."""

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Whether something can be received."""

    def recv(self) -> Any:
        """The next message; EOFError when the other side has gone."""

    def send(self, obj: Any) -> None:
        """Send a message."""


class EngineServer:
    """Runs an engine for a connection.

    Args:
        engine: idle; this object is its only user from now on.
        connection: commands in, events out.
        clock: seconds.
    """

    def __init__(
        self,
        engine: Engine,
        connection: Connection,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.statistics = EngineStatistics()
        self._connection = connection
        self._clock = clock
        self._reported = float("-inf")
        engine.observers.append(self.statistics)

    def run(self) -> None:
        """Serve until ``Shutdown``, or until the other side has gone.

        Raises:
            Exception: whatever a step raised, after the other side was told.
        """
        try:
            while self.turn():
                pass
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # nobody is left to serve
        except Exception as error:
            self._connection.send(Failed(f"{type(error).__name__}: {error}"))
            raise

    def turn(self) -> bool:
        """Take the commands that wait, then compute one step; False after ``Shutdown``."""
        # 1 Commands. With nothing to compute, the next one is worth waiting for.
        deltas: list[Delta] = []
        idle = not self.engine.has_unfinished_requests()
        changed = False
        while self._connection.poll(None if idle else 0.0):
            command: Command = self._connection.recv()
            if isinstance(command, Shutdown):
                return False
            deltas += self._take(command)
            changed, idle = True, False
        # 2 A step, for its tokens or for the runner to forget what was aborted.
        if self.engine.has_unfinished_requests() or changed:
            deltas += [self._delta(output) for output in self.engine.step()]
        # 3 What it gave goes out in one message.
        self._send(deltas)
        return True

    def _take(self, command: AddRequest | AbortRequests) -> list[Delta]:
        """Carry out one command; what it gives at once is an error, or nothing."""
        if isinstance(command, AbortRequests):
            for request_id in command.request_ids:
                output = self.engine.abort_request(request_id)
                if output is not None:
                    self.statistics.finished("abort", output.metrics)
            return []
        try:
            self.engine.add_request(
                command.request_id,
                command.prompt_token_ids,
                command.sampling_params,
                stream=command.stream,
                priority=command.priority,
                cache_salt=command.cache_salt,
            )
        except QueueFullError as error:
            return [Delta(command.request_id, "", (), error=(429, str(error)))]
        except (RefengineError, ValueError) as error:
            return [Delta(command.request_id, "", (), error=(400, str(error)))]
        return []

    def _delta(self, output: RequestOutput) -> Delta:
        answer = output.outputs[0]
        if output.finished:
            self.statistics.finished(answer.finish_reason or "stop", output.metrics)
        return Delta(
            output.request_id,
            answer.text,
            answer.token_ids,
            answer.finish_reason,
            answer.logprobs,
            output.prompt_logprobs,
            answer.stop_reason,
            answer.cumulative_logprob,
            output.num_cached_tokens,
            output.embedding,
        )

    def _send(self, deltas: list[Delta]) -> None:
        now = self._clock()
        idle = not self.engine.has_unfinished_requests()
        due = idle or now - self._reported >= STATISTICS_INTERVAL
        if not due and not deltas:
            return
        statistics = None
        if due or any(delta.finish_reason for delta in deltas):
            scheduler = self.engine.scheduler
            self.statistics.gauges(
                scheduler.num_running,
                scheduler.num_waiting,
                scheduler.num_free_blocks,
                scheduler.num_blocks,
            )
            statistics, self._reported = self.statistics, now
        event: Event = StepEvents(deltas, statistics)
        self._connection.send(event)
