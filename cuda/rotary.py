"""Rotary position embedding, in place; twin of ``reference.rotary``."""

from __future__ import annotations

import functools
from typing import Any

from numba import cuda

from . import checks, launch, ptx
from .elements import elements
from .launch import Kernel
from .ptx import F32, U32, U64

Array = Any
THREADS = 128


def rotary_embedding(positions: Array, query: Array, key: Array, cos_sin_cache: Array) -> None:
    """Rotate query and key heads in place (Su et al., 2021), first half paired with second half.

    Args:
        positions: ``[num_tokens]`` int64.
        query: ``[num_tokens, num_q_heads, head_dim]``, written; tokens may be strided.
        key: ``[num_tokens, num_kv_heads, head_dim]``, written; tokens may be strided.
        cos_sin_cache: ``[num_positions, rotary_dim]`` float32: cosines, then sines; elements of a
            head past ``rotary_dim`` stay as they are.

    Raises:
        ValueError: on shapes, dtypes or layouts that do not fit.
    """
    checks.check_array("query", query, (None, None, None), strided_rows=True)
    num_tokens, num_q_heads, head_dim = query.shape
    checks.check_array("key", key, (num_tokens, None, head_dim), strided_rows=True)
    checks.check_array("positions", positions, (num_tokens,), ("int64",))
    checks.check_array("cos_sin_cache", cos_sin_cache, (None, None), ("float32",))
    rotary_dim = cos_sin_cache.shape[1]
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise ValueError(
            f"cos_sin_cache: got {rotary_dim} columns; wanted an even number up to head_dim "
            f"{head_dim}"
        )
    checks.check_range("positions", positions, 0, cos_sin_cache.shape[0])
    dtype = checks.check_same_dtype(query=query, key=key)
    num_kv_heads = key.shape[1]
    if num_tokens == 0 or rotary_dim == 0:
        return
    narrow = elements(dtype, wide=False)
    query_at = launch.address(query, narrow.pointer)
    key_at = launch.address(key, narrow.pointer)
    table_at = launch.address(cos_sin_cache, ptx.POINTER_F32)
    steps = checks.strides(query)[0], checks.strides(key)[0]
    wide = checks.is_wide(
        rotary_dim // 2, narrow.itemsize, (steps[0], query_at), (steps[1], key_at), (head_dim, 0)
    ) and checks.is_wide(rotary_dim // 2, 4, (rotary_dim, table_at))
    pieces = (num_q_heads + num_kv_heads) * (rotary_dim // 2 // elements(dtype, wide=wide).width)
    _kernel(dtype, num_q_heads, num_kv_heads, head_dim, rotary_dim, wide)(
        (num_tokens, -(-pieces // THREADS), 1),
        launch.address(positions, ptx.POINTER_I64),
        query_at,
        key_at,
        table_at,
        *steps,
    )


@functools.cache
def _kernel(dtype: str, NUM_Q: int, NUM_KV: int, DIM: int, ROTARY: int, wide: bool) -> Kernel:
    """A thread rotates one piece of one head's first half with its partner in the second half."""
    part = elements(dtype, wide=wide)
    load, store, WIDTH = part.load, part.store, part.width
    load_table = elements("float32", wide=wide).load
    HALF = ROTARY // 2
    PER_HEAD = HALF // WIDTH
    TABLE_WIDTH = 4 if wide else 1
    TABLE_LOADS = WIDTH // TABLE_WIDTH

    def rotate(x: Any, at: Any, cosines: Any, sines: Any) -> None:
        first = cuda.local.array(WIDTH, F32)
        second = cuda.local.array(WIDTH, F32)
        load(x, at, first, 0)
        load(x, at + U64(HALF), second, 0)
        for i in range(WIDTH):
            a, b = first[i], second[i]
            first[i] = a * cosines[i] - b * sines[i]
            second[i] = b * cosines[i] + a * sines[i]
        store(x, at, first, 0)
        store(x, at + U64(HALF), second, 0)

    rotate_piece = ptx.device(rotate)

    def kernel(
        positions: Any, query: Any, key: Any, table: Any, query_step: Any, key_step: Any
    ) -> None:
        ptx.wait_for_previous_kernel()
        ptx.let_next_kernel_start()
        token = U64(cuda.blockIdx.x)
        piece = U32(U32(cuda.blockIdx.y) * U32(THREADS)) + U32(cuda.threadIdx.x)
        head = U32(piece) // U32(PER_HEAD)
        column = U64((U32(piece) % U32(PER_HEAD)) * U32(WIDTH))
        cosines = cuda.local.array(WIDTH, F32)
        sines = cuda.local.array(WIDTH, F32)
        if head < U32(NUM_Q + NUM_KV):
            row = U64(positions[token]) * U64(ROTARY) + column
            for i in range(TABLE_LOADS):
                load_table(table, row + U64(i * TABLE_WIDTH), cosines, i * TABLE_WIDTH)
                load_table(table, row + U64(HALF + i * TABLE_WIDTH), sines, i * TABLE_WIDTH)
            if head < U32(NUM_Q):
                at = token * U64(query_step) + U64(head) * U64(DIM) + column
                rotate_piece(query, at, cosines, sines)
            else:
                at = token * U64(key_step) + U64(head - U32(NUM_Q)) * U64(DIM) + column
                rotate_piece(key, at, cosines, sines)

    pointer = part.pointer
    parameters = (ptx.POINTER_I64, pointer, pointer, ptx.POINTER_F32, ptx.U64, ptx.U64)
    return Kernel(kernel, parameters, threads=THREADS)
