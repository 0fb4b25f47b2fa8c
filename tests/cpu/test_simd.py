"""Sixteen-lane values: arithmetic, memory, exp and tanh."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numba
import numpy as np
import pytest

from refengine.cpu.simd import (
    first_lane,
    fma,
    keep_lanes,
    max_lanes,
    maximum,
    select_less,
    splat,
    sum_lanes,
)
from refengine.cpu.simd_math import exp, tanh
from refengine.cpu.simd_memory import fetch_add, flat, load, load_first, store, store_first


@numba.njit
def apply_exp(x: Any, out: Any) -> None:
    for i in range(0, x.size, 16):
        store(out, i, exp(load(x, i)))


@numba.njit
def apply_tanh(x: Any, out: Any) -> None:
    for i in range(0, x.size, 16):
        store(out, i, tanh(load(x, i)))


@numba.njit
def arithmetic(a: Any, b: Any, c: Any, out: Any) -> None:
    x, y, z = load(a, 0), load(b, 0), load(c, 0)
    store(out, 0, x + y)
    store(out, 16, x - y)
    store(out, 32, x * y)
    store(out, 48, x / y)
    store(out, 64, fma(x, y, z))
    store(out, 80, maximum(x, y))
    store(out, 96, select_less(x, y, z, splat(np.float32(9.0))))
    out[112], out[113], out[114] = sum_lanes(x), max_lanes(x), first_lane(x)


@numba.njit
def masked(x: Any, low: int, high: int, out: Any) -> None:
    store(out, 0, keep_lanes(load(x, 0), low, high, splat(np.float32(-1.0))))


@numba.njit
def copy_first(source: Any, at: int, count: int, out: Any, to: int) -> None:
    store_first(out, to, load_first(source, at, count), count)


@numba.njit
def copy_whole(source: Any, out: Any) -> None:
    for i in range(0, source.size, 16):
        store(out, i, load(source, i))


@numba.njit
def add_up(x: Any) -> Any:
    view = flat(x)
    total = splat(np.float32(0.0))
    for i in range(0, x.size, 16):
        total = total + load(view, i)
    return sum_lanes(total)


@numba.njit(parallel=True)
def count_together(counter: Any, times: int) -> None:
    for _ in numba.prange(times):
        fetch_add(counter, 0, 1)


def padded(values):
    out = np.zeros(-(-len(values) // 16) * 16, np.float32)
    out[: len(values)] = values
    return out


def test_arithmetic_is_ieee_lane_by_lane():
    random = np.random.default_rng(0)
    a, b, c = random.standard_normal((3, 16)).astype(np.float32)
    out = np.zeros(115, np.float32)
    arithmetic(a, b, c, out)
    expected = [a + b, a - b, a * b, a / b]
    assert np.array_equal(out[:64], np.concatenate(expected))
    assert np.allclose(out[64:80], a.astype(float) * b + c, rtol=1e-6, atol=1e-7)
    assert np.array_equal(out[80:96], np.maximum(a, b))
    assert np.array_equal(out[96:112], np.where(a < b, c, 9))
    pairs = a
    while pairs.size > 1:  # the documented tree: lane i meets i + half
        pairs = pairs[: pairs.size // 2] + pairs[pairs.size // 2 :]
    assert out[112] == pairs[0]
    assert out[113] == a.max()
    assert out[114] == a[0]


@pytest.mark.parametrize(("low", "high"), [(0, 16), (3, 5), (-20, 4), (12, 90), (7, 7), (20, 30)])
def test_keep_lanes(low, high):
    x, out = np.arange(16, dtype=np.float32), np.empty(16, np.float32)
    masked(x, low, high, out)
    lanes = np.arange(16)
    assert np.array_equal(out, np.where((lanes >= low) & (lanes < high), x, -1))


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
@pytest.mark.parametrize("count", [1, 7, 15, 16])
def test_first_lanes_touch_nothing_else(dtype, count):
    source = np.arange(1, 33, dtype=np.float32)
    out = np.full(48, 7, dtype)
    copy_first(source, 5, count, out, 9)
    expected = np.full(48, 7, dtype)
    wanted = source[5 : 5 + count]
    if dtype == np.uint16:
        wanted = wanted.astype(ml_dtypes.bfloat16).view(np.uint16)
    expected[9 : 9 + count] = wanted
    assert np.array_equal(out, expected)


def test_bfloat16_is_rounded_as_ml_dtypes_does():
    """A spread of all float32 patterns, every tie, and NaN of both signs."""
    patterns = np.arange(0, 2**32, 65521, dtype=np.uint64).astype(np.uint32)
    ties = (np.arange(0, 2**16, 3, dtype=np.uint64) << 16 | 0x8000).astype(np.uint32)
    special = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F7FFFFF], np.uint32)
    values = np.concatenate([patterns, ties, special]).view(np.float32)
    values = padded(values)
    out = np.empty(values.size, np.uint16)
    copy_whole(values, out)
    with np.errstate(all="ignore"):
        assert np.array_equal(out, values.astype(ml_dtypes.bfloat16).view(np.uint16))
    back = np.empty(values.size, np.float32)
    copy_whole(out, back)
    assert np.array_equal(back.view(np.uint32), out.astype(np.uint32) << 16)


def test_float32_is_copied_bit_by_bit():
    values = np.arange(0, 2**32, 2**22 + 1, dtype=np.uint64).astype(np.uint32)
    values = padded(values).view(np.float32)
    out = np.empty_like(values)
    copy_whole(values, out)
    assert np.array_equal(out.view(np.uint32), values.view(np.uint32))


def test_flat_begins_at_a_views_first_element():
    x = np.arange(200, dtype=np.float32).reshape(10, 20)
    assert add_up(x[2:, :16][:1]) == x[2, :16].sum()


def test_exp_is_accurate_and_exact_at_its_ends():
    x = padded(np.concatenate([np.linspace(-87, 88, 200_001), np.linspace(-1, 1, 50_001)]))
    out = np.empty_like(x)
    apply_exp(x, out)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(out - exact) / exact).max() < 1.5e-7
    ends = padded([0.0, -0.0, -np.inf, np.inf, -87.1, -1e30, 88.1, 1e30, np.nan])
    apply_exp(ends, out := np.empty_like(ends))
    assert np.array_equal(out[:8], [1, 1, 0, np.inf, 0, 0, np.inf, np.inf])
    assert np.isnan(out[8])


def test_tanh_is_accurate_for_small_and_large():
    small = np.float32(10.0) ** np.linspace(-30, 0, 3001, dtype=np.float32)
    x = padded(np.concatenate([np.linspace(-12, 12, 200_001), small, -small]))
    out = np.empty_like(x)
    apply_tanh(x, out)
    exact = np.tanh(x.astype(np.float64))
    error = np.abs(out - exact) / np.maximum(np.abs(exact), 1e-37)
    assert error.max() < 4e-7
    ends = padded([0.0, np.inf, -np.inf, 1e30, -1e30, np.nan])
    apply_tanh(ends, out := np.empty_like(ends))
    assert np.array_equal(out[:5], [0, 1, -1, 1, -1])
    assert np.isnan(out[5])


def test_fetch_add_counts_every_thread():
    counter = np.zeros(1, np.int64)
    count_together(counter, 10_000)
    assert counter[0] == 10_000
