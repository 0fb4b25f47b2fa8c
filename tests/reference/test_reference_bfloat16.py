"""bfloat16 by bits, against ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from refengine.reference.bfloat16 import is_bfloat16, narrow, storage_dtype, widen


def test_widening_every_bfloat16():
    every = np.arange(2**16, dtype=np.uint16)
    expected = every.view(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(widen(every), expected, equal_nan=True)
    assert np.array_equal(widen(every.view(ml_dtypes.bfloat16)), expected, equal_nan=True)


def test_rounding_a_spread_of_float32_and_every_tie():
    spread = np.arange(0, 2**32, 65521, dtype=np.uint64).astype(np.uint32)
    ties = (np.arange(2**16, dtype=np.uint64) << 16 | 0x8000).astype(np.uint32)
    for patterns in (spread, ties, ties + 1, ties - 1):
        values = patterns.view(np.float32)
        with np.errstate(all="ignore"):
            expected = values.astype(ml_dtypes.bfloat16).view(np.uint16)
        assert np.array_equal(narrow(values, np.uint16), expected)
        assert np.array_equal(narrow(values, ml_dtypes.bfloat16).view(np.uint16), expected)


def test_other_dtypes():
    x = np.array([1.0, 1e6, -3.3], np.float32)
    assert np.array_equal(narrow(x, np.float32), x)
    with np.errstate(over="ignore"):
        low = x.astype(np.float16)
    assert np.array_equal(widen(narrow(x, np.float16)), low.astype(np.float32))
    assert narrow(x, np.float16)[1] == np.inf
    assert is_bfloat16(ml_dtypes.bfloat16)
    assert not is_bfloat16(np.float16)


def test_strided_arrays():
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    expected = x.astype(ml_dtypes.bfloat16)
    assert np.array_equal(narrow(x.T, ml_dtypes.bfloat16), expected.T)
    assert np.array_equal(widen(expected[:, 1:4]), expected[:, 1:4].astype(np.float32))


def test_storage_dtype():
    names = ["float32", "float16", "bfloat16"]
    assert [storage_dtype(name) for name in names] == [np.float32, np.float16, np.uint16]
    with pytest.raises(ValueError, match="float32, float16, bfloat16, got 'int8'"):
        storage_dtype("int8")
