"""Kernels that move or transform rows, against NumPy and against their twins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_arrays import DTYPES, TOLERANCE, bits_of, on_device, on_host, relative_error

from refengine.cuda import (
    activation,
    blocks,
    merge_partial_attention,
    rms_norm,
    rotary,
    write_kv,
)

RNG = np.random.default_rng(0)


def random(dtype: str, *shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(DTYPES[dtype])  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", [(2, 64), (3, 7)], ids=["16 bytes", "odd"])
def test_write_kv(dtype: str, row: tuple[int, int]) -> None:
    fused = random(dtype, 5, 2 * row[0], row[1])
    device = on_device(fused)
    caches = [on_device(np.zeros((4, 3, *row), DTYPES[dtype])) for _ in range(2)]
    slots = np.array([3, -1, 11, 0, 7])
    write_kv.write_kv(device[:, : row[0]], device[:, row[0] :], *caches, on_device(slots))
    for cache, part in zip(caches, (fused[:, : row[0]], fused[:, row[0] :]), strict=True):
        want = np.zeros((12, *row), np.float32)
        for token, slot in enumerate(slots):
            if slot >= 0:
                want[slot] = part[token]
        assert np.array_equal(on_host(cache).reshape(12, *row), want)


@pytest.mark.parametrize("head_dim", [8, 3])
def test_copy_and_swap_blocks(head_dim: int) -> None:
    shape = (2, 5, 3, 2, head_dim)
    keys, values = random("bfloat16", *shape), random("bfloat16", *shape)
    pairs = np.array([[0, 3], [4, 1]])
    caches = on_device(keys.copy()), on_device(values.copy())
    blocks.copy_blocks(*caches, on_device(pairs))
    for cache, before in zip(caches, (keys, values), strict=True):
        want = before.astype(np.float32)
        want[:, [3, 1]] = want[:, [0, 4]]
        assert np.array_equal(on_host(cache), want)
    others = [on_device(np.zeros((2, 7, 3, 2, head_dim), keys.dtype)) for _ in range(2)]
    blocks.swap_blocks(on_device(keys), on_device(values), *others, on_device(np.array([[1, 6]])))
    for other, before in zip(others, (keys, values), strict=True):
        got = on_host(other)
        assert np.array_equal(got[:, 6], before[:, 1].astype(np.float32))
        assert not got[:, :6].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 7, 600])
def test_rms_norm(dtype: str, size: int) -> None:
    x, residual, weight = random(dtype, 3, size), random(dtype, 3, size), random(dtype, size)
    out = on_device(np.zeros_like(x))
    rms_norm.rms_norm(on_device(x), on_device(weight), 1e-5, out)

    def norm(x: np.ndarray) -> np.ndarray:
        wide = x.astype(np.float64)
        scale = np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
        return wide / scale * weight.astype(np.float64)  # type: ignore[no-any-return]

    assert relative_error(on_host(out), norm(x)) < TOLERANCE[dtype]
    stream = on_device(residual.copy())
    rms_norm.fused_add_rms_norm(on_device(x), stream, on_device(weight), 1e-5, out)
    added = (x.astype(np.float32) + residual.astype(np.float32)).astype(DTYPES[dtype])
    assert np.array_equal(on_host(stream), added.astype(np.float32))
    assert relative_error(on_host(out), norm(added)) < TOLERANCE[dtype]


def test_rms_norm_of_heads_in_place() -> None:
    x, weight = random("bfloat16", 4, 6, 16), random("bfloat16", 16)
    device = on_device(x.copy())
    heads = device[:, 1:4]
    rms_norm.rms_norm(heads, on_device(weight), 1e-5, heads)
    got = on_host(device)
    wide = x.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight.astype(np.float64)
    assert relative_error(got[:, 1:4], want[:, 1:4]) < TOLERANCE["bfloat16"]
    assert np.array_equal(got[:, 4:], x[:, 4:].astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(32, 32), (6, 6), (48, 32)])
def test_rotary_embedding(dtype: str, head_dim: int, rotary_dim: int) -> None:
    heads, half = random(dtype, 3, 5, head_dim), rotary_dim // 2
    table, positions = random("float32", 9, rotary_dim), np.array([3, 8, 0])
    device = on_device(heads.copy())
    rotary.rotary_embedding(on_device(positions), device[:, :3], device[:, 3:], on_device(table))
    cos, sin = (table[positions][:, None, i * half : (i + 1) * half] for i in range(2))
    want = heads.astype(np.float64)
    first, second = want[..., :half].copy(), want[..., half:rotary_dim].copy()
    want[..., :half] = first * cos - second * sin
    want[..., half:rotary_dim] = second * cos + first * sin
    assert relative_error(on_host(device), want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 7])
def test_gated_activations(dtype: str, size: int) -> None:
    x = random(dtype, 3, 2 * size)
    a, b = np.split(x.astype(np.float64), 2, 1)
    inner = np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)
    wanted: list[tuple[Any, np.ndarray]] = [
        (activation.silu_and_mul, a / (1 + np.exp(-a)) * b),
        (activation.gelu_tanh_and_mul, a / 2 * (1 + np.tanh(inner)) * b),
    ]
    for function, want in wanted:
        out = on_device(np.zeros((3, size), x.dtype))
        function(on_device(x), out)
        assert relative_error(on_host(out), want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 7])
def test_soft_cap(dtype: str, size: int) -> None:
    x = random(dtype, 3, size)
    device = on_device(x.copy())
    activation.soft_cap(device, 2.0)
    want = 2.0 * np.tanh(x.astype(np.float64) / 2.0)
    assert relative_error(on_host(device), want) < TOLERANCE[dtype]
    with pytest.raises(ValueError, match="cap: got 0; wanted above 0"):
        activation.soft_cap(device, 0)


def test_merging_parts_is_attention_over_all_keys() -> None:
    scores = RNG.standard_normal((3, 4, 2, 5)) * 4  # [parts, tokens, heads, keys of a part]
    values = RNG.standard_normal((3, 4, 2, 5, 6))
    sums = np.exp(scores).sum(-1)
    parts = (np.exp(scores)[..., None] * values).sum(-2) / sums[..., None]
    logs = np.log(sums).astype(np.float32)
    parts[1, 2], logs[1, 2] = np.nan, -np.inf  # a part without keys
    parts[:, 3], logs[:, 3] = np.nan, -np.inf  # a token without keys
    weights = np.exp(scores)
    weights[1, 2] = weights[:, 3] = 0
    want = (weights[..., None] * values).sum((0, 3))
    want /= np.maximum(weights.sum((0, 3)), 1e-30)[..., None]
    out = on_device(np.full((4, 2, 6), np.nan, np.float32))
    device = on_device(parts.astype(np.float32)), on_device(logs)
    merge_partial_attention.merge_partial_attention(*device, out)
    assert relative_error(on_host(out), want) < 2e-6


def test_no_rows_is_no_work() -> None:
    out = on_device(random("float32", 0, 4))
    activation.silu_and_mul(on_device(random("float32", 0, 8)), out)
    rms_norm.rms_norm(out, on_device(random("float32", 4)), 1e-5, out)
    assert bits_of(out) == b""
