"""The error budget: an error as a multiple of what the same mathematics costs in that precision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refengine.conformance.precision import Array, Float64, bits, wide
from refengine.conformance.problem import Expected

# A kernel passes up to this multiple of the dense computation's error. Another order of summation,
# another exp or a fused multiply-add moves an error by less than a factor of two (docs).
LIMIT = 4.0
# The dense computation may be lucky, on a single element above all; it counts for at least this
# share of the first-order bound.
LEAST_SHARE = 0.5
# What a ratio is cut to, and what NaN, infinity and wrong bits count as: JSON has no infinity.
CEILING = 1e9


def scale_unit(first_order: Float64, dense: Array, exact: Float64) -> Float64:
    """One unit of error: the dense computation's worst error, spread by the first-order bound."""
    shares = np.abs(wide(dense) - exact) / first_order
    finite = shares[np.isfinite(shares)]
    unit: Float64 = first_order * max(float(finite.max(initial=0.0)), LEAST_SHARE)
    return unit


@dataclass(frozen=True)
class Comparison:
    """How an output compares with what was expected."""

    ratio: float
    index: tuple[int, ...] | None = None
    num_nan: int = 0
    num_inf: int = 0
    num_wrong: int = 0
    size: int = 0

    @property
    def passed(self) -> bool:
        """Whether every element is within the limit."""
        return self.ratio <= LIMIT


def compare(got: Array, expected: Expected) -> Comparison:
    """Find the worst element of an output; shapes are equal."""
    if got.size == 0:
        return Comparison(0.0)
    ratios = error_ratios(got, expected)
    if expected.free is not None:
        ratios = np.where(expected.free, 0.0, ratios)
    index = np.unravel_index(int(np.argmax(ratios)), ratios.shape)
    wrong = ratios > LIMIT
    floats = got.dtype.kind not in "iub"
    nan = int((np.isnan(wide(got)) & wrong).sum()) if floats else 0
    inf = int((np.isinf(wide(got)) & wrong).sum()) if floats else 0
    worst = tuple(int(i) for i in index)
    return Comparison(float(ratios[index]), worst, nan, inf, int(wrong.sum()), got.size)


def error_ratios(got: Array, expected: Expected) -> Float64:
    """Errors in units of the budget, element by element."""
    exact, unit = expected.exact, expected.unit
    if unit is None:
        same = bits(got) == bits(exact) if got.dtype == exact.dtype else wide(got) == wide(exact)
        return np.where(same, 0.0, CEILING)
    with np.errstate(all="ignore"):
        ratios = np.abs(wide(got) - exact) / unit
    both_infinite = np.isinf(exact) & (wide(got) == exact)
    ratios = np.where(both_infinite, 0.0, ratios)
    return np.where(np.isfinite(ratios), np.minimum(ratios, CEILING), CEILING)
