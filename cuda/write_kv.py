"""Scatter new keys and values into their cache slots; twin of ``reference.write_kv``."""

from __future__ import annotations

import functools
from typing import Any

from numba import cuda

from . import checks, launch, ptx
from .launch import Kernel
from .ptx import U32, U64

Array = Any
THREADS = 256
# Pieces a thread has in flight for keys and as many for values: enough to cover memory's latency.
PIECES = 2
WORDS = 8 * PIECES


def write_kv(
    key: Array, value: Array, key_cache: Array, value_cache: Array, slot_mapping: Array
) -> None:
    """Write each token's key and value to its slot.

    Args:
        key: ``[num_tokens, num_kv_heads, head_dim]``; rows may be strided.
        value: the same shape and dtype.
        key_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]``, written.
        value_cache: the same.
        slot_mapping: ``[num_tokens]`` int64, ``block * block_size + offset``; -1 is skipped.

    Raises:
        ValueError: on shapes, dtypes or layouts that do not fit.
    """
    checks.check_array("key_cache", key_cache, (None, None, None, None))
    num_blocks, block_size, num_heads, head_dim = key_cache.shape
    num_tokens = key.shape[0]
    shape = (num_tokens, num_heads, head_dim)
    checks.check_array("key", key, (None, num_heads, head_dim), strided_rows=True)
    checks.check_array("value", value, shape, strided_rows=True)
    checks.check_array("value_cache", value_cache, key_cache.shape)
    checks.check_array("slot_mapping", slot_mapping, (num_tokens,), ("int64",))
    checks.check_same_dtype(key=key, value=value, key_cache=key_cache, value_cache=value_cache)
    checks.check_range("slot_mapping", slot_mapping, -1, num_blocks * block_size)
    if num_tokens == 0:
        return
    row = num_heads * head_dim
    itemsize = 4 if checks.dtype_name(key) == "float32" else 2
    key_step, value_step = checks.strides(key)[0], checks.strides(value)[0]
    kind = ptx.POINTER_U32 if itemsize == 4 else ptx.POINTER_U16
    key_at, value_at = launch.address(key, kind), launch.address(value, kind)
    wide = checks.is_wide(row, itemsize, (key_step, key_at), (value_step, value_at))
    kernel = _kernel(row, itemsize, wide)
    pieces = num_tokens * (row * itemsize // 16 if wide else row)
    kernel(
        (-(-pieces // (THREADS * PIECES)), 1, 1),
        key_at,
        value_at,
        launch.address(key_cache, kind),
        launch.address(value_cache, kind),
        launch.address(slot_mapping, ptx.POINTER_I64),
        num_tokens,
        key_step,
        value_step,
    )


@functools.cache
def _kernel(ROW: int, itemsize: int, wide: bool) -> Kernel:
    """A row is cut into pieces of 16 bytes (or single elements); a thread moves ``PIECES``."""
    WIDTH = 16 // itemsize if wide else 1
    PER_ROW = ROW // WIDTH
    kind = ptx.POINTER_U32 if itemsize == 4 else ptx.POINTER_U16

    def wide_kernel(
        key: Any,
        value: Any,
        key_cache: Any,
        value_cache: Any,
        slot_mapping: Any,
        num_tokens: Any,
        key_step: Any,
        value_step: Any,
    ) -> None:
        ptx.wait_for_previous_kernel()
        ptx.let_next_kernel_start()
        words = cuda.local.array(WORDS, U32)
        target = cuda.local.array(PIECES, U64)
        first = U32(cuda.blockIdx.x) * U32(THREADS * PIECES) + U32(cuda.threadIdx.x)
        for i in range(PIECES):
            piece = first + U32(i * THREADS)
            token = piece // U32(PER_ROW)
            column = U64((piece % U32(PER_ROW)) * U32(WIDTH))
            slot = -1
            if token < U32(num_tokens):
                slot = slot_mapping[U64(token)]
            target[i] = U64(0xFFFFFFFFFFFFFFFF)
            if slot >= 0:
                target[i] = U64(slot) * U64(ROW) + column
                k = ptx.load16(key, U64(token) * U64(key_step) + column)
                v = ptx.load16(value, U64(token) * U64(value_step) + column)
                for j in range(4):
                    words[i * 8 + j] = k[j]
                    words[i * 8 + 4 + j] = v[j]
        for i in range(PIECES):
            if U64(target[i]) != U64(0xFFFFFFFFFFFFFFFF):
                to = U64(target[i])
                w = i * 8
                ptx.store16(key_cache, to, words[w], words[w + 1], words[w + 2], words[w + 3])
                ptx.store16(value_cache, to, words[w + 4], words[w + 5], words[w + 6], words[w + 7])

    def narrow_kernel(
        key: Any,
        value: Any,
        key_cache: Any,
        value_cache: Any,
        slot_mapping: Any,
        num_tokens: Any,
        key_step: Any,
        value_step: Any,
    ) -> None:
        ptx.wait_for_previous_kernel()
        ptx.let_next_kernel_start()
        first = U32(cuda.blockIdx.x) * U32(THREADS * PIECES) + U32(cuda.threadIdx.x)
        for i in range(PIECES):
            piece = first + U32(i * THREADS)
            token = piece // U32(ROW)
            column = U64(piece % U32(ROW))
            if token < U32(num_tokens):
                slot = slot_mapping[U64(token)]
                if slot >= 0:
                    to = U64(slot) * U64(ROW) + column
                    key_cache[to] = key[U64(token) * U64(key_step) + column]
                    value_cache[to] = value[U64(token) * U64(value_step) + column]

    return Kernel(
        wide_kernel if wide else narrow_kernel,
        (kind, kind, kind, kind, ptx.POINTER_I64, ptx.U32, ptx.U64, ptx.U64),
        threads=THREADS,
        blocks_per_sm=8,
    )
