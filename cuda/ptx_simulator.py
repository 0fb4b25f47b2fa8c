"""The instructions of ``ptx``, emulated in Python for ``NUMBA_ENABLE_CUDASIM=1``.

A warp-wide instruction is "leave my operands, meet the other lanes, take my part of the outcome";
the last lane to arrive computes it with NumPy, by the fragment layouts of the PTX manual. Integers
are Python integers cut to their width; a pointer is a flat NumPy array.
"""

# ruff: noqa: D103 (the manual of PTX, and ptx_device, say what each instruction does)
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from .simulator import Meeting, current


class _Number:
    """A C type: called, it converts; as ``dtype`` it is what arrays hold."""

    def __init__(self, dtype: Any, convert: Callable[[Any], Any]) -> None:
        self.dtype = np.dtype(dtype)
        self._convert = convert

    def __call__(self, x: Any) -> Any:
        return self._convert(x)


def _signed(bits: int) -> Callable[[Any], int]:
    half = 1 << (bits - 1)
    return lambda x: ((int(x) + half) & ((1 << bits) - 1)) - half


U16 = _Number(np.uint16, lambda x: int(x) & 0xFFFF)
U32 = _Number(np.uint32, lambda x: int(x) & 0xFFFFFFFF)
U64 = _Number(np.uint64, lambda x: int(x) & 0xFFFFFFFFFFFFFFFF)
I32 = _Number(np.int32, _signed(32))
I64 = _Number(np.int64, _signed(64))
F32 = _Number(np.float32, np.float32)
VOID = None
POINTER_U16, POINTER_U32, POINTER_U64 = U16, U32, U64
POINTER_I32, POINTER_I64, POINTER_F32 = I32, I64, F32


def device(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that kernels call: itself."""
    return function


# ---------------------------------------------------------------- bit casts and conversions


def uint_as_float(x: int) -> Any:
    return np.uint32(x).view(np.float32)


def float_as_uint(x: Any) -> int:
    return int(np.float32(x).view(np.uint32))


def bf16_lo(x: int) -> Any:
    return uint_as_float((int(x) << 16) & 0xFFFFFFFF)


def bf16_hi(x: int) -> Any:
    return uint_as_float(int(x) & 0xFFFF0000)


def f16_lo(x: int) -> Any:
    return np.float32(np.uint16(int(x) & 0xFFFF).view(np.float16))


def f16_hi(x: int) -> Any:
    return np.float32(np.uint16(int(x) >> 16).view(np.float16))


def _pack(dtype: Any) -> Callable[[Any, Any], int]:
    def pack(lo: Any, hi: Any) -> int:
        return int(np.array([lo, hi], np.float32).astype(dtype).view(np.uint32)[0])

    return pack


pack_bf16 = _pack(ml_dtypes.bfloat16)
pack_f16 = _pack(np.float16)


def byte_permute(a: int, b: int, selector: int) -> int:
    pool = (int(b) << 32) | int(a)
    return sum(
        ((pool >> (8 * ((int(selector) >> (4 * i)) & 7))) & 0xFF) << (8 * i) for i in range(4)
    )


# ---------------------------------------------------------------- arithmetic


def exp2(x: Any) -> Any:
    return np.exp2(np.float32(x))


def reciprocal(x: Any) -> Any:
    return np.float32(1) / np.float32(x)


def sqrt(x: Any) -> Any:
    return np.sqrt(np.float32(x))


def fmax(a: Any, b: Any) -> Any:
    return np.fmax(np.float32(a), np.float32(b))


def tanh(x: Any) -> Any:
    return np.tanh(np.float32(x))


def mul(a: Any, b: Any) -> Any:
    return np.float32(a) * np.float32(b)


def fma(a: Any, b: Any, c: Any) -> Any:
    return np.float32(float(a) * float(b) + float(c))


# ---------------------------------------------------------------- memory


def _checked(pointer: np.ndarray, index: int, count: int) -> int:
    first = int(index)
    if not 0 <= first <= pointer.size - count:
        raise IndexError(f"elements {first}..{first + count - 1} of {pointer.size}")
    if pointer.itemsize * count == 16 and (first * pointer.itemsize) % 16:
        raise IndexError(f"element {first} ({pointer.dtype}) is not on a 16-byte boundary")
    return first


def load16(pointer: np.ndarray, index: int) -> tuple[int, ...]:
    first = _checked(pointer, index, 16 // pointer.itemsize)
    words = pointer[first : first + 16 // pointer.itemsize].view(np.uint32)
    return tuple(int(word) for word in words)


def store16(pointer: np.ndarray, index: int, x0: int, x1: int, x2: int, x3: int) -> None:
    first = _checked(pointer, index, 16 // pointer.itemsize)
    words = np.array([x0, x1, x2, x3], np.uint32)
    pointer[first : first + 16 // pointer.itemsize] = words.view(pointer.dtype)


def load4(pointer: np.ndarray, index: int) -> int:
    count = 4 // pointer.itemsize
    first = _checked(pointer, index, count)
    return int(pointer[first : first + count].view(np.uint32)[0])


def store4(pointer: np.ndarray, index: int, x: int) -> None:
    count = 4 // pointer.itemsize
    first = _checked(pointer, index, count)
    pointer[first : first + count] = np.array([x], np.uint32).view(pointer.dtype)


def load16_fresh(pointer: np.ndarray, index: int) -> tuple[Any, ...]:
    first = _checked(pointer, index, 4)
    return tuple(pointer[first : first + 4])


def load_fresh(pointer: np.ndarray, index: int) -> Any:
    return pointer[_checked(pointer, index, 1)]


def atomic_add(pointer: np.ndarray, index: int, value: int) -> int:
    first = _checked(pointer, index, 1)
    before = int(pointer[first])
    pointer[first] = (before + int(value)) & 0xFFFFFFFF
    return before


# ---------------------------------------------------------------- warps


def _warp(value: Any, combine: Callable[[list[Any]], Any], name: str) -> Any:
    """Meet the 32 lanes of this warp; every lane gets what ``combine`` makes of all operands."""
    thread = current()
    first = thread.warp * 32
    return thread.block.meet(
        ("warp", thread.warp),
        32,
        value,
        lambda values: combine([values[first + lane] for lane in range(32)]),
        f"{name} of warp {thread.warp}",
    )


def shuffle_xor(x: Any, mask: int) -> Any:
    return _warp(x, list, "shuffle_xor")[current().lane ^ int(mask)]


def shuffle(x: int, source: int) -> int:
    return int(_warp(int(x), list, "shuffle")[int(source) & 31])


def sync_warp() -> None:
    _warp(None, list, "sync_warp")


def wait_for_previous_kernel() -> None:
    """Kernels run one after the other here."""


def let_next_kernel_start() -> None:
    """Kernels run one after the other here."""


# ---------------------------------------------------------------- tensor cores (mma.sync)


def _halves(words: Any, dtype: Any) -> np.ndarray:
    """uint32 words ``[..., n]`` to float32 ``[..., 2 n]``, low half first."""
    halves = np.ascontiguousarray(np.array(words, np.uint32)).view(dtype)
    return np.asarray(halves, np.float32)


def _mma(dtype: Any) -> Callable[..., None]:
    def combine(operands: list[Any]) -> np.ndarray:
        halves = _halves(operands, dtype)  # [lane, 12]: a0..a3, b0, b1 in pairs
        a, b = np.empty((16, 16), np.float32), np.empty((16, 8), np.float32)
        for lane in range(32):
            row, column = lane // 4, 2 * (lane % 4)
            for i, (down, right) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
                part = halves[lane, 2 * i : 2 * i + 2]
                a[row + down, column + right : column + right + 2] = part
            b[column : column + 2, row] = halves[lane, 8:10]
            b[column + 8 : column + 10, row] = halves[lane, 10:12]
        return a @ b

    def mma(
        accumulators: np.ndarray, offset: int, a0: int, a1: int, a2: int, a3: int, b0: int, b1: int
    ) -> None:
        product = _warp([int(x) for x in (a0, a1, a2, a3, b0, b1)], combine, "mma")
        row, column = current().lane // 4, 2 * (current().lane % 4)
        accumulators[offset : offset + 2] += product[row, column : column + 2]
        accumulators[offset + 2 : offset + 4] += product[row + 8, column : column + 2]

    return mma


mma_bf16 = _mma(ml_dtypes.bfloat16)
mma_f16 = _mma(np.float16)


def transpose8x8(x: int) -> int:
    def combine(operands: list[Any]) -> np.ndarray:
        matrix = np.array(operands, np.uint32).view(np.uint16).reshape(8, 8)
        return np.ascontiguousarray(matrix.T).reshape(32, 2).view(np.uint32)[:, 0]

    return int(_warp(int(x), combine, "transpose8x8")[current().lane])


def _load_matrices(address: int, transposed: bool) -> tuple[int, ...]:
    """Lane ``8 i + r`` names row ``r`` of matrix ``i``; each lane gets one word of each."""
    shared = current().block.shared

    def combine(addresses: list[int]) -> np.ndarray:
        rows = [shared[a : a + 16].view(np.uint16) for a in addresses]
        matrices = np.array(rows).reshape(4, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.transpose(0, 2, 1))
        return matrices.reshape(4, 32, 2).view(np.uint32)[..., 0]

    words = _warp(int(address), combine, "load_matrix")[:, current().lane]
    return tuple(int(word) for word in words)


def load_matrix(address: int) -> tuple[int, ...]:
    return _load_matrices(address, transposed=False)


def load_matrix_transposed(address: int) -> tuple[int, ...]:
    return _load_matrices(address, transposed=True)


# ---------------------------------------------------------------- shared memory


def shared_address(array: np.ndarray) -> int:
    return int(array.ctypes.data - current().block.shared.ctypes.data)


def store16_shared(address: int, x0: int, x1: int, x2: int, x3: int) -> None:
    words = np.array([x0, x1, x2, x3], np.uint32)
    current().block.shared[address : address + 16] = words.view(np.uint8)


def copy16_async(destination: int, pointer: np.ndarray, index: int, num_bytes: int) -> None:
    """Lands when this thread waits for its group, not before; the source is read then too."""
    thread = current()
    target = thread.block.shared[destination : destination + 16]
    if num_bytes:
        first = _checked(pointer, index, 16 // pointer.itemsize)
        source = pointer[first : first + 16 // pointer.itemsize].view(np.uint8)
    else:
        source = np.zeros(16, np.uint8)
    target[:] = 0xFF
    thread.open_copies.append(lambda: target.__setitem__(slice(None), source))


def copy_commit() -> None:
    thread = current()
    thread.copy_groups.append(thread.open_copies)
    thread.open_copies = []


def _wait_copies(pending: int) -> None:
    groups = current().copy_groups
    while len(groups) > pending:
        for copy in groups.popleft():
            copy()


def copy_wait_all() -> None:
    _wait_copies(0)


def copy_wait_all_but_one() -> None:
    _wait_copies(1)


def fence_async_shared() -> None:
    """One thread runs at a time: nothing to order."""


# ---------------------------------------------------------------- bulk copies and their barriers


class _Barrier:
    """An mbarrier: the phase completes when all have arrived and all bytes have landed."""

    def __init__(self, count: int) -> None:
        self.count, self.arrived, self.bytes, self.phase = count, 0, 0, 0
        self.copies: list[Callable[[], int]] = []
        self.meeting = Meeting()

    def land(self) -> None:
        """Carry out the copies that are on their way."""
        while self.copies:
            self.bytes -= self.copies.pop(0)()
        self.settle()

    def settle(self) -> None:
        if self.arrived == self.count and self.bytes == 0:
            self.phase, self.arrived = self.phase ^ 1, 0
            block = current().block
            block.ready.extend(self.meeting.waiting)
            self.meeting.waiting = []


def _barrier(address: int) -> _Barrier:
    found = current().block.barriers.get(int(address))
    if found is None:
        raise RuntimeError(f"no barrier was initialised at shared address {address}")
    return found  # type: ignore[no-any-return]


def barrier_init(address: int, count: int) -> None:
    barrier = _Barrier(int(count))
    block = current().block
    block.barriers[int(address)] = barrier
    block.meetings[("barrier", int(address))] = barrier.meeting


def barrier_arrive(address: int) -> None:
    barrier = _barrier(address)
    barrier.arrived += 1
    barrier.settle()


def barrier_expect(address: int, num_bytes: int) -> None:
    barrier = _barrier(address)
    barrier.bytes += int(num_bytes)
    barrier.arrived += 1
    barrier.settle()


def barrier_wait(address: int, parity: int) -> None:
    """Copies that the barrier counts land when someone waits for it, not before."""
    barrier, thread = _barrier(address), current()
    while barrier.phase == int(parity):
        barrier.land()
        if barrier.phase == int(parity):
            thread.block.wait(thread, barrier.meeting, f"the barrier at {address}")


def fence_barrier_init() -> None:
    """One thread runs at a time: nothing to order."""


def sync_named(number: int, count: int) -> None:
    key = ("named", int(number))
    current().block.meet(key, int(count), None, lambda values: None, f"named barrier {number}")


def arrive_named(number: int, count: int) -> None:
    key = ("named", int(number))
    current().block.arrive(key, int(count))


class TensorMap:
    """A cache as the copy engine sees it: ``[slots, heads, dims]`` and the slots of a box."""

    def __init__(self, cache: np.ndarray, box_slots: int) -> None:
        self.cache = cache.reshape(-1, *cache.shape[2:]).view(np.uint16)
        self.box_slots = box_slots


POINTER_MAP = None
BOX_DIMS = 64


def copy_box(
    destination: int, tensor_map: TensorMap, column: int, head: int, slot: int, barrier: int
) -> None:
    shared = current().block.shared
    first, rows = int(destination), tensor_map.box_slots
    if first % 128:
        raise RuntimeError(f"a box must start on a 128-byte boundary, got {first}")
    shared[first : first + 128 * rows] = 0xFF

    def land() -> int:
        box = np.zeros((rows, BOX_DIMS), np.uint16)  # what lies outside the cache reads as zero
        part = tensor_map.cache[slot : slot + rows, head, column : column + BOX_DIMS]
        box[: part.shape[0], : part.shape[1]] = part
        for row in range(rows):
            for piece in range(8):
                at = first + 128 * row + 16 * piece
                at ^= ((at >> 7) & 7) << 4
                shared[at : at + 16] = box[row, 8 * piece : 8 * piece + 8].view(np.uint8)
        return rows * 128

    counted = _barrier(barrier)
    counted.copies.append(land)
    if counted.meeting.waiting:
        counted.land()


# ---------------------------------------------------------------- tensor cores (wgmma, sm_90a)


def _warpgroup(value: Any, combine: Callable[[list[Any]], Any], name: str) -> Any:
    """Meet the 128 lanes of this group of four warps."""
    thread = current()
    group = thread.warp // 4
    return thread.block.meet(
        ("warpgroup", group),
        128,
        value,
        lambda values: combine([values[128 * group + i] for i in range(128)]),
        f"{name} of warpgroup {group}",
    )


def _described(descriptor: int, rows: int, transposed: bool, dtype: Any) -> np.ndarray:
    """The matrix ``[rows, 16]`` (transposed: ``[16, rows]``) that a descriptor names."""
    descriptor = int(descriptor)
    if descriptor >> 62 != 1:
        raise RuntimeError("the emulation knows descriptors of 128-byte swizzle alone")
    start = (descriptor & 0x3FFF) << 4
    leading = ((descriptor >> 16) & 0x3FFF) << 4
    stride = ((descriptor >> 32) & 0x3FFF) << 4
    shared = current().block.shared.view(np.uint16)
    if transposed:  # columns adjacent, blocks of 64 of them, groups of 8 rows
        row, column = np.arange(16)[:, None], np.arange(rows)[None]
        at = start + column // 64 * leading + row // 8 * stride + row % 8 * 128 + column % 64 * 2
    else:
        row, column = np.arange(rows)[:, None], np.arange(16)[None]
        at = start + row // 8 * stride + row % 8 * 128 + column * 2
    at = at ^ (((at >> 7) & 7) << 4)
    return np.asarray(shared[at >> 1].view(dtype), np.float32)


_KINDS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


def _own_part(product: np.ndarray) -> np.ndarray:
    """This lane's elements of a ``[64, columns]`` result, in register order."""
    thread = current()
    row = 16 * (thread.warp % 4) + thread.lane // 4
    column = 2 * (thread.lane % 4) + np.arange(0, product.shape[1], 8)
    parts = [
        product[row, column], product[row, column + 1],
        product[row + 8, column], product[row + 8, column + 1],
    ]  # fmt: skip
    return np.stack(parts, axis=1).reshape(-1)


def wgmma_shared(
    kind: str, columns: int, a_steps: list[int], b_steps: list[int]
) -> Callable[..., None]:
    dtype = _KINDS[kind]

    def product(scores: np.ndarray, a: int, b: int) -> None:
        def combine(values: list[Any]) -> np.ndarray:
            total = np.zeros((64, columns), np.float32)
            for a_step, b_step in zip(a_steps, b_steps, strict=True):
                left = _described(values[0][0] + a_step, 64, False, dtype)
                total += left @ _described(values[0][1] + b_step, columns, False, dtype).T
            return total

        scores[:] = _own_part(_warpgroup((int(a), int(b)), combine, "wgmma"))

    return product


def wgmma_registers(kind: str, columns: int, b_steps: list[int]) -> Callable[..., None]:
    dtype = _KINDS[kind]

    def product(sums: np.ndarray, weights: np.ndarray, b: int) -> None:
        def combine(values: list[Any]) -> np.ndarray:
            words = np.array([value[0] for value in values], np.uint32)  # [128, 4 * steps]
            halves = _halves(words, dtype).reshape(4, 8, 4, len(b_steps), 2, 2, 2)
            # [warp, row, lane column, step, right half, lower half, element]
            left = halves.transpose(0, 5, 1, 3, 4, 2, 6).reshape(64, len(b_steps), 16)
            total = np.zeros((64, columns), np.float32)
            for i, b_step in enumerate(b_steps):
                total += left[:, i] @ _described(values[0][1] + b_step, columns, True, dtype)
            return total

        mine = [int(word) for word in weights]
        sums[:] += _own_part(_warpgroup((mine, int(b)), combine, "wgmma"))

    return product


def wgmma_wait(count: int, pending: int) -> Callable[[np.ndarray], None]:
    def wait(array: np.ndarray) -> None:
        """Products are done when they are started."""

    return wait


def set_registers(direction: str, count: int) -> Callable[[], None]:
    def change() -> None:
        """There are no registers to count."""

    return change
