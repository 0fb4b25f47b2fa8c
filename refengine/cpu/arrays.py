"""Arrays as the CPU kernels want them: aligned, bfloat16 seen as uint16, layouts checked."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)
UINT16 = np.dtype(np.uint16)
# Below this many elements, a loop on one thread ends before the others have woken up.
SERIAL_ELEMENTS = 1 << 16
_CACHE_LINE = 64  # bytes, and the width of the widest loads


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> Array:
    """An uninitialised array that begins on a cache line, so that 64-byte rows never straddle."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(size + _CACHE_LINE, np.uint8)
    return _aligned(memory, size, shape, dtype)


def aligned_zeros(shape: tuple[int, ...], dtype: Any) -> Array:
    """Like ``aligned_empty``, but zero: memory is taken from the system when first touched."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return _aligned(np.zeros(size + _CACHE_LINE, np.uint8), size, shape, dtype)


def _aligned(memory: Array, size: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    start = -memory.ctypes.data % _CACHE_LINE
    return memory[start : start + size].view(dtype).reshape(shape)


def bits(array: Array) -> Array:
    """A bfloat16 array as the uint16 view that Numba knows; others as they are."""
    return array.view(UINT16) if array.dtype == BFLOAT16 else array
