"""Products, weights and embeddings of the reference."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from refengine import reference

LOW = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stored(weight, dtype):
    weights = reference.allocate_weights(2, *weight.shape, dtype)
    reference.store_weight(weights, 1, weight)
    return weights[1]


@pytest.mark.parametrize("bias", [None, normal(7, seed=3)], ids=["plain", "bias"])
def test_float32(bias):
    x, weight, out = normal(5, 11), normal(7, 11, seed=1), np.empty((5, 7), np.float32)
    reference.linear(x, stored(weight, "float32"), bias, out)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64) + (0 if bias is None else bias)
    assert np.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_rounds_both_sides_and_sums_in_float32(dtype):
    x, weight, out = normal(5, 400), normal(7, 400, seed=1), np.empty((5, 7), np.float32)
    reference.linear(x, stored(weight, dtype), None, out)
    low = LOW[dtype]
    expected = x.astype(low).astype(np.float64) @ weight.astype(low).astype(np.float64).T
    assert np.allclose(out, expected, rtol=1e-5, atol=1e-4)
    assert not np.allclose(out, x.astype(np.float64) @ weight.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", *LOW])
def test_stored_weights_are_what_was_given(source, dtype):
    weight = normal(4, 6).astype(source)
    expected = weight.astype(np.float32).astype(LOW.get(dtype, np.float32))
    got = stored(weight, dtype)
    got = got.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else got
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("dtype", ["float32", *LOW])
def test_embedding(dtype):
    weight = normal(9, 5)
    out = np.empty((4, 5), np.float32)
    reference.embedding(np.array([8, 0, 3, 8]), stored(weight, dtype), out)
    expected = weight.astype(LOW.get(dtype, np.float32)).astype(np.float32)
    assert np.array_equal(out, expected[[8, 0, 3, 8]])


def test_store_vector_is_a_float32_copy():
    vector = normal(6).astype(ml_dtypes.bfloat16)
    kept = reference.store_vector(vector)
    assert kept.dtype == np.float32
    plain = normal(6)
    copy = reference.store_vector(plain)
    plain[:] = 0
    assert copy.all()


def zeros(*shape):
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("x", "bias", "out", "message"),
    [
        (zeros(5, 10), None, zeros(5, 7), r"x must have shape \[num_tokens, 11\].*got \[5, 10\]"),
        (zeros(5, 11), None, zeros(5, 8), r"out must have shape \[5, 7\] .*got \[5, 8\]"),
        (zeros(5, 11), zeros(8), zeros(5, 7), r"bias must have shape \[7\] .*got \[8\]"),
    ],
)
def test_products_that_do_not_fit_are_refused(x, bias, out, message):
    with pytest.raises(ValueError, match=message):
        reference.linear(x, zeros(7, 11), bias, out)


@pytest.mark.parametrize("token_id", [-1, 9])
def test_token_ids_without_a_row_are_refused(token_id):
    with pytest.raises(ValueError, match=rf"token_ids\[1\] must be 0 to 8.*got {token_id}"):
        reference.embedding(np.array([0, token_id]), zeros(9, 5), zeros(2, 5))


def test_weights_of_another_shape_are_refused():
    weights = reference.allocate_weights(1, 7, 11, "float32")
    with pytest.raises(ValueError, match=r"weight must have shape \[7, 11\] .*got \[11, 7\]"):
        reference.store_weight(weights, 0, zeros(11, 7))
