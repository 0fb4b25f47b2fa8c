"""Gated activations of the MLP; twin of ``reference.activation``."""

from __future__ import annotations

import functools
import math
from typing import Any

from numba import cuda

from . import checks, launch, ptx
from .elements import elements
from .launch import Kernel
from .ptx import F32, U32, U64

Array = Any
THREADS = 128
LOG2_E = math.log2(math.e)
SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


def silu_and_mul(x: Array, out: Array) -> None:
    """``out = silu(x[:, :d]) * x[:, d:]`` with ``silu(a) = a / (1 + exp(-a))``.

    Args:
        x: ``[num_tokens, 2 * d]``.
        out: ``[num_tokens, d]``, written.

    Raises:
        ValueError: on shapes, dtypes or layouts that do not fit.
    """
    _run("silu", x, out)


def gelu_tanh_and_mul(x: Array, out: Array) -> None:
    """``out = gelu(x[:, :d]) * x[:, d:]`` with GELU's tanh form (Hendrycks and Gimpel, 2016).

    Args:
        x: ``[num_tokens, 2 * d]``.
        out: ``[num_tokens, d]``, written.

    Raises:
        ValueError: on shapes, dtypes or layouts that do not fit.
    """
    _run("gelu_tanh", x, out)


def soft_cap(x: Array, cap: float) -> None:
    """``x = cap * tanh(x / cap)``, in place.

    Args:
        x: any shape, contiguous, written.
        cap: positive.

    Raises:
        ValueError: on a cap, dtype or layout that does not fit.
    """
    checks.check_array("x", x, (None,) * len(x.shape))
    if not cap > 0:
        raise ValueError(f"cap: got {cap}; wanted above 0")
    dtype, size = checks.dtype_name(x), math.prod(x.shape)
    if size == 0:
        return
    narrow = elements(dtype, wide=False)
    at = launch.address(x, narrow.pointer)
    wide = checks.is_wide(size, narrow.itemsize, (0, at))
    pieces = size // elements(dtype, wide=wide).width
    kernel = _soft_cap_kernel(dtype, wide)
    kernel((-(-pieces // THREADS), 1, 1), at, pieces, launch.bits(1.0 / cap), launch.bits(cap))


@functools.cache
def _soft_cap_kernel(dtype: str, wide: bool) -> Kernel:
    part = elements(dtype, wide=wide)
    load, store, WIDTH = part.load, part.store, part.width

    def kernel(x: Any, pieces: Any, inverse: Any, cap: Any) -> None:
        ptx.wait_for_previous_kernel()
        ptx.let_next_kernel_start()
        piece = U64(cuda.blockIdx.x) * U64(THREADS) + U64(cuda.threadIdx.x)
        values = cuda.local.array(WIDTH, F32)
        if piece < U64(pieces):
            load(x, piece * U64(WIDTH), values, 0)
            for i in range(WIDTH):
                values[i] = cap * ptx.tanh(values[i] * inverse)
            store(x, piece * U64(WIDTH), values, 0)

    return Kernel(kernel, (part.pointer, ptx.U64, ptx.F32, ptx.F32), threads=THREADS)


def _run(activation: str, x: Array, out: Array) -> None:
    checks.check_array("out", out, (None, None))
    num_tokens, size = out.shape
    checks.check_array("x", x, (num_tokens, 2 * size))
    dtype = checks.check_same_dtype(x=x, out=out)
    if num_tokens == 0 or size == 0:
        return
    kind = elements(dtype, wide=False).pointer
    itemsize = elements(dtype, wide=False).itemsize
    x_at, out_at = launch.address(x, kind), launch.address(out, kind)
    wide = checks.is_wide(size, itemsize, (size, x_at), (size, out_at))
    width = elements(dtype, wide=wide).width
    grid = (-(-size // (THREADS * width)), num_tokens, 1)
    if num_tokens > 65535:
        grid = (grid[0], 65535, -(-num_tokens // 65535))
    _kernel(activation, dtype, wide)(grid, x_at, out_at, num_tokens, size)


@functools.cache
def _kernel(activation: str, dtype: str, wide: bool) -> Kernel:
    """A thread makes one 16-byte piece of one row."""
    part = elements(dtype, wide=wide)
    load, store, WIDTH = part.load, part.store, part.width

    def silu(a: Any) -> Any:
        return a / (F32(1.0) + ptx.exp2(F32(-LOG2_E) * a))

    def gelu_tanh(a: Any) -> Any:
        inner = F32(SQRT_2_OVER_PI) * (a + F32(0.044715) * a * a * a)
        # tanh(y) = 1 - 2 / (1 + exp(2 y)): right at both ends without a branch.
        tanh = F32(1.0) - F32(2.0) / (F32(1.0) + ptx.exp2(F32(2.0 * LOG2_E) * inner))
        return F32(0.5) * a * (F32(1.0) + tanh)

    function = ptx.device({"silu": silu, "gelu_tanh": gelu_tanh}[activation])

    def kernel(x: Any, out: Any, num_tokens: Any, size: Any) -> None:
        ptx.wait_for_previous_kernel()
        ptx.let_next_kernel_start()
        column = U64(cuda.blockIdx.x) * U64(THREADS * WIDTH)
        column += U64(U32(cuda.threadIdx.x) * U32(WIDTH))
        token = U64(cuda.blockIdx.z) * U64(65535) + U64(cuda.blockIdx.y)
        gate = cuda.local.array(WIDTH, F32)
        up = cuda.local.array(WIDTH, F32)
        if column < U64(size) and token < U64(num_tokens):
            row = token * U64(2) * U64(size)
            load(x, row + column, gate, 0)
            load(x, row + U64(size) + column, up, 0)
            for i in range(WIDTH):
                gate[i] = function(gate[i]) * up[i]
            store(out, token * U64(size) + column, gate, 0)

    parameters = (part.pointer, part.pointer, ptx.U32, ptx.U32)
    return Kernel(kernel, parameters, threads=THREADS)
