"""The simulator's promises: warps meet, stuck threads are named, copies land when waited for."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_arrays import SIMULATED
from numba import cuda

from refengine.cuda import ptx
from refengine.cuda.launch import Kernel
from refengine.cuda.ptx import F32, U32, U64

pytestmark = pytest.mark.skipif(not SIMULATED, reason="tests the emulation")


def launch(function: object, threads: int, *arrays: np.ndarray, shared: int = 0) -> None:
    kernel = Kernel(function, (), threads=threads, shared_bytes=shared)  # type: ignore[arg-type]
    kernel((1, 1, 1), *arrays)


def test_a_warp_exchanges_values() -> None:
    def kernel(x, y):  # type: ignore[no-untyped-def]
        thread = U32(cuda.threadIdx.x)
        value = x[thread]
        for i in range(5):
            value += ptx.shuffle_xor(value, U32(1 << i))
        y[thread] = value

    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    y = np.zeros_like(x)
    launch(kernel, 64, x, y)
    want = np.repeat(x.reshape(2, 32).sum(1), 32)
    assert np.allclose(y, want, atol=1e-5)


def test_a_product_of_fragments_is_a_product_of_matrices() -> None:
    def kernel(a, b, out):  # type: ignore[no-untyped-def]
        lane = U32(cuda.threadIdx.x)
        g, t = lane >> U32(2), lane & U32(3)
        sums = cuda.local.array(4, F32)
        for i in range(4):
            sums[i] = F32(0.0)
        a0, a1 = ptx.load4(a, g * U32(16) + t * U32(2)), ptx.load4(a, (g + 8) * 16 + t * 2)
        a2, a3 = ptx.load4(a, g * 16 + t * 2 + 8), ptx.load4(a, (g + 8) * 16 + t * 2 + 8)
        b0, b1 = ptx.load4(b, g * 16 + t * 2), ptx.load4(b, g * 16 + t * 2 + 8)
        ptx.mma_f16(sums, 0, a0, a1, a2, a3, b0, b1)
        for i in range(4):
            out[(g + 8 * (i // 2)) * 8 + t * 2 + i % 2] = sums[i]

    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s).astype(np.float16) for s in ((16, 16), (8, 16)))
    out = np.zeros((16, 8), np.float32)
    launch(kernel, 32, a.reshape(-1), b.reshape(-1), out.reshape(-1))
    assert np.allclose(out, a.astype(np.float32) @ b.T.astype(np.float32), atol=1e-5)


def test_threads_that_never_meet_are_reported() -> None:
    def kernel(x):  # type: ignore[no-untyped-def]
        if U32(cuda.threadIdx.x) < U32(31):
            ptx.sync_warp()

    with pytest.raises(RuntimeError, match=r"is stuck: threads .* at sync_warp of warp 0"):
        launch(kernel, 32, np.zeros(1))


def test_a_copy_lands_only_when_it_is_waited_for() -> None:
    def kernel(x, y):  # type: ignore[no-untyped-def]
        memory = cuda.shared.array(0, F32)
        ptx.copy16_async(ptx.shared_address(memory), x, U64(0), U32(16))
        ptx.copy_commit()
        y[0] = memory[0]
        ptx.copy_wait_all()
        y[1] = memory[0]

    x, y = np.array([7, 0, 0, 0], np.float32), np.zeros(2, np.float32)
    launch(kernel, 1, x, y, shared=16)
    assert np.isnan(y[0])
    assert y[1] == 7


def test_reads_beyond_an_array_are_errors() -> None:
    def kernel(x):  # type: ignore[no-untyped-def]
        ptx.load16(x, U64(4))

    with pytest.raises(IndexError, match=r"elements 4\.\.7 of 4"):
        launch(kernel, 1, np.zeros(4, np.float32))


def test_shared_memory_starts_as_nan() -> None:
    def kernel(y):  # type: ignore[no-untyped-def]
        memory = cuda.shared.array(4, F32)
        y[0] = memory[0]

    y = np.zeros(1, np.float32)
    launch(kernel, 1, y)
    assert np.isnan(y[0])
