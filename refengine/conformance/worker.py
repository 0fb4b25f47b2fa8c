"""The process that somebody else's kernel runs in: it may hang or crash without harm.

Started as ``python -m refengine.conformance.worker``; it reads pickled requests from standard input
and answers on standard output. What the kernel prints goes to standard error.
"""

from __future__ import annotations

import os
import pickle
import struct
import sys
import warnings
from collections.abc import Callable
from typing import Any, BinaryIO

from refengine.conformance.implementation import Implementation, run_case, same_alone
from refengine.errors import RefengineError

_SIZE = struct.Struct("<Q")


def send(stream: BinaryIO, message: Any) -> None:
    """Write one message."""
    data = pickle.dumps(message, protocol=5)
    stream.write(_SIZE.pack(len(data)))
    stream.write(data)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """Read one message.

    Raises:
        EOFError: where the other side is gone.
    """
    return pickle.loads(_exactly(stream, _SIZE.unpack(_exactly(stream, _SIZE.size))[0]))


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = stream.read(size - len(data))
        if not more:
            raise EOFError("the other process is gone")
        data += more
    return bytes(data)


def main() -> None:
    """Answer requests until the other side closes."""
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    warnings.simplefilter("ignore")
    implementation: Any = None
    function: Callable[..., Any] | None = None
    while True:
        try:
            kind, payload = receive(requests)
        except EOFError:
            return
        answer: Any
        try:
            if kind == "load":
                implementation, sys.path[:] = payload
                function = implementation.load()
                answer = None
            else:
                if implementation is None or function is None:
                    raise RefengineError("nothing was loaded")
                answer = _ANSWERS[kind](implementation, function, payload)
        except (RefengineError, MemoryError) as error:
            send(answers, ("error", str(error) or "out of memory"))
            continue
        send(answers, ("ok", answer))


def _time(implementation: Implementation, function: Callable[..., Any], payload: Any) -> Any:
    from refengine.conformance.timing import time_case

    return time_case(implementation, function, payload)


def _count(implementation: Implementation, function: Callable[..., Any], payload: Any) -> Any:
    from refengine.conformance.accesses import count_case

    return count_case(implementation, function, payload)


_ANSWERS: dict[str, Callable[[Implementation, Callable[..., Any], Any], Any]] = {
    "case": run_case,
    "alone": same_alone,
    "time": _time,
    "count": _count,
}

if __name__ == "__main__":
    main()
