"""Runs a kernel's threads without a GPU, in Numba's simulator, one thread at a time.

Numba's simulator gives each CUDA thread a Python thread and lets them all run; its barriers poll,
and it has no warp operations. Here one thread runs at a time and hands the baton on where it must
wait for others, so that a meeting of 32 lanes costs 32 hand-overs and nothing spins. That makes the
emulated warp, tensor-core and copy instructions of ``ptx_simulator`` cheap enough for tests.

It also catches what hardware hides: a lane that never reaches a meeting point is reported with
where everyone waits; shared memory starts as NaN; asynchronous copies land only when waited for.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numba import cuda

SHARED_BYTES = 227 * 1024
_ALIGNMENT = 1024


class Dim3:
    """Three coordinates, as ``cuda.threadIdx``."""

    __slots__ = ("x", "y", "z")

    def __init__(self, x: int, y: int, z: int) -> None:
        self.x, self.y, self.z = x, y, z


class Meeting:
    """A point that some threads of a block reach together: their values, then the outcome."""

    __slots__ = ("outcome", "values", "waiting")

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}
        self.waiting: list[CudaThread] = []
        self.outcome: Any = None


class CudaThread(threading.Thread):
    """One thread of a block; runs only while it holds the baton (its own semaphore)."""

    def __init__(self, block: Block, number: int) -> None:
        super().__init__(daemon=True)
        self.block = block
        self.number = number
        self.lane = number % 32
        self.warp = number // 32
        self.threadIdx = Dim3(number, 0, 0)
        self.blockIdx = block.index
        self.baton = threading.Semaphore(0)
        self.place = "the start"
        # Asynchronous copies of this thread: the open group, then committed groups, oldest first.
        self.open_copies: list[Callable[[], None]] = []
        self.copy_groups: deque[list[Callable[[], None]]] = deque()

    def run(self) -> None:
        """Run the kernel's function as this thread, from when the baton first comes."""
        self.baton.acquire()
        try:
            if self.block.error is None:
                with np.errstate(all="ignore"):
                    self.block.function(*self.block.arguments)
        except BaseException as error:
            self.block.error = self.block.error or error
        self.block.leave(self)


class Block:
    """One thread block: its threads, its shared memory and its meeting points."""

    def __init__(
        self,
        function: Callable[..., None],
        arguments: Sequence[Any],
        index: Dim3,
        num_threads: int,
        dynamic_shared: int,
    ) -> None:
        self.function, self.arguments, self.index = function, arguments, index
        self.error: BaseException | None = None
        self.done = threading.Semaphore(0)
        self.meetings: dict[Hashable, Meeting] = {}
        self.barriers: dict[int, Any] = {}  # mbarriers by shared address
        arena = np.full(SHARED_BYTES + _ALIGNMENT, 0xFF, np.uint8)  # bytes of NaN
        start = -arena.ctypes.data % _ALIGNMENT
        self.shared = arena[start : start + SHARED_BYTES]
        self.dynamic_shared = dynamic_shared
        self.shared_used = -(-dynamic_shared // _ALIGNMENT) * _ALIGNMENT
        self.shared_arrays: dict[Hashable, np.ndarray] = {}
        self.threads = [CudaThread(self, i) for i in range(num_threads)]
        self.ready = deque(self.threads)
        self.alive = num_threads

    def run(self) -> None:
        """Run all threads to their end; raise the first error of any."""
        for thread in self.threads:
            thread.start()
        self.ready.popleft().baton.release()
        self.done.acquire()
        for thread in self.threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def hand_on(self) -> None:
        """Let the next ready thread run; a block with none left is finished or stuck."""
        if self.ready:
            self.ready.popleft().baton.release()
        elif self.alive == 0:
            self.done.release()
        else:
            if self.error is None:
                where: dict[str, list[int]] = {}
                for meeting in self.meetings.values():
                    for thread in meeting.waiting:
                        where.setdefault(thread.place, []).append(thread.number)
                places = "; ".join(f"threads {numbers} at {p}" for p, numbers in where.items())
                self.error = RuntimeError(
                    f"block {tuple(vars_of(self.index))} is stuck: {places or 'nobody waits'}"
                )
            for meeting in list(self.meetings.values()):
                self._wake(meeting)
            if self.ready:
                self.ready.popleft().baton.release()

    def _wake(self, meeting: Meeting) -> None:
        self.ready.extend(meeting.waiting)
        meeting.waiting = []

    def wait(self, thread: CudaThread, meeting: Meeting, place: str) -> None:
        """Give the baton away until ``meeting`` is over."""
        thread.place = place
        meeting.waiting.append(thread)
        self.hand_on()
        thread.baton.acquire()
        if self.error is not None:
            raise RuntimeError("another thread of the block failed") from self.error

    def meet(
        self,
        key: Hashable,
        size: int,
        value: Any,
        combine: Callable[[dict[int, Any]], Any],
        place: str,
    ) -> Any:
        """Wait for ``size`` threads at ``key``; the last to come combines everyone's values."""
        thread = current()
        meeting = self.meetings.setdefault(key, Meeting())
        meeting.values[thread.number] = value
        if len(meeting.values) == size:
            del self.meetings[key]
            meeting.outcome = combine(meeting.values)
            self._wake(meeting)
        else:
            self.wait(thread, meeting, place)
        return meeting.outcome

    def arrive(self, key: Hashable, size: int) -> None:
        """Count this thread in at ``key`` without waiting for the others."""
        meeting = self.meetings.setdefault(key, Meeting())
        meeting.values[current().number] = None
        if len(meeting.values) == size:
            del self.meetings[key]
            self._wake(meeting)

    def sync(self) -> None:
        """``cuda.syncthreads``: every thread of the block that has not returned."""
        self.meet("syncthreads", self.alive, None, lambda values: None, "syncthreads")

    def leave(self, thread: CudaThread) -> None:
        """A thread has returned; the others no longer wait for it at ``syncthreads``."""
        self.alive -= 1
        meeting = self.meetings.get("syncthreads")
        if meeting is not None and len(meeting.values) == self.alive:
            del self.meetings["syncthreads"]
            self._wake(meeting)
        self.hand_on()

    def allocate(self, key: Hashable, shape: Any, dtype: np.dtype[Any]) -> np.ndarray:
        """The shared array of one source location, the same for all threads of the block."""
        array = self.shared_arrays.get(key)
        if array is None:
            num_bytes = int(np.prod(shape)) * dtype.itemsize
            first = self.shared_used
            self.shared_used += -(-num_bytes // 16) * 16
            if self.shared_used > SHARED_BYTES:
                raise RuntimeError(f"shared memory: {self.shared_used} of {SHARED_BYTES} bytes")
            array = self.shared[first : first + num_bytes].view(dtype).reshape(shape)
            self.shared_arrays[key] = array
        return array


def vars_of(index: Dim3) -> tuple[int, int, int]:
    """The three coordinates."""
    return index.x, index.y, index.z


def current() -> CudaThread:
    """The CUDA thread that runs now."""
    thread = threading.current_thread()
    if not isinstance(thread, CudaThread):
        raise RuntimeError("this instruction was called outside a kernel")
    return thread


class _Shared:
    def array(self, shape: Any, dtype: Any) -> np.ndarray:
        block = current().block
        dtype = np.dtype(dtype.dtype)
        if shape == 0:
            return block.shared[: block.dynamic_shared].view(dtype)
        caller = sys._getframe(1)
        return block.allocate((caller.f_code, caller.f_lasti), shape, dtype)


class _Local:
    def array(self, shape: Any, dtype: Any) -> np.ndarray:
        return np.full(shape, 0xFF, np.uint8).astype(dtype.dtype)


class SimulatedCuda:
    """What a kernel sees as ``cuda`` while it is simulated."""

    def __init__(self, grid: Dim3, block: Dim3) -> None:
        self.gridDim, self.blockDim = grid, block
        self.shared, self.local = _Shared(), _Local()

    @property
    def threadIdx(self) -> Dim3:  # noqa: N802 (CUDA's name)
        """Which thread of its block this is."""
        return current().threadIdx

    @property
    def blockIdx(self) -> Dim3:  # noqa: N802
        """Which block this is."""
        return current().blockIdx

    def syncthreads(self) -> None:
        """Wait for every thread of the block that has not returned."""
        current().block.sync()

    def threadfence(self) -> None:
        """Nothing to order: one thread runs at a time."""


def launch(
    function: Callable[..., None],
    grid: tuple[int, int, int],
    num_threads: int,
    dynamic_shared: int,
    arguments: Sequence[Any],
) -> None:
    """Run every block of ``grid``, one after the other; ``cuda`` stands for the simulator."""
    simulated = SimulatedCuda(Dim3(*grid), Dim3(num_threads, 1, 1))
    # Device functions live in other modules of this package, and name ``cuda`` too.
    package = __name__.rpartition(".")[0] + "."
    scopes = [vars(m) for name, m in sys.modules.items() if name.startswith(package)]
    scopes.append(function.__globals__)
    swapped = [s for s in scopes if s.get("cuda") is cuda and s is not globals()]
    for scope in swapped:
        scope["cuda"] = simulated
    try:
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    Block(function, arguments, Dim3(x, y, z), num_threads, dynamic_shared).run()
    finally:
        for scope in swapped:
            scope["cuda"] = cuda
