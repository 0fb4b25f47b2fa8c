"""Where activations and caches lie."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from refengine import cpu, reference


@pytest.mark.parametrize("kernels", [reference, cpu], ids=["reference", "cpu"])
def test_allocate_cache(kernels):
    kinds = {"float32": [np.float32], "bfloat16": [np.uint16, ml_dtypes.bfloat16]}
    for name, dtypes in kinds.items():
        for cache in kernels.allocate_cache(2, 5, 16, 3, 40, name):
            assert cache.shape == (2, 5, 16, 3, 40)
            assert cache.dtype in dtypes
            assert cache.flags.c_contiguous
            assert cache.flags.writeable
            assert not cache.view(np.uint8).any()


@pytest.mark.parametrize("kernels", [reference, cpu], ids=["reference", "cpu"])
def test_an_unknown_dtype_is_refused(kernels):
    with pytest.raises(ValueError, match=r"dtype must be one of float32, .* got 'float8'"):
        kernels.allocate_cache(1, 1, 1, 1, 1, "float8")


@pytest.mark.parametrize("kernels", [reference, cpu], ids=["reference", "cpu"])
def test_empty(kernels):
    out = kernels.empty((3, 7))
    assert out.shape == (3, 7)
    assert out.dtype == np.float32


def test_cpu_arrays_begin_on_a_cache_line():
    for size in (1, 7, 1000, 300_000):
        arrays = [cpu.empty((size,)), *cpu.allocate_cache(1, size, 1, 1, 3, "bfloat16")]
        assert [array.ctypes.data % 64 for array in arrays] == [0, 0, 0]
