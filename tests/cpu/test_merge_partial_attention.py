"""Attention over parts of the keys, put together, is attention over all of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from refengine import cpu, reference

BACKENDS = {"reference": reference, "cpu": cpu}


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS.keys())
def kernels(request):
    return request.param


def parts_of(scores, values, borders):
    """Each part's own softmax-weighted values and log-sum-exp, float64."""
    outputs, sums = [], []
    for first, stop in itertools.pairwise(borders):
        if first == stop:
            outputs.append(np.full((*scores.shape[:2], values.shape[-1]), np.nan))
            sums.append(np.full(scores.shape[:2], -np.inf))
            continue
        part = scores[..., first:stop]
        top = part.max(-1, keepdims=True)
        weights = np.exp(part - top)
        outputs.append(weights @ values[first:stop] / weights.sum(-1, keepdims=True))
        sums.append((np.log(weights.sum(-1, keepdims=True)) + top)[..., 0])
    return np.array(outputs, np.float32), np.array(sums, np.float32)


@pytest.mark.parametrize("head_dim", [16, 59, 64])
@pytest.mark.parametrize("spread", [1.0, 40.0])
@pytest.mark.parametrize(
    "borders", [[0, 100], [0, 50, 100], [0, 1, 3, 99, 100], [0, 0, 64, 64, 100, 100]], ids=str
)
def test_parts_give_the_whole(kernels, head_dim, spread, borders):
    random = np.random.default_rng(0)
    scores = random.standard_normal((4, 6, 100)) * spread  # [tokens, heads, keys]
    values = random.standard_normal((100, head_dim))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights @ values / weights.sum(-1, keepdims=True)
    out = np.full((4, 6, head_dim), np.nan, np.float32)
    kernels.merge_partial_attention(*parts_of(scores, values, borders), out)
    # A log-sum-exp near 120 is rounded by 4e-6, and its exponential with it.
    assert np.abs(out - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_row_without_any_keys_is_zero(kernels):
    outputs = np.full((2, 1, 2, 16), np.nan, np.float32)
    outputs[0, 0, 1] = 3.0
    sums = np.full((2, 1, 2), -np.inf, np.float32)
    sums[0, 0, 1] = 500.0
    out = np.full((1, 2, 16), np.nan, np.float32)
    kernels.merge_partial_attention(outputs, sums, out)
    assert (out[0, 0] == 0).all()
    assert (out[0, 1] == 3).all()


def test_no_parts_give_zeros(kernels):
    out = np.full((1, 2, 16), np.nan, np.float32)
    outputs, sums = np.zeros((0, 1, 2, 16), np.float32), np.zeros((0, 1, 2), np.float32)
    kernels.merge_partial_attention(outputs, sums, out)
    assert (out == 0).all()


@pytest.mark.parametrize(
    ("outputs", "sums", "out", "message"),
    [
        ((2, 3, 4), (2, 3), (3, 4), r"partial_outputs must have shape \[num_parts, num_tokens"),
        ((2, 3, 4, 8), (2, 3, 5), (3, 4, 8), r"log_sum_exps must have shape \[2, 3, 4\].*got"),
        ((2, 3, 4, 8), (2, 3, 4), (3, 4, 9), r"out must have shape \[3, 4, 8\] .*\[3, 4, 9\]"),
    ],
)
def test_what_does_not_fit_is_refused(kernels, outputs, sums, out, message):
    arrays = [np.zeros(shape, np.float32) for shape in (outputs, sums, out)]
    with pytest.raises(ValueError, match=message):
        kernels.merge_partial_attention(*arrays)
