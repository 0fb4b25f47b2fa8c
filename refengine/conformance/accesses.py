"""``--count-accesses``: which memory accesses a CUDA kernel makes, counted in the simulator.

A GPU serves a warp's 32 accesses of one instruction together, in sectors of 32 bytes. Threads that
read neighbours share sectors; threads that read far apart move 32 bytes for every 4 they want. The
simulator has no speed, but it shows exactly that, line by line, on a laptop.
"""

from __future__ import annotations

import linecache
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refengine.conformance.calling import Outcome, call_plain
from refengine.conformance.case import Case, load_cases
from refengine.conformance.implementation import Implementation
from refengine.conformance.kernels import KERNELS
from refengine.conformance.precision import Array
from refengine.conformance.runner import make_runner
from refengine.errors import RefengineError

SECTOR = 32
WARP = 32
SIMULATOR = {"NUMBA_ENABLE_CUDASIM": "1", "NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS": "0"}
# Helpers that kernels read and write through: the line that counts is the kernel's.
_HELPERS = ("devicearray.py", "ptx_simulator.py", "elements.py", Path(__file__).name)

Row = dict[str, Any]


class Access(NamedTuple):
    """Who made an access, where in the source, and which time."""

    line: tuple[str, int]
    store: bool
    place: tuple[Any, ...]
    warp: tuple[Any, ...]
    turn: int


class Recorder:
    """Collects accesses of every simulated thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.turns: dict[tuple[Any, ...], int] = defaultdict(int)
        self.requests: dict[Access, list[tuple[int, int]]] = defaultdict(list)
        self.threads: set[tuple[Any, ...]] = set()

    def add(self, store: bool, address: int, size: int) -> None:
        """Note one access of the thread that is running."""
        who = _thread()
        if who is None:
            return
        block, number = who
        frame: Any = sys._getframe(2)
        place = []
        while frame is not None and Path(frame.f_code.co_filename).name in _HELPERS:
            place.append((frame.f_code.co_name, frame.f_lineno))
            frame = frame.f_back
        if frame is None:
            return
        line = frame.f_code.co_filename, frame.f_lineno
        key = (*place, frame.f_code, _position(frame.f_code, frame.f_lasti))
        with self.lock:
            self.threads.add((block, number))
            turn = self.turns[block, number, key, store]
            self.turns[block, number, key, store] += 1
            warp = block, number // WARP
            self.requests[Access(line, store, key, warp, turn)].append((address, size))

    def rows(self) -> list[Row]:
        """A row a source line, loads before stores, and one for all."""
        lines: dict[tuple[tuple[str, int], bool], list[list[tuple[int, int]]]] = defaultdict(list)
        for access, touched in self.requests.items():
            lines[access.line, access.store].append(touched)
        threads = max(len(self.threads), 1)
        out = [
            _row(f"{Path(file).name}:{number}", store, requests, threads,
                 linecache.getline(file, number).strip())
            for ((file, number), store), requests in sorted(lines.items(), key=lambda item: item[0])
        ]  # fmt: skip
        for store in (False, True):
            everything = [r for (_, s), requests in lines.items() if s == store for r in requests]
            if everything:
                out.append(_row("all lines", store, everything, threads, ""))
        return out


def _row(
    line: str, store: bool, requests: list[list[tuple[int, int]]], threads: int, source: str
) -> Row:
    accesses = sum(len(touched) for touched in requests)
    sectors = useful = 0
    for touched in requests:
        seen: set[int] = set()
        wanted: set[int] = set()
        for address, size in touched:
            seen.update(range(address // SECTOR, (address + size - 1) // SECTOR + 1))
            wanted.update(range(address, address + size))
        sectors += len(seen)
        useful += len(wanted)
    return {
        "line": line,
        "kind": "store" if store else "load",
        "per thread": accesses / threads,
        "bytes": sum(size for touched in requests for _, size in touched) / max(accesses, 1),
        "warp requests": len(requests),
        "sectors/request": sectors / max(len(requests), 1),
        "useful %": 100 * useful / max(sectors * SECTOR, 1),
        "source": source,
    }


def count_implementation(
    implementation: Implementation, dtypes: Iterable[str], time_limit: float | None = None
) -> list[Row]:
    """Count the accesses of a kernel on the first case of the set "simulator".

    Args:
        implementation: a function that launches Numba-CUDA kernels on NumPy arrays.
        dtypes: of the cases.
        time_limit: seconds; None for ten minutes.

    Returns:
        A row a source line: accesses a thread, bytes an access, requests (a warp's accesses of one
        instruction), 32-byte sectors a request, and the share of the sectors' bytes that is used.

    Raises:
        RefengineError: where the kernel launches nothing in the simulator.
    """
    cases = load_cases(implementation.kernel, "simulator", dtypes=dtypes)
    runner = make_runner(implementation, time_limit or 600.0, SIMULATOR)
    try:
        runner.start("count", cases[0])
        answer = runner.finish()
    finally:
        runner.close()
    if isinstance(answer, Outcome):
        raise RefengineError(f"{implementation.name}: {answer.message}")
    if not answer:
        raise RefengineError(
            f"{implementation.name} made no access in the CUDA simulator; --count-accesses is for "
            "functions that launch Numba-CUDA kernels"
        )
    return answer  # type: ignore[no-any-return]


def count_case(
    implementation: Implementation, function: Callable[..., Any], case: Case
) -> list[Row]:
    """Run one case in the simulator of this process and count."""
    spec = KERNELS[case.kernel]
    recorder = Recorder()
    _watch_numba(recorder)
    _watch_ours(recorder)
    call_plain(function, spec, spec.build(case).arguments)
    return recorder.rows()


@cache
def _positions(code: Any) -> list[Any]:
    return list(code.co_positions())


def _position(code: Any, instruction: int) -> Any:
    """Where in its line an instruction stands; its number changes while Python optimises it."""
    return _positions(code)[instruction // 2]


def _thread() -> tuple[tuple[int, int, int], int] | None:
    """Block and number of the CUDA thread that runs; None outside a kernel."""
    thread: Any = threading.current_thread()
    index = getattr(thread, "blockIdx", None)
    if index is None:
        return None
    number = getattr(thread, "thread_id", None)
    number = thread.number if number is None else number
    return (index.x, index.y, index.z), number


def _address(array: Array, index: Any) -> tuple[int, int]:
    """Where an element or a row lies, and its bytes."""
    places = index if isinstance(index, tuple) else (index,)
    part: Any = array[places]
    if isinstance(part, np.ndarray):
        return part.__array_interface__["data"][0], part.nbytes
    start = array.__array_interface__["data"][0]
    for place, step, length in zip(places, array.strides, array.shape, strict=True):
        start += (int(place) % length) * step
    return start, array.itemsize


def _watch_numba(recorder: Recorder) -> None:
    """Record what kernels of ``numba.cuda.jit`` do with their arguments."""
    from numba.cuda.simulator.cudadrv import devicearray

    fake = devicearray.FakeWithinKernelCUDAArray
    get, put = fake.__getitem__, fake.__setitem__

    def read(self: Any, index: Any) -> Any:
        value = get(self, index)
        if not isinstance(value, (fake, np.ndarray)):
            recorder.add(False, *_address(self._item._ary, index))
        return value

    def write(self: Any, index: Any, value: Any) -> None:
        recorder.add(True, *_address(self._item._ary, index))
        put(self, index, value)

    fake.__getitem__, fake.__setitem__ = read, write


def _watch_ours(recorder: Recorder) -> None:
    """Record what the kernels of ``refengine.cuda`` do with theirs."""
    try:
        from refengine.cuda import simulator
    except ImportError:
        return
    launch = simulator.launch

    class Watched(np.ndarray[Any, Any]):
        """A kernel's pointer."""

        def __getitem__(self, index: Any) -> Any:
            plain = self.view(np.ndarray)
            recorder.add(False, *_address(plain, index))
            return plain[index]

        def __setitem__(self, index: Any, value: Any) -> None:
            plain = self.view(np.ndarray)
            recorder.add(True, *_address(plain, index))
            plain[index] = value

    def watching(
        function: Any, grid: Any, num_threads: int, dynamic_shared: int, arguments: Any
    ) -> None:
        watched = [a.view(Watched) if isinstance(a, np.ndarray) else a for a in arguments]
        launch(function, grid, num_threads, dynamic_shared, watched)

    simulator.launch = watching
