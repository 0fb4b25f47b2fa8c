"""Rotary tables against formulas in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from refengine.config import RopeScaling
from refengine.reference import build_cos_sin_cache


def angles_of(table):
    half = table.shape[1] // 2
    return np.arctan2(table[:, half:], table[:, :half])


def frequencies(head_dim, theta):
    return float(theta) ** (-np.arange(0, head_dim, 2) / head_dim)


@pytest.mark.parametrize(("head_dim", "theta"), [(2, 1e4), (64, 1e4), (64, 1e5), (128, 5e5)])
def test_plain_tables(head_dim, theta):
    table = build_cos_sin_cache(head_dim, 200, theta)
    assert table.shape == (200, head_dim)
    assert table.dtype == np.float32
    angles = np.arange(200)[:, None] * frequencies(head_dim, theta)
    assert np.allclose(table, np.concatenate([np.cos(angles), np.sin(angles)], 1), atol=3e-5)


def test_angles_are_rounded_to_float32_as_models_were_trained():
    """At position 8,000 of the first pair, float32 and exact angles part in the fourth decimal."""
    table = build_cos_sin_cache(64, 8192, 1e4)
    exponents = np.arange(0, 64, 2, dtype=np.float32) / np.float32(64)
    rounded = np.float32(8191) * (np.float32(1) / np.float32(1e4) ** exponents)
    assert np.allclose(table[-1, :32], np.cos(rounded.astype(np.float64)), atol=1e-7)
    exact = 8191 * frequencies(64, 1e4)
    assert np.abs(table[-1, :32] - np.cos(exact)).max() > 1e-5


def test_linear_scaling():
    """Position p of a context stretched four times is position p / 4 of the plain one."""
    plain = build_cos_sin_cache(64, 50, 1e4)
    scaled = build_cos_sin_cache(64, 197, 1e4, RopeScaling(rope_type="linear", factor=4.0))
    assert np.allclose(scaled[::4], plain, atol=1e-5)


def llama3_frequencies(head_dim, theta, factor, low, high, context):
    """Wave by wave, from its length in tokens."""
    out = []
    for frequency in frequencies(head_dim, theta):
        length = 2 * np.pi / frequency
        if length < context / high:
            out.append(frequency)
        elif length > context / low:
            out.append(frequency / factor)
        else:
            smooth = (context / length - low) / (high - low)
            out.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(out)


@pytest.mark.parametrize(
    ("head_dim", "theta", "factor", "low", "high", "context"),
    [
        (128, 5e5, 8.0, 1.0, 4.0, 8192),
        (64, 5e5, 32.0, 1.0, 4.0, 8192),
        (32, 1e4, 2.0, 1.0, 1.0, 64),
    ],
)
def test_llama3_scaling(head_dim, theta, factor, low, high, context):
    scaling = RopeScaling(
        rope_type="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=context,
    )
    table = build_cos_sin_cache(head_dim, 2, theta, scaling)
    expected = llama3_frequencies(head_dim, theta, factor, low, high, context)
    assert np.allclose(angles_of(table)[1], expected, rtol=1e-5, atol=1e-9)


@dataclass
class Numbers:
    """What any caller may pass: plain numbers under these names."""

    rope_type: str
    factor: float = 2.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 64


def test_other_kinds_of_scaling_are_refused():
    with pytest.raises(ValueError, match="rope_type must be linear or llama3, got 'yarn'"):
        build_cos_sin_cache(64, 2, 1e4, Numbers("yarn"))


@pytest.mark.parametrize("head_dim", [0, 7])
def test_odd_heads_have_no_pairs(head_dim):
    with pytest.raises(ValueError, match=f"head_dim must be even .*got {head_dim}"):
        build_cos_sin_cache(head_dim, 2, 1e4)
