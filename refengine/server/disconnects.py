"""Notices clients that go away while their answer is being made, streaming or not.

One thread watches the sockets of all requests in progress. A client that closes only its sending
side counts as gone: no HTTP client does that and still reads.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

# Where there is no epoll (not Linux), sockets are looked at this often, seconds.
POLL_INTERVAL = 0.05


class Disconnects:
    """Calls back when a client has gone."""

    def __init__(self) -> None:
        self._watched: dict[int, tuple[socket.socket, Callable[[], None]]] = {}
        self._lock = threading.Lock()
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        self._something = threading.Event()
        threading.Thread(target=self._run, name="disconnects", daemon=True).start()

    @contextmanager
    def watch(self, environ: Mapping[str, Any], gone: Callable[[], None]) -> Iterator[None]:
        """Watch a request's connection for as long as the context lasts.

        Args:
            environ: of the request; without a socket in it nothing is watched.
            gone: called at most once, on the watching thread; must be quick.
        """
        sock: socket.socket | None = environ.get("gunicorn.socket")
        if sock is None:
            yield
            return
        number = sock.fileno()
        with self._lock:
            self._watched[number] = (sock, gone)
            if self._epoll is not None:
                flags = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
                self._epoll.register(number, flags | select.EPOLLONESHOT)
        self._something.set()
        try:
            yield
        finally:
            with self._lock:
                self._watched.pop(number, None)
                if self._epoll is not None:
                    # Where it was closed meanwhile, that has unregistered it.
                    with suppress(OSError, ValueError):
                        self._epoll.unregister(number)

    def _run(self) -> None:
        while True:
            if self._epoll is not None:
                numbers = [number for number, _ in self._epoll.poll()]
            else:
                self._something.wait()
                time.sleep(POLL_INTERVAL)
                numbers = self._peek()
            for number in numbers:
                with self._lock:
                    _, gone = self._watched.pop(number, (None, None))
                if gone is not None:
                    gone()

    def _peek(self) -> list[int]:
        """Those whose client has closed, found by looking for an end of file."""
        with self._lock:
            watched = list(self._watched.items())
            if not watched:
                self._something.clear()
        numbers = []
        for number, (sock, _) in watched:
            try:
                if sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"":
                    numbers.append(number)
            except BlockingIOError:
                continue
            except OSError:
                numbers.append(number)
        return numbers
