"""EventStream: whatever thread writes, the client reads all events in order."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

import pytest

from refengine.server.event_stream import EventStream


def decode_chunks(data: bytes) -> bytes:
    """The body of HTTP/1.1's chunked coding."""
    body = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        body += data[:length]
        assert data[length : length + 2] == b"\r\n"
        data = data[length + 2 :]
    return body


def serve(stream: EventStream, sock: socket.socket, chunked: bool) -> None:
    """Write a body as a WSGI server does."""
    for data in stream.body(time.monotonic() + 60, lambda: None):
        sock.sendall(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
    sock.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize(("events", "size", "pause"), [(300, 20, 0.0), (60, 9000, 0.0005)])
def test_a_reader_gets_every_byte_in_order(chunked, events, size, pause):
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # small: direct writes fall short
    stream = EventStream(ours, chunked)
    thread = threading.Thread(target=serve, args=(stream, ours, chunked))
    thread.start()
    wanted = [b"data: %d " % i + b"x" * size + b"\n\n" for i in range(events)]

    def write() -> None:
        for number, event in enumerate(wanted):
            stream.write(event, last=number == events - 1)
            time.sleep(0.0002)

    writer = threading.Thread(target=write)
    writer.start()
    data = b""
    while part := theirs.recv(4096):
        data += part
        time.sleep(pause)
    writer.join()
    thread.join()
    ours.close()
    theirs.close()
    assert (decode_chunks(data) if chunked else data) == b"".join(wanted)


def test_without_a_socket_everything_is_yielded():
    stream = EventStream()
    stream.write(b"a")
    stream.write(b"b", last=True)
    stream.write(b"never")
    assert b"".join(stream.body(time.monotonic() + 9, lambda: None)) == b"ab"


def test_a_client_that_has_gone_ends_the_body():
    ours, theirs = socket.socketpair()
    stream = EventStream(ours)

    def run() -> None:
        with suppress(OSError):  # what a WSGI server's own write raises
            serve(stream, ours, True)

    thread = threading.Thread(target=run)
    thread.start()
    stream.write(b"first")
    assert theirs.recv(100)
    theirs.close()
    while thread.is_alive():
        stream.write(b"x" * 100)
        time.sleep(0.001)
    ours.close()


def test_a_client_that_was_seen_to_go_ends_the_body():
    stream = EventStream()
    stream.write(b"first")
    stream.break_off()
    assert list(stream.body(time.monotonic() + 9, lambda: None)) == []


def test_a_deadline_is_told_once():
    told = []
    stream = EventStream()

    def timeout() -> None:
        told.append(1)
        stream.write(b"late", last=True)

    assert list(stream.body(time.monotonic() + 0.01, timeout)) == [b"late"]
    assert told == [1]
