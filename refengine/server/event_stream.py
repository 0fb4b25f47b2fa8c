"""EventStream: the events of one streamed response, written by whoever has them.

A thread for each open response is how WSGI works, but waking it for each token is what costs: with
256 streams 57 microseconds a token in a trial (docs/serving.md), most of it handing over the
interpreter lock. So once a response's head is out, its thread sleeps and the thread that receives
the engine's steps writes events to the socket itself, without blocking: 13 microseconds in the same
trial. Where the socket is full (a slow client), the response's own thread takes over until it has
drained.

Without a socket (another WSGI server, a test client) events are yielded as WSGI wants them.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any


class EventStream:
    """A response body that is filled from another thread.

    Args:
        sock: the response's connection, for direct writes; None yields everything.
        chunked: whether the body is in HTTP/1.1's chunked coding.
    """

    def __init__(self, sock: socket.socket | None = None, chunked: bool = True) -> None:
        self._sock = sock
        self._chunked = chunked
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._waiting: list[bytes] = []  # events that the response's thread will write
        self._rest = b""  # what a direct write left of an event
        self._direct = False  # the response's thread sleeps: write to the socket
        self._done = False
        self.broken = False  # the client has gone

    @classmethod
    def of(cls, environ: Mapping[str, Any]) -> EventStream:
        """A stream for the response to a request."""
        chunked = environ.get("SERVER_PROTOCOL") == "HTTP/1.1"
        return cls(environ.get("gunicorn.socket"), chunked)

    def write(self, data: bytes, last: bool = False) -> None:
        """Add an event; never blocks, raises nothing."""
        with self._lock:
            if self.broken or self._done:
                return
            self._done = last
            if not (self._direct and self._sock is not None):
                if data:
                    self._waiting.append(data)
                self._wake.set()
                return
            if data:
                self._send_now(self._sock, data)
            if last:
                self._wake.set()

    def break_off(self) -> None:
        """The client has gone: end the response's thread."""
        with self._lock:
            self.broken = True
            self._wake.set()

    def body(self, deadline: float, timeout: Callable[[], None]) -> Iterator[bytes]:
        """The body, as far as it isn't written directly.

        Args:
            deadline: by ``time.monotonic``; when it passes,
            timeout: is called, which should end the stream.
        """
        while True:
            if not self._wake.wait(max(0.0, deadline - time.monotonic())):
                timeout()
                deadline += 3600.0  # it has been told
                continue
            with self._lock:
                self._direct = False
                self._wake.clear()
                data, rest = b"".join(self._waiting), self._rest
                self._waiting.clear()
                self._rest = b""
                done, broken = self._done, self.broken
            if broken:
                return
            if rest and self._sock is not None:
                self._sock.sendall(rest)
            if data:
                yield data  # it is on its way when this thread comes back
            elif not done and not rest:
                continue  # the wake-up of something already written
            with self._lock:
                if self._waiting or self.broken:
                    self._wake.set()
                elif self._done:
                    return
                else:
                    self._direct = True

    def _send_now(self, sock: socket.socket, data: bytes) -> None:
        frame = b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data
        try:
            sent = sock.send(frame, socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.broken = True
            self._wake.set()
            return
        if sent < len(frame):
            self._rest, self._direct = frame[sent:], False
            self._wake.set()
