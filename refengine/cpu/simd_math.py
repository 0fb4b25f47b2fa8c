"""exp and tanh on sixteen lanes (simd.py).

LLVM vectorises calls of ``exp`` only with a vendor's library; a short polynomial does as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refengine.cpu.jit import inner
from refengine.cpu.simd import fma, keep_sign, power_of_two, round_even, select_less, splat

_F = np.float32

# x = n ln 2 + r with n the nearest whole number and |r| <= ln 2 / 2, so exp(x) = 2**n exp(r).
# ln 2 is subtracted in two parts, the first with so few bits that n times it is exact (Cody and
# Waite 1980, "Software manual for the elementary functions").
_LOG2_E = _F(1.4426950408889634)
_LN2_HIGH = _F(-0.693359375)
_LN2_LOW = _F(2.12194440054690583e-4)
_SMALLEST, _LARGEST = _F(-87.0), _F(88.0)  # between them 2**n is a normal number
# (exp(r) - 1 - r) / r**2 on that interval, highest power first: our fit, equal ripples of 3e-9
# relative to exp(r).
_C4, _C3, _C2, _C1, _C0 = (
    _F(1.381459879e-03),
    _F(8.368716575e-03),
    _F(4.166838899e-02),
    _F(1.666652113e-01),
    _F(4.999999404e-01),
)
_ZERO, _ONE, _TWO, _INFINITY = _F(0.0), _F(1.0), _F(2.0), _F(np.inf)
_TANH_IS_ONE = _F(10.0)


@inner
def _expm1_of_remainder(x: Any, n: Any) -> Any:
    """``exp(x - n ln 2) - 1``."""
    r = fma(n, splat(_LN2_HIGH), x)
    r = fma(n, splat(_LN2_LOW), r)
    p = fma(splat(_C4), r, splat(_C3))
    p = fma(p, r, splat(_C2))
    p = fma(p, r, splat(_C1))
    p = fma(p, r, splat(_C0))
    return fma(p, r * r, r)


@inner
def exp(x: Any) -> Any:
    """The exponential: 0 below -87, infinity above 88, exactly 1 at 0."""
    smallest, largest = splat(_SMALLEST), splat(_LARGEST)
    clamped = select_less(x, smallest, smallest, x)
    clamped = select_less(largest, clamped, largest, clamped)
    n = round_even(clamped * splat(_LOG2_E))
    y = (_expm1_of_remainder(clamped, n) + splat(_ONE)) * power_of_two(n)
    y = select_less(x, smallest, splat(_ZERO), y)
    return select_less(largest, x, splat(_INFINITY), y)


@inner
def tanh(x: Any) -> Any:
    """From ``e = exp(2 |x|) - 1``, computed without subtracting, as ``e / (e + 2)``."""
    size = keep_sign(x, splat(_ONE)) * x  # |x|
    size = select_less(splat(_TANH_IS_ONE), size, splat(_TANH_IS_ONE), size)
    twice = size + size
    n = round_even(twice * splat(_LOG2_E))
    scale = power_of_two(n)
    expm1 = fma(_expm1_of_remainder(twice, n), scale, scale - splat(_ONE))
    return keep_sign(x, expm1 / (expm1 + splat(_TWO)))
