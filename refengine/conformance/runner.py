"""Running cases, here or in a child process with a time limit."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol

from refengine.conformance.calling import Outcome
from refengine.conformance.case import Case
from refengine.conformance.implementation import Implementation, run_case, same_alone
from refengine.conformance.worker import receive, send
from refengine.errors import RefengineError

# Importing a library of kernels and compiling the first one take their time.
LOAD_SECONDS = 300.0
CASE_SECONDS, COMPILE_SECONDS = 10.0, 30.0
MAX_HANGS = 3


class Runner(Protocol):
    """Something that runs an implementation's cases."""

    implementation: Implementation

    def start(self, kind: str, case: Case) -> None:
        """Begin a request: "case", "alone", "time" or "count"."""

    def finish(self) -> Any:
        """Wait for its answer."""

    def close(self) -> None:
        """Let everything go."""


class HereRunner:
    """In this process: for callables that cannot be imported elsewhere."""

    def __init__(self, implementation: Implementation) -> None:
        self.implementation = implementation
        self.function = implementation.load()
        self._request: tuple[str, Case] | None = None

    def start(self, kind: str, case: Case) -> None:
        """Remember what to run."""
        self._request = kind, case

    def finish(self) -> Any:
        """Run it."""
        if self._request is None:
            raise RuntimeError("finish() without start()")
        kind, case = self._request
        calls: dict[str, Callable[..., Any]] = {"case": run_case, "alone": same_alone}
        if kind == "time":
            from refengine.conformance.timing import time_case

            calls["time"] = time_case
        return calls[kind](self.implementation, self.function, case)

    def close(self) -> None:
        """Nothing to let go."""


class ChildRunner:
    """In a child process, which is replaced when it hangs or crashes.

    Args:
        implementation: with a target that can be imported.
        time_limit: seconds a case may take; None for ``CASE_SECONDS``, and ``COMPILE_SECONDS`` more
            for the first case of each dtype.
        environment: additions to the child's environment.
    """

    def __init__(
        self,
        implementation: Implementation,
        time_limit: float | None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.implementation, self.time_limit = implementation, time_limit
        self._compiled: set[str] = set()
        self._limit = 0.0
        self.environment = {**os.environ, **(environment or {})}
        self.hangs = 0
        self._skipped = False
        self._process: subprocess.Popen[bytes] | None = None
        self._launch()

    def _launch(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "refengine.conformance.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.environment,
            start_new_session=os.name == "posix",  # a hang may have children of its own
        )
        with suppress(BrokenPipeError):  # _wait says how it ended
            send(self._stream("stdin"), ("load", (self.implementation, sys.path)))
        status, answer = self._wait(LOAD_SECONDS)
        if status != "ok":
            self.close()
        if status == "dead":
            raise RefengineError(f"{self.implementation.name} {answer} while it was imported")
        if status == "late":
            raise RefengineError(
                f"{self.implementation.name} was not imported in {LOAD_SECONDS:.0f} s"
            )
        if status == "error":
            raise RefengineError(answer)

    def _stream(self, name: str) -> Any:
        return getattr(self._process, name)

    def _wait(self, seconds: float) -> tuple[str, Any]:
        """The answer; or ("late", None), or ("dead", how)."""
        stdout = self._stream("stdout")
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return "late", None
        try:
            answer: tuple[str, Any] = receive(stdout)
            return answer
        except EOFError:
            process = self._process
            code = process.wait() if process is not None else 0
            self.close()
            if code < 0:
                name = signal.Signals(-code).name
                return "dead", f"crashed ({name}, signal {-code})"
            return "dead", f"ended its process (exit status {code})"

    def start(self, kind: str, case: Case) -> None:
        """Send a request to the child."""
        self._skipped = self.hangs >= MAX_HANGS
        if self._skipped:
            return
        if self._process is None:
            self._launch()
        with suppress(BrokenPipeError):  # it died between two cases; finish() says how
            send(self._stream("stdin"), (kind, case))
        self._began = time.monotonic()
        self._limit = self.time_limit or CASE_SECONDS
        if self.time_limit is None and case.dtype not in self._compiled:
            self._limit += COMPILE_SECONDS
            self._compiled.add(case.dtype)

    def finish(self) -> Any:
        """Its answer, or the outcome that says why there is none."""
        if self._skipped:
            return Outcome("not run", f"not run, because {MAX_HANGS} cases before it hung")
        left = self._limit - (time.monotonic() - self._began)
        status, answer = self._wait(max(left, 0.01))
        if status == "late":
            self.hangs += 1
            self.close()
            return Outcome("hung", f"did not return within {self._limit:g} s; stopped")
        if status == "dead":
            return Outcome("crashed", answer)
        if status == "error":
            return Outcome("raised", answer)
        return answer

    def close(self) -> None:
        """End the child."""
        process, self._process = self._process, None
        if process is None:
            return
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        try:
            process.wait(0.2 if self.hangs else 2.0)
        except subprocess.TimeoutExpired:
            try:
                if os.name == "posix":
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.kill()
            except ProcessLookupError:
                pass
            process.wait()

    def __enter__(self) -> ChildRunner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def make_runner(
    implementation: Implementation,
    time_limit: float | None,
    environment: Mapping[str, str] | None = None,
) -> Runner:
    """A child for what can be imported, this process for the rest."""
    if implementation.function is not None:
        return HereRunner(implementation)
    return ChildRunner(implementation, time_limit, environment)
