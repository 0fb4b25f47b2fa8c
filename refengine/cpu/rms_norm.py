"""RMS norm of rows, and the residual addition before it; twin of reference/rms_norm.py."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from refengine.cpu.arrays import SERIAL_ELEMENTS, Array, bits
from refengine.cpu.jit import inner, parallel
from refengine.cpu.rows import as_rows, row_start
from refengine.cpu.simd import LANES, fma, splat, sum_lanes
from refengine.cpu.simd_memory import flat, load, load_first, store, store_first
from refengine.reference.validation import check_fused_add_rms_norm, check_rms_norm

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


def rms_norm(x: Array, weight: Array, eps: float, out: Array) -> None:
    """Normalise the last axis; see ``refengine.reference.rms_norm.rms_norm``.

    Args:
        x: ``[..., width]`` float32, one to three axes, contiguous along the last.
        weight: ``[width]`` float32 or bfloat16.
        eps: added to the mean of squares.
        out: like x; may be x.

    Raises:
        ValueError: where shapes, dtypes or strides do not fit.
    """
    check_rms_norm(x, weight, out)
    x_rows, out_rows, weight = as_rows("x", x), as_rows("out", out), bits(weight)
    loop = _norm_rows if x.size < SERIAL_ELEMENTS else _norm_rows_parallel
    loop(x_rows, weight, np.float32(eps), out_rows)


def fused_add_rms_norm(x: Array, residual: Array, weight: Array, eps: float, out: Array) -> None:
    """``residual += x``, then ``out = rms_norm(residual)``.

    Args:
        x: ``[..., width]`` float32, one to three axes, contiguous along the last.
        residual: like x; receives the sum.
        weight: ``[width]`` float32 or bfloat16.
        eps: added to the mean of squares.
        out: like x; may be x or residual.

    Raises:
        ValueError: where shapes, dtypes or strides do not fit.
    """
    check_fused_add_rms_norm(x, residual, weight, out)
    rows = as_rows("x", x), as_rows("residual", residual)
    loop = _add_norm_rows if x.size < SERIAL_ELEMENTS else _add_norm_rows_parallel
    loop(*rows, bits(weight), np.float32(eps), as_rows("out", out))


@inner
def rms_norm_row(
    x: Any, x_start: int, weight: Any, size: int, eps: Any, out: Any, out_start: int
) -> None:
    """``out = x / sqrt(mean(x ** 2) + eps) * weight`` for one row; arrays are flat.

    Args:
        x: float32; the row is ``x[x_start : x_start + size]``.
        x_start: element offset.
        weight: ``[size]`` float32, or bfloat16 as uint16.
        size: length of the row.
        eps: float32.
        out: float32, may be x.
        out_start: element offset.
    """
    whole, rest = size - size % LANES, size % LANES
    squares = splat(_ZERO)
    for i in range(0, whole, LANES):
        v = load(x, x_start + i)
        squares = fma(v, v, squares)
    if rest:
        v = load_first(x, x_start + whole, rest)
        squares = fma(v, v, squares)
    scale = splat(_ONE / np.sqrt(sum_lanes(squares) / np.float32(size) + eps))
    for i in range(0, whole, LANES):
        store(out, out_start + i, load(x, x_start + i) * scale * load(weight, i))
    if rest:
        v = load_first(x, x_start + whole, rest) * scale * load_first(weight, whole, rest)
        store_first(out, out_start + whole, v, rest)


@inner
def fused_add_rms_norm_row(
    x: Any, x_start: int, residual: Any, residual_start: int, weight: Any, size: int, eps: Any,
    out: Any, out_start: int,
) -> None:  # fmt: skip
    """``residual += x``, then ``rms_norm_row`` of it; arguments as there."""
    whole, rest = size - size % LANES, size % LANES
    for i in range(0, whole, LANES):
        at = residual_start + i
        store(residual, at, load(residual, at) + load(x, x_start + i))
    if rest:
        at = residual_start + whole
        v = load_first(residual, at, rest) + load_first(x, x_start + whole, rest)
        store_first(residual, at, v, rest)
    rms_norm_row(residual, residual_start, weight, size, eps, out, out_start)


@inner
def _norm_rows(x: Any, weight: Any, eps: Any, out: Any) -> None:
    for i in range(x.shape[0]):
        _norm_inner(x, i, weight, eps, out)


@parallel
def _norm_rows_parallel(x: Any, weight: Any, eps: Any, out: Any) -> None:
    for i in numba.prange(x.shape[0]):
        _norm_inner(x, i, weight, eps, out)


@inner
def _norm_inner(x: Any, i: int, weight: Any, eps: Any, out: Any) -> None:
    for j in range(x.shape[1]):
        rms_norm_row(
            flat(x), row_start(x, i, j), flat(weight), x.shape[2], eps,
            flat(out), row_start(out, i, j),
        )  # fmt: skip


@inner
def _add_norm_rows(x: Any, residual: Any, weight: Any, eps: Any, out: Any) -> None:
    for i in range(x.shape[0]):
        _add_norm_inner(x, residual, i, weight, eps, out)


@parallel
def _add_norm_rows_parallel(x: Any, residual: Any, weight: Any, eps: Any, out: Any) -> None:
    for i in numba.prange(x.shape[0]):
        _add_norm_inner(x, residual, i, weight, eps, out)


@inner
def _add_norm_inner(x: Any, residual: Any, i: int, weight: Any, eps: Any, out: Any) -> None:
    for j in range(x.shape[1]):
        fused_add_rms_norm_row(
            flat(x), row_start(x, i, j), flat(residual), row_start(residual, i, j),
            flat(weight), x.shape[2], eps, flat(out), row_start(out, i, j),
        )  # fmt: skip
