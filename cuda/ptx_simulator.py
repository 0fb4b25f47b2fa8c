"""The instructions of ``ptx``, emulated in Python for ``NUMBA_ENABLE_CUDASIM=1``.

A warp-wide instruction is "leave my operands, meet the other lanes, take my part of the outcome";
the last lane to arrive computes it with NumPy, by the fragment layouts of the PTX manual. Integers
are Python integers cut to their width; a pointer is a flat NumPy array.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from .simulator import current


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
    return np.ascontiguousarray(np.array(words, np.uint32)).view(dtype).astype(np.float32)


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
