"""RMS norm of rows, and the residual addition before it; twin of ``reference.rms_norm``."""

from __future__ import annotations

import functools
from typing import Any

from numba import cuda

from . import checks, launch, ptx
from .elements import elements
from .launch import Kernel
from .ptx import F32, U32, U64

Array = Any
WARPS = 8  # of a block of one-warp rows


def rms_norm(x: Array, weight: Array, eps: float, out: Array) -> None:
    """``out = x / sqrt(mean(x ** 2) + eps) * weight`` over the last axis (Zhang, Sennrich, 2019).

    Args:
        x: ``[num_tokens, size]`` or ``[num_tokens, num_heads, size]``; tokens may be strided.
        weight: ``[size]``.
        eps: added to the mean of squares.
        out: the shape of ``x``, written; may be ``x`` itself.

    Raises:
        ValueError: on shapes, dtypes or layouts that do not fit.
    """
    if len(x.shape) not in (2, 3):
        raise ValueError(
            f"x: got shape {list(x.shape)}; wanted [tokens, size] or [tokens, heads, size]"
        )
    checks.check_array("x", x, (None,) * len(x.shape), strided_rows=True)
    checks.check_array("out", out, x.shape, strided_rows=True)
    checks.check_array("weight", weight, (x.shape[-1],))
    dtype = checks.check_same_dtype(x=x, weight=weight, out=out)
    _run(dtype, False, x, x, weight, eps, out)


def fused_add_rms_norm(x: Array, residual: Array, weight: Array, eps: float, out: Array) -> None:
    """``residual += x``, then ``out = rms_norm(residual)``; one pass over memory.

    The sum is rounded to the residual's dtype before it is normalised, as if written and read.

    Args:
        x: ``[num_tokens, size]``.
        residual: the same shape, written.
        weight: ``[size]``.
        eps: added to the mean of squares.
        out: the shape of ``x``, written; may be ``x`` itself.

    Raises:
        ValueError: on shapes, dtypes or layouts that do not fit.
    """
    checks.check_array("x", x, (None, None), strided_rows=True)
    checks.check_array("residual", residual, x.shape, strided_rows=True)
    checks.check_array("out", out, x.shape, strided_rows=True)
    checks.check_array("weight", weight, (x.shape[-1],))
    dtype = checks.check_same_dtype(x=x, residual=residual, weight=weight, out=out)
    _run(dtype, True, x, residual, weight, eps, out)


def _run(
    dtype: str, adds: bool, x: Array, residual: Array, weight: Array, eps: float, out: Array
) -> None:
    num_tokens, size = x.shape[0], x.shape[-1]
    num_heads = x.shape[1] if len(x.shape) == 3 else 1
    num_rows = num_tokens * num_heads
    if num_rows == 0 or size == 0:
        return
    narrow = elements(dtype, wide=False)
    arrays = (x, residual, out, weight)
    addresses = [launch.address(array, narrow.pointer) for array in arrays]
    steps = [checks.strides(array)[0] for array in arrays[:3]]
    wide = checks.is_wide(size, narrow.itemsize, *zip([*steps, size], addresses, strict=True))
    kernel, rows = _kernel(dtype, adds, size, wide)
    kernel((-(-num_rows // rows), 1, 1), *addresses, num_rows, num_heads, *steps, launch.bits(eps))


@functools.cache
def _kernel(dtype: str, adds: bool, SIZE: int, wide: bool) -> tuple[Kernel, int]:
    """Short rows get a warp each, long ones a block; a row stays in registers meanwhile."""
    part = elements(dtype, wide=wide)
    load, store, WIDTH = part.load, part.store, part.width
    pieces = -(-SIZE // WIDTH)
    ROW_WARPS = min(32, -(-pieces // 32))
    PER_THREAD = -(-pieces // (32 * ROW_WARPS))
    ROWS = WARPS if ROW_WARPS == 1 else 1
    KEPT = PER_THREAD * WIDTH
    STEP = 32 * ROW_WARPS * WIDTH
    NUM_THREADS = 32 * ROW_WARPS * ROWS

    def kernel(
        x: Any,
        residual: Any,
        out: Any,
        weight: Any,
        num_rows: Any,
        num_heads: Any,
        x_step: Any,
        residual_step: Any,
        out_step: Any,
        eps: Any,
    ) -> None:
        ptx.wait_for_previous_kernel()
        ptx.let_next_kernel_start()
        thread = U32(cuda.threadIdx.x)
        lane = thread & U32(31)
        warp = thread >> U32(5)
        row = U32(U32(cuda.blockIdx.x) * U32(ROWS))
        first = U32(thread * U32(WIDTH))
        if ROWS > 1:
            row = U32(row + warp)
            first = U32(lane * U32(WIDTH))
        alive = row < U32(num_rows)
        token = U64(row // U32(num_heads))
        head = U64(row % U32(num_heads)) * U64(SIZE)
        kept = cuda.local.array(KEPT, F32)
        added = cuda.local.array(WIDTH, F32)
        squares = F32(0.0)
        # 1 Read the row; add the residual stream where there is one.
        for i in range(PER_THREAD):
            column = U32(first + U32(i * STEP))
            if alive and column < U32(SIZE):
                at = head + U64(column)
                load(x, token * U64(x_step) + at, kept, i * WIDTH)
                if adds:
                    load(residual, token * U64(residual_step) + at, added, 0)
                    for j in range(WIDTH):
                        kept[i * WIDTH + j] += added[j]
                    store(residual, token * U64(residual_step) + at, kept, i * WIDTH)
                    round_to(kept, i * WIDTH)
                for j in range(WIDTH):
                    squares += kept[i * WIDTH + j] * kept[i * WIDTH + j]
        # 2 The mean of squares of the whole row.
        for i in range(5):
            squares += ptx.shuffle_xor(squares, U32(1 << i))
        if ROW_WARPS > 1:
            parts = cuda.shared.array(32, F32)
            if lane == U32(0):
                parts[warp] = squares
            cuda.syncthreads()
            squares = F32(0.0)
            for i in range(ROW_WARPS):
                squares += parts[i]
        scale = F32(1.0) / ptx.sqrt(squares / F32(SIZE) + eps)
        # 3 Scale and write.
        for i in range(PER_THREAD):
            column = U32(first + U32(i * STEP))
            if alive and column < U32(SIZE):
                load(weight, U64(column), added, 0)
                for j in range(WIDTH):
                    kept[i * WIDTH + j] = kept[i * WIDTH + j] * scale * added[j]
                store(out, token * U64(out_step) + head + U64(column), kept, i * WIDTH)

    round_to = part.round
    pointer = part.pointer
    parameters = (
        *(pointer, pointer, pointer, pointer),
        *(ptx.U32, ptx.U32, ptx.U64, ptx.U64, ptx.U64, ptx.F32),
    )
    return Kernel(kernel, parameters, threads=NUM_THREADS, fastmath=False), ROWS
