"""Norms, rotation and activations of the CPU backends against float64 formulas."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from refengine import cpu, reference

BACKENDS = {"reference": reference, "cpu": cpu}
# Rows of one token, of a few (one thread) and of many (all threads); widths around 16 lanes.
SHAPES = [(1, 576), (3, 1), (5, 15), (2, 16), (4, 17), (7, 59), (64, 576), (300, 100), (300, 300)]


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS.keys())
def kernels(request):
    return request.param


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(got, expected, tolerance=2e-6):
    """Largest difference as a share of the largest number expected."""
    assert not np.isnan(got).any()
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def normed(x, weight, eps):
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * weight.astype(np.float64)


# ---------------------------------------------------------------- rms_norm


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_rms_norm(kernels, shape, dtype):
    x, weight = normal(*shape), normal(shape[-1], seed=1).astype(dtype)
    out = np.full_like(x, np.nan)
    kernels.rms_norm(x, weight, 1e-3, out)
    close(out, normed(x, weight, 1e-3))


def test_rms_norm_of_heads_in_place(kernels):
    """As Qwen3 normalises its heads: a part of one product, written through."""
    qkv = normal(6, 7, 40)
    before, weight = qkv.copy(), normal(40, seed=1)
    heads = qkv[:, :4]
    kernels.rms_norm(heads, weight, 1e-6, heads)
    close(qkv[:, :4], normed(before[:, :4], weight, 1e-6))
    assert np.array_equal(qkv[:, 4:], before[:, 4:])


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_rms_norm_of_tiny_and_huge_rows(kernels, size):
    x, weight = normal(3, 64) * np.float32(size), np.ones(64, np.float32)
    out = np.empty_like(x)
    kernels.rms_norm(x, weight, 1e-5, out)
    close(out, normed(x, weight, 1e-5))


def test_eps_is_inside_the_root(kernels):
    out = np.empty((1, 16), np.float32)
    kernels.rms_norm(np.zeros((1, 16), np.float32), np.ones(16, np.float32), 1e-5, out)
    assert (out == 0).all()
    kernels.rms_norm(np.full((1, 16), 3e-3, np.float32), np.ones(16, np.float32), 9e-6, out)
    close(out, np.full((1, 16), np.sqrt(0.5)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_add_rms_norm(kernels, shape):
    x, residual, weight = normal(*shape), normal(*shape, seed=1), normal(shape[-1], seed=2)
    total = x + residual
    out = np.full_like(x, np.nan)
    kernels.fused_add_rms_norm(x, residual, weight, 1e-5, out)
    assert np.array_equal(residual, total)
    close(out, normed(total, weight, 1e-5))


def test_fused_add_rms_norm_into_its_input(kernels):
    x, residual, weight = normal(4, 100), normal(4, 100, seed=1), normal(100, seed=2)
    expected = normed(x + residual, weight, 1e-5)
    kernels.fused_add_rms_norm(x, residual, weight, 1e-5, x)
    close(x, expected)


# ---------------------------------------------------------------- rotary_embedding


def rotated(heads, positions, angles):
    """Each pair (i, i + half) as a complex number, turned; ``angles`` is one position's worth."""
    half = len(angles)
    wide = heads.astype(np.float64)
    pairs = wide[..., :half] + 1j * wide[..., half : 2 * half]
    turned = pairs * np.exp(1j * positions[:, None, None] * angles)
    return np.concatenate([turned.real, turned.imag, wide[..., 2 * half :]], axis=-1)


@pytest.mark.parametrize("head_dim", [2, 16, 40, 64, 128])
@pytest.mark.parametrize("num_tokens", [1, 5, 200])
def test_rotary_embedding(kernels, head_dim, num_tokens):
    table = reference.build_cos_sin_cache(head_dim, 300, 10000.0)
    positions = np.random.default_rng(0).integers(0, 300, num_tokens)
    angles = 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    qkv = normal(num_tokens, 9, head_dim)
    before = qkv.copy()
    kernels.rotary_embedding(positions, qkv[:, :5], qkv[:, 5:7], table)
    close(qkv[:, :7], rotated(before[:, :7], positions, angles), 5e-5)  # angles are float32
    assert np.array_equal(qkv[:, 7:], before[:, 7:])


def test_rotation_of_a_part_of_each_head(kernels):
    table = reference.build_cos_sin_cache(16, 50, 10000.0)
    angles = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    positions = np.array([0, 7, 49])
    query, key = normal(3, 4, 40), normal(3, 2, 40, seed=1)
    expected = rotated(query, positions, angles), rotated(key, positions, angles)
    kernels.rotary_embedding(positions, query, key, table)
    close(query, expected[0], 1e-5)
    close(key, expected[1], 1e-5)


def test_products_depend_on_distance_alone(kernels):
    """What rotation is for."""
    table = reference.build_cos_sin_cache(64, 1000, 10000.0)
    query, key = np.repeat(normal(1, 1, 64), 3, 0), np.repeat(normal(1, 1, 64, seed=1), 3, 0)
    kernels.rotary_embedding(np.array([5, 105, 905]), query, query.copy(), table)
    kernels.rotary_embedding(np.array([0, 100, 900]), key, key.copy(), table)
    products = (query * key).sum(axis=(1, 2))
    assert np.ptp(products) < 1e-3 * np.abs(products).max()


# ---------------------------------------------------------------- activations


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_silu_and_mul(kernels, shape, spread):
    x = normal(shape[0], 2 * shape[1]) * np.float32(spread)
    out = np.full(shape, np.nan, np.float32)
    kernels.silu_and_mul(x, out)
    gate, up = np.split(x.astype(np.float64), 2, axis=1)
    close(out, gate / (1 + np.exp(-gate)) * up)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_gelu_tanh_and_mul(kernels, shape, spread):
    x = normal(shape[0], 2 * shape[1]) * np.float32(spread)
    out = np.full(shape, np.nan, np.float32)
    kernels.gelu_tanh_and_mul(x, out)
    gate, up = np.split(x.astype(np.float64), 2, axis=1)
    gelu = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    close(out, gelu * up)


def test_gates_far_from_zero(kernels):
    gate = np.array([-np.inf, -1e30, -200.0, -89.0, 0.0, 89.0, 1e30], np.float32)
    x = np.concatenate([gate, np.ones_like(gate)])[np.newaxis]
    out = np.empty((1, gate.size), np.float32)
    for function in (kernels.silu_and_mul, kernels.gelu_tanh_and_mul):
        if function.__name__ == "silu_and_mul":
            x[0, 0] = -3e38  # of infinity, silu is 0 / 0 by its formula
        with np.errstate(invalid="ignore", over="ignore"):
            function(x, out)
        finite = np.isfinite(x[0, : gate.size])
        wanted = np.where(gate > 0, gate, 0)
        assert np.allclose(out[0, finite], wanted[finite], atol=1e-30)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 4, 33), (40,)], ids=str)
def test_soft_cap(kernels, shape):
    x = normal(*shape) * np.float32(40)
    expected = 30 * np.tanh(x.astype(np.float64) / 30)
    kernels.soft_cap(x, 30.0)
    close(x, expected)


def test_soft_cap_keeps_small_numbers(kernels):
    """Computed as 1 - 2 / (exp(2x) + 1) they would lose most of their digits."""
    x = np.float32(10.0) ** np.arange(-20, 0, dtype=np.float32)[np.newaxis]
    expected = 5 * np.tanh(x.astype(np.float64) / 5)
    kernels.soft_cap(x, 5.0)
    assert np.allclose(x, expected, rtol=1e-6, atol=0)


# ---------------------------------------------------------------- the same bits, whatever else


def test_cpu_rows_have_the_same_bits_alone_and_together():
    """One row takes the path of one thread, 300 that of all."""
    x, residual = normal(300, 576), normal(300, 576, seed=1)
    weight = normal(576, seed=2)
    table = reference.build_cos_sin_cache(64, 300, 10000.0)

    def everything(x, residual, positions):
        x, residual = x.copy(), residual.copy()
        out, gated = np.empty_like(x), np.empty((len(x), 288), np.float32)
        cpu.fused_add_rms_norm(x, residual, weight, 1e-5, out)
        heads = out.reshape(len(x), 9, 64).copy()
        cpu.rotary_embedding(positions, heads[:, :6], heads[:, 6:], table)
        cpu.silu_and_mul(out, gated)
        capped = out.copy()
        cpu.soft_cap(capped, 1.5)
        return np.concatenate([out, residual, heads.reshape(len(x), -1), gated, capped], axis=1)

    together = everything(x, residual, np.arange(300))
    for row in (0, 1, 150, 299):
        rows = slice(row, row + 1)
        alone = everything(x[rows], residual[rows], np.arange(300)[rows])
        assert np.array_equal(alone[0], together[row])


# ---------------------------------------------------------------- what is refused


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (
            "rms_norm",
            (zeros(2, 8), zeros(7), 1e-5, zeros(2, 8)),
            r"weight must have shape \[8\] \(as x's last axis\), got \[7\]",
        ),
        (
            "rms_norm",
            (zeros(2, 8), zeros(8), 1e-5, zeros(3, 8)),
            r"out must have shape \[2, 8\] \(as x\), got \[3, 8\]",
        ),
        (
            "fused_add_rms_norm",
            (zeros(2, 8), zeros(2, 9), zeros(8), 1e-5, zeros(2, 8)),
            r"residual must have shape \[2, 8\] \(as x\), got \[2, 9\]",
        ),
        (
            "rotary_embedding",
            (zeros(3, dtype=np.int64), zeros(3, 2, 8), zeros(2, 2, 8), zeros(5, 8)),
            r"key must have shape \[3, num_kv_heads, 8\] .*got \[2, 2, 8\]",
        ),
        (
            "rotary_embedding",
            (zeros(2, dtype=np.int64), zeros(3, 2, 8), zeros(3, 2, 8), zeros(5, 8)),
            r"positions must have shape \[3\] .*got \[2\]",
        ),
        (
            "rotary_embedding",
            (zeros(3), zeros(3, 2, 8), zeros(3, 2, 8), zeros(5, 8)),
            "positions must hold integers, got float32",
        ),
        (
            "rotary_embedding",
            (zeros(3, dtype=np.int64), zeros(3, 2, 8), zeros(3, 2, 8), zeros(5, 10)),
            "even number of columns, at most head_dim, 8, got 10",
        ),
        (
            "rotary_embedding",
            (np.array([0, 5, 1]), zeros(3, 2, 8), zeros(3, 2, 8), zeros(5, 8)),
            r"positions\[1\] must be 0 to 4, a row of cos_sin_cache, got 5",
        ),
        (
            "rotary_embedding",
            (np.array([0, 4, -1]), zeros(3, 2, 8), zeros(3, 2, 8), zeros(5, 8)),
            r"positions\[2\] must be 0 to 4, a row of cos_sin_cache, got -1",
        ),
        (
            "silu_and_mul",
            (zeros(2, 8), zeros(2, 8)),
            r"out must have shape \[2, 4\] \(half of x's columns\), got \[2, 8\]",
        ),
        (
            "gelu_tanh_and_mul",
            (zeros(2, 7), zeros(2, 3)),
            r"even number of columns, got shape \[2, 7\]",
        ),
        ("soft_cap", (zeros(2, 8), 0.0), "cap must be above 0, got 0.0"),
    ],
)
def test_what_does_not_fit_is_refused(kernels, function, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(kernels, function)(*arguments)


def test_nothing_is_rotated_where_a_position_is_wrong(kernels):
    query, key = normal(3, 2, 8), normal(3, 2, 8, seed=1)
    before = query.copy(), key.copy()
    with pytest.raises(ValueError, match="positions"):
        kernels.rotary_embedding(np.array([0, 1, 9]), query, key, zeros(5, 8))
    assert np.array_equal(query, before[0])
    assert np.array_equal(key, before[1])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (zeros(2, 8, dtype=np.float64), "x must be float32, got float64"),
        (zeros(2, 16)[:, ::2], r"x must be contiguous along its last axis, .*\[64, 8\] bytes"),
        (zeros(2, 2, 2, 8), r"x must have 1 to 3 axes, got shape \[2, 2, 2, 8\]"),
    ],
)
def test_cpu_refuses_rows_that_it_does_not_read(x, message):
    with pytest.raises(ValueError, match=message):
        cpu.rms_norm(x, zeros(8), 1e-5, x)
