"""Gated activations and the soft cap; twin of reference/activation.py."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from refengine.cpu.arrays import SERIAL_ELEMENTS, Array
from refengine.cpu.jit import inner, parallel
from refengine.cpu.rows import as_rows, row_start
from refengine.cpu.simd import LANES, fma, splat
from refengine.cpu.simd_math import exp, tanh
from refengine.cpu.simd_memory import flat, load_first, store_first
from refengine.reference.validation import check_gated, check_soft_cap

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
# gelu's tanh form is x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x**3)).
_GELU_LINEAR = np.float32(2.0 * np.sqrt(2.0 / np.pi))
_GELU_CUBIC = np.float32(2.0 * np.sqrt(2.0 / np.pi) * 0.044715)


def silu_and_mul(x: Array, out: Array) -> None:
    """``out = silu(x[:, :d]) * x[:, d:]``, ``silu(a) = a / (1 + exp(-a))``.

    Args:
        x: ``[num_tokens, 2 * d]`` float32, contiguous along the last axis.
        out: ``[num_tokens, d]`` float32, likewise.

    Raises:
        ValueError: where shapes, dtypes or strides do not fit.
    """
    _gated(x, out, False)


def gelu_tanh_and_mul(x: Array, out: Array) -> None:
    """``out = gelu_tanh(x[:, :d]) * x[:, d:]``; arguments as for ``silu_and_mul``."""
    _gated(x, out, True)


def soft_cap(x: Array, cap: float) -> None:
    """``x = cap * tanh(x / cap)``, in place.

    Args:
        x: one to three axes of float32, contiguous along the last.
        cap: positive.

    Raises:
        ValueError: where the dtype, the strides or the cap do not fit.
    """
    check_soft_cap(x, cap)
    rows = as_rows("x", x)
    loop = _cap_rows if x.size < SERIAL_ELEMENTS else _cap_rows_parallel
    loop(rows, np.float32(cap))


def _gated(x: Array, out: Array, gelu: bool) -> None:
    check_gated(x, out)
    x_rows, out_rows = as_rows("x", x), as_rows("out", out)
    loop = _gated_rows if x.size < SERIAL_ELEMENTS else _gated_rows_parallel
    loop(x_rows, out_rows, gelu)


@inner
def silu_and_mul_row(x: Any, x_start: int, size: int, out: Any, out_start: int) -> None:
    """One row: gate ``x[x_start : + size]``, what it gates in the ``size`` elements after that.

    Args:
        x: flat float32.
        x_start: element offset.
        size: elements of the result.
        out: flat float32.
        out_start: element offset.
    """
    for i in range(0, size, LANES):
        rest = min(LANES, size - i)
        gate = load_first(x, x_start + i, rest)
        up = load_first(x, x_start + size + i, rest)
        v = gate / (splat(_ONE) + exp(splat(_ZERO) - gate)) * up
        store_first(out, out_start + i, v, rest)


@inner
def gelu_tanh_and_mul_row(x: Any, x_start: int, size: int, out: Any, out_start: int) -> None:
    """One row, as ``silu_and_mul_row``."""
    for i in range(0, size, LANES):
        rest = min(LANES, size - i)
        gate = load_first(x, x_start + i, rest)
        up = load_first(x, x_start + size + i, rest)
        u = gate * fma(gate * gate, splat(_GELU_CUBIC), splat(_GELU_LINEAR))
        v = gate / (splat(_ONE) + exp(splat(_ZERO) - u)) * up
        store_first(out, out_start + i, v, rest)


@inner
def _gated_row(x: Any, t: int, out: Any, gelu: bool) -> None:
    size = out.shape[2]
    if gelu:
        gelu_tanh_and_mul_row(flat(x), row_start(x, t, 0), size, flat(out), row_start(out, t, 0))
    else:
        silu_and_mul_row(flat(x), row_start(x, t, 0), size, flat(out), row_start(out, t, 0))


@inner
def _gated_rows(x: Any, out: Any, gelu: bool) -> None:
    for t in range(x.shape[0]):
        _gated_row(x, t, out, gelu)


@parallel
def _gated_rows_parallel(x: Any, out: Any, gelu: bool) -> None:
    for t in numba.prange(x.shape[0]):
        _gated_row(x, t, out, gelu)


@inner
def soft_cap_row(x: Any, start: int, size: int, cap: Any) -> None:
    """``size`` elements from ``start`` on, in place; ``cap`` is float32."""
    limit = splat(cap)
    for i in range(0, size, LANES):
        rest = min(LANES, size - i)
        store_first(x, start + i, limit * tanh(load_first(x, start + i, rest) / limit), rest)


@inner
def _cap_rows(x: Any, cap: Any) -> None:
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            soft_cap_row(flat(x), row_start(x, i, j), x.shape[2], cap)


@parallel
def _cap_rows_parallel(x: Any, cap: Any) -> None:
    for i in numba.prange(x.shape[0]):
        for j in range(x.shape[1]):
            soft_cap_row(flat(x), row_start(x, i, j), x.shape[2], cap)
