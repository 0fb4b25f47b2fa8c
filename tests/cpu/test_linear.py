"""refengine.cpu.linear: against float64, in odd shapes, and the same bits in any batch."""

import os
import subprocess
import sys

import ml_dtypes
import numba
import numpy as np
import pytest

from refengine.cpu.linear import (
    allocate_weights,
    embedding,
    linear,
    prepare_weight,
    store_vector,
    store_weight,
)
from refengine.cpu.words import word_dtype

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
# One output and one input, tails of vectors (16), of panels (48) and of pairs (2), blocks of more
# than 2048 steps, and a real model's.
SHAPES = [(1, 1), (16, 2), (17, 3), (47, 59), (48, 32), (100, 64), (129, 4099), (960, 576)]
TILE_EDGES = (1, 2, 3, 7, 8, 9, 16, 17, 63, 64, 65, 70)


def make(out_features, in_features, dtype, num_tokens, seed=0):
    """A weight, a bias and rows that are exact in ``dtype``."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((out_features, in_features)).astype(dtype)
    bias = rng.standard_normal(out_features).astype(np.float32)
    x = rng.standard_normal((num_tokens, in_features)).astype(dtype).astype(np.float32)
    return weight, bias, x


def multiply(x, weight, bias):
    out = np.full((x.shape[0], weight.out_features), np.nan, np.float32)
    linear(x, weight, bias, out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_linear_is_exact_up_to_the_sums_rounding(dtype, out_features, in_features):
    weight, bias, x = make(out_features, in_features, DTYPES[dtype], 70)
    packed = prepare_weight(weight)
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    sizes = np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T
    # Each of n additions rounds by at most half a last place of a partial sum, which is never
    # larger than the sum of sizes (Higham, Accuracy and Stability, section 4.2). The pair
    # instruction rounds twice a step and products once: three times covers them.
    for b in (None, bias):
        shift = 0.0 if b is None else b.astype(np.float64)
        bound = 3 * (in_features + 1) * 2.0**-24 * (sizes + np.abs(shift)) + 1e-30
        assert np.all(np.abs(multiply(x, packed, b) - (exact + shift)) <= bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_typical_error_grows_as_the_root_of_the_length(dtype):
    weight, _, x = make(64, 576, DTYPES[dtype], 64)
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    error = multiply(x, prepare_weight(weight), None) - exact
    sizes = np.sqrt((x.astype(np.float64) ** 2) @ (weight.astype(np.float64) ** 2).T)
    assert np.sqrt(np.mean((error / sizes) ** 2)) < 2.0**-24 * np.sqrt(576)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_a_row_gives_the_same_bits_in_any_batch(dtype, out_features, in_features):
    weight, bias, x = make(out_features, in_features, DTYPES[dtype], 200)
    packed = prepare_weight(weight)
    together = multiply(x, packed, bias)
    for count in TILE_EDGES:
        start = 200 - count
        assert np.array_equal(multiply(x[start:], packed, bias), together[start:])


def test_a_row_gives_the_same_bits_in_every_batch_size_up_to_70():
    weight, bias, x = make(80, 66, ml_dtypes.bfloat16, 70)
    packed = prepare_weight(weight)
    together = multiply(x, packed, bias)
    for count in range(1, 71):
        assert np.array_equal(multiply(x[:count], packed, bias), together[:count])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_nothing(dtype):
    weight, bias, x = make(200, 96, DTYPES[dtype], 130)
    packed = prepare_weight(weight)
    threads = numba.get_num_threads()
    results = []
    try:
        for count in {1, threads}:
            numba.set_num_threads(count)
            results += [multiply(x, packed, bias), multiply(x[:5], packed, bias)]
    finally:
        numba.set_num_threads(threads)
    assert all(np.array_equal(result, results[0][: len(result)]) for result in results)


def test_rows_are_rounded_to_bfloat16_nearest_even():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((5, 40)).astype(np.float32)
    x[0, :3] = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20]  # two ties, and just above one
    rounded = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    identity = prepare_weight(np.eye(40, dtype=ml_dtypes.bfloat16))
    assert np.array_equal(multiply(x, identity, None), rounded)


def test_nan_and_infinity_come_through():
    x = np.ones((3, 40), np.float32)
    x[0, 3], x[1, 4] = np.nan, np.inf
    for dtype in DTYPES.values():
        out = multiply(x, prepare_weight(np.ones((20, 40), dtype)), None)
        assert np.isnan(out[0]).all()
        assert (out[1] == np.inf).all()
        assert (out[2] == 40).all()


def test_rows_of_a_larger_array_need_not_be_copied_by_the_caller():
    weight, bias, x = make(32, 48, np.float32, 20)
    packed = prepare_weight(weight)
    assert np.array_equal(multiply(x[::2], packed, bias), multiply(x, packed, bias)[::2])


def test_nothing_is_written_outside_out():
    weight, bias, x = make(21, 5, np.float32, 9)
    memory = np.full((11, 21), np.nan, np.float32)
    linear(x, prepare_weight(weight), bias, memory[1:10])
    assert np.isnan(memory[[0, 10]]).all()
    assert not np.isnan(memory[1:10]).any()


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("given", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_packing_rounds_and_unpacks(stored, given):
    rng = np.random.default_rng(2)
    weights = allocate_weights(3, 37, 29, stored)
    matrices = [rng.standard_normal((37, 29)).astype(given) for _ in range(3)]
    for index, matrix in enumerate(matrices):
        store_weight(weights, index, matrix)
    for index, matrix in enumerate(matrices):
        wanted = matrix.astype(np.float32).astype(DTYPES[stored])
        assert weights[index].shape == (37, 29)
        assert weights[index].dtype == wanted.dtype
        assert np.array_equal(weights[index].unpack(), wanted)


def test_a_stacks_matrices_are_views_on_cache_lines():
    weights = allocate_weights(2, 20, 6, "bfloat16")
    assert len(weights) == 2
    assert np.shares_memory(weights[1].panels, weights.panels)
    assert weights[1].panels.ctypes.data % 64 == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_gathers_rows(dtype):
    weight, _, _ = make(100, 33, DTYPES[dtype], 1)
    token_ids = np.array([99, 0, 16, 99], np.int64)
    out = np.empty((4, 33), np.float32)
    embedding(token_ids, prepare_weight(weight), out)
    assert np.array_equal(out, weight[token_ids].astype(np.float32))


def test_store_vector_gives_float32():
    values = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    for given in (values, values.view(np.uint16), values.astype(np.float64)):
        stored = store_vector(given)
        assert stored.dtype == np.float32
        assert stored.tolist() == [1.5, -2.0]


def call_with(**changes):
    arguments = {
        "x": np.zeros((3, 8), np.float32),
        "weight": prepare_weight(np.zeros((16, 8), np.float32)),
        "bias": np.zeros(16, np.float32),
        "out": np.zeros((3, 16), np.float32),
    }
    linear(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x": np.zeros((3, 9), np.float32)}, r"x must have shape .*8.*got \[3, 9\]"),
        ({"x": np.zeros((3, 8))}, "x must be float32, got float64"),
        ({"out": np.zeros((2, 16), np.float32)}, r"out must have shape \[3, 16\].*got \[2, 16\]"),
        ({"out": np.zeros((3, 32), np.float32)[:, ::2]}, "out must be contiguous"),
        ({"bias": np.zeros(15, np.float32)}, r"bias must have shape \[16\].*got \[15\]"),
    ],
)
def test_linear_says_what_does_not_fit(changes, said):
    with pytest.raises(ValueError, match=said):
        call_with(**changes)


def test_storing_says_what_does_not_fit():
    with pytest.raises(ValueError, match="float32 or bfloat16, got 'float16'"):
        allocate_weights(1, 4, 4, "float16")
    with pytest.raises(ValueError, match="at least 1, got 1, 0 and 4"):
        allocate_weights(1, 0, 4, "float32")
    weights = allocate_weights(1, 4, 4, "float32")
    with pytest.raises(ValueError, match=r"weight must have shape \[4, 4\].*got \[4, 5\]"):
        store_weight(weights, 0, np.zeros((4, 5), np.float32))
    with pytest.raises(ValueError, match="floating-point array, got int64"):
        store_weight(weights, 0, np.zeros((4, 4), np.int64))
    with pytest.raises(ValueError, match=r"token_ids\[1\] must be 0 to 3.*got 4"):
        embedding(np.array([0, 4]), weights[0], np.zeros((2, 4), np.float32))


def test_generic_words_where_asked_for(monkeypatch):
    monkeypatch.setenv("REFENGINE_CPU_ISA", "generic")
    assert word_dtype(np.uint16) == np.float32
    assert word_dtype(np.float32) == np.float32


# The same products again, by the code for machines without the pair instruction and for narrow
# ones: other widths of tiles, and words that are two float32.
_NARROW = """
import numpy as np, ml_dtypes
from refengine.cpu import tile_kernels
assert (tile_kernels.TILE_ROWS, tile_kernels.PANEL) == (4, 16)
from refengine.cpu.linear import linear, prepare_weight
rng = np.random.default_rng(0)
for dtype in (np.float32, ml_dtypes.bfloat16):
    for shape in ((17, 3), (100, 59), (129, 4099)):
        weight = rng.standard_normal(shape).astype(dtype)
        x = rng.standard_normal((70, shape[1])).astype(dtype).astype(np.float32)
        packed, out = prepare_weight(weight), np.empty((70, shape[0]), np.float32)
        linear(x, packed, None, out)
        exact = x.astype(np.float64) @ weight.astype(np.float64).T
        sizes = np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T
        assert np.all(np.abs(out - exact) <= 2.0**-24 * shape[1] * sizes)
        for count in (1, 3, 4, 5, 66):
            alone = np.empty((count, shape[0]), np.float32)
            linear(x[:count], packed, None, alone)
            assert np.array_equal(alone, out[:count])
"""


@pytest.mark.parametrize("features", ["+avx2,+fma", ""])
def test_narrow_machines(features, tmp_path):
    if numba.core.registry.cpu_target.target_context.codegen().magic_tuple()[0][:6] != "x86_64":
        pytest.skip("features of x86-64")
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "x86-64",
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    subprocess.run([sys.executable, "-c", _NARROW], env=environment, check=True, timeout=300)


_COUNT_COMPILATIONS = """
import numpy as np, ml_dtypes
from numba.core import event
from refengine.cpu.linear import linear, prepare_weight
with event.install_recorder("numba:compile") as compilations:
    weight = prepare_weight(np.ones((20, 6), ml_dtypes.bfloat16))
    linear(np.ones((2, 6), np.float32), weight, None, np.empty((2, 20), np.float32))
print(len(compilations.buffer))
"""


def test_another_process_compiles_nothing_anew(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    counts = [
        int(
            subprocess.run(
                [sys.executable, "-c", _COUNT_COMPILATIONS],
                env=environment,
                check=True,
                timeout=300,
                capture_output=True,
            ).stdout
        )
        for _ in range(2)
    ]
    assert counts[0] > 0
    assert counts[1] == 0
