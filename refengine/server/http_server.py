"""Serving the application: gunicorn's thread worker, without gunicorn's process manager.

Why this one: docs/serving.md has the load test. The worker is a documented extension point; run in
this process it leaves signals, the end and the exit status to us. Its manager would put a process
above that restarts what has died, which for an engine's clients is the wrong answer.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import struct
import threading
import time
from typing import Any

import gunicorn.app.base
import gunicorn.glogging
from gunicorn.workers.gthread import ThreadWorker

from refengine.errors import RefengineError
from refengine.server.context import Context

log = logging.getLogger("refengine.server")

# A client that sends or takes nothing for so long while a thread waits for it is given up, seconds.
SOCKET_TIMEOUT = 30
# /health and the end of streams stay visible for so long after the engine has died, seconds.
LINGER = 1.5


class _Application(gunicorn.app.base.BaseApplication):  # type: ignore[misc]
    def __init__(self, app: Any, settings: dict[str, Any]) -> None:
        self._app = app
        self._settings = settings
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._settings.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        return self._app


class _Logger(gunicorn.glogging.Logger):  # type: ignore[misc]
    """Our handlers stay; gunicorn's would write lines of another form."""

    def setup(self, cfg: Any) -> None:
        self.error_log = logging.getLogger("gunicorn.error")
        self.access_log = logging.getLogger("gunicorn.access")


class _Worker(ThreadWorker):  # type: ignore[misc]
    """The thread worker, in charge of itself."""

    def init_signals(self) -> None:
        pass

    def is_parent_alive(self) -> bool:
        return True


class HttpServer:
    """Serves until it is told to stop.

    Args:
        app: the WSGI application.
        context: its context.
        listener: from ``bind``.
        threads: requests that can be in progress at once.
    """

    def __init__(self, app: Any, context: Context, listener: socket.socket, threads: int) -> None:
        self._context = context
        self._exit_code = 0
        self._stopping = threading.Event()
        settings = {
            "threads": threads,
            "worker_connections": threads + 1024,
            "keepalive": 15,
            "graceful_timeout": 3,
            "logger_class": _Logger,
            "limit_request_line": 8190,
        }
        application = _Application(app, settings)
        self._worker = _Worker(
            0, os.getpid(), [listener], application, 0, application.cfg, _Logger(application.cfg)
        )

    def run(self) -> int:
        """Serve; return the exit status. SIGTERM and SIGINT drain, a second one ends at once."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        self._worker.init_process()  # returns when the worker has ended
        return self._exit_code

    def engine_died(self) -> None:
        """End with an error once everyone has been told."""
        self._exit_code = 1
        threading.Thread(target=self._end_after, args=(LINGER,), daemon=True).start()

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._stopping.is_set():
            log.warning("a second signal: ending at once")
            self._worker.handle_exit(number, frame)
            return
        self._stopping.set()
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def _drain(self) -> None:
        """Refuse new work, let what runs finish in time, then end."""
        context = self._context
        context.draining = True
        seconds = context.config.shutdown_timeout
        log.info("draining", extra={"fields": {"in_flight": context.client.num_in_flight}})
        deadline = time.monotonic() + seconds
        while context.client.num_in_flight and time.monotonic() < deadline:
            time.sleep(0.05)
        left = context.client.num_in_flight
        if left:
            log.warning("drain timed out", extra={"fields": {"in_flight": left}})
        context.client.stop()
        self._end_after(0.0)

    def _end_after(self, seconds: float) -> None:
        time.sleep(seconds)
        self._worker.handle_exit(signal.SIGTERM, None)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        RefengineError: where the address can't be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit these; without them a client that stalls would keep a thread.
        patience = struct.pack("ll", SOCKET_TIMEOUT, 0)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(address)
        listener.listen(1024)
    except (OSError, OverflowError) as error:
        raise RefengineError(f"cannot listen on {host} port {port}: {error}") from error
    return listener
