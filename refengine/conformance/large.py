"""Caches of more than 2**31 elements, on machines that do not have the memory for them."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from refengine.conformance.precision import Array


def empty_cache(shape: tuple[int, ...], dtype: Any, huge: bool) -> Array:
    """Zeros; a huge cache takes memory only where it is touched."""
    if not huge:
        return np.zeros(shape, dtype)
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return np.zeros(shape, dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype).reshape(shape)
