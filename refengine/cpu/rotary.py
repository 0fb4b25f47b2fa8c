"""Rotary position embedding, in place; twin of reference/rotary.py."""

from __future__ import annotations

from typing import Any

import numba

from refengine.cpu.arrays import SERIAL_ELEMENTS, Array
from refengine.cpu.jit import inner, parallel
from refengine.cpu.rows import as_rows, row_start
from refengine.cpu.simd import LANES
from refengine.cpu.simd_memory import flat, load_first, store_first
from refengine.reference.validation import check_positions, check_rotary_embedding


def rotary_embedding(positions: Array, query: Array, key: Array, cos_sin_cache: Array) -> None:
    """Rotate query and key heads in place; see ``refengine.reference.rotary.rotary_embedding``.

    Args:
        positions: ``[num_tokens]`` int64.
        query: ``[num_tokens, num_q_heads, head_dim]`` float32, contiguous along the last axis.
        key: ``[num_tokens, num_kv_heads, head_dim]`` float32, likewise.
        cos_sin_cache: ``[num_positions, rotary_dim]`` float32, from ``build_cos_sin_cache``.

    Raises:
        ValueError: where shapes, dtypes or strides do not fit, or a position has no row.
    """
    check_rotary_embedding(positions, query, key, cos_sin_cache)
    rows = as_rows("query", query), as_rows("key", key), as_rows("cos_sin_cache", cos_sin_cache)
    loop = _rotate if query.size < SERIAL_ELEMENTS else _rotate_parallel
    if not loop(positions, *rows):
        check_positions(positions, cos_sin_cache)


@inner
def rotate_head(head: Any, start: int, cos_sin_cache: Any, cos_start: int, rotary_dim: int) -> None:
    """Rotate one head: element i of its first half with element i of its second.

    Args:
        head: flat float32.
        start: element offset of the head.
        cos_sin_cache: flat float32; ``rotary_dim // 2`` cosines and as many sines from
            ``cos_start`` on.
        cos_start: element offset of the position's row.
        rotary_dim: how many leading elements of the head are rotated.
    """
    half = rotary_dim // 2
    for i in range(0, half, LANES):
        rest = min(LANES, half - i)
        first, second = start + i, start + half + i
        cos = load_first(cos_sin_cache, cos_start + i, rest)
        sin = load_first(cos_sin_cache, cos_start + half + i, rest)
        a, b = load_first(head, first, rest), load_first(head, second, rest)
        store_first(head, first, a * cos - b * sin, rest)
        store_first(head, second, b * cos + a * sin, rest)


@inner
def _rotate_token(positions: Any, t: int, query: Any, key: Any, cos_sin_cache: Any) -> None:
    rotary_dim = cos_sin_cache.shape[2]
    cos_start = row_start(cos_sin_cache, positions[t], 0)
    for h in range(query.shape[1]):
        start = row_start(query, t, h)
        rotate_head(flat(query), start, flat(cos_sin_cache), cos_start, rotary_dim)
    for h in range(key.shape[1]):
        rotate_head(flat(key), row_start(key, t, h), flat(cos_sin_cache), cos_start, rotary_dim)


@inner
def _positions_fit(positions: Any, cos_sin_cache: Any) -> bool:
    for t in range(positions.shape[0]):
        if positions[t] < 0 or positions[t] >= cos_sin_cache.shape[0]:
            return False
    return True


@inner
def _rotate(positions: Any, query: Any, key: Any, cos_sin_cache: Any) -> bool:
    if not _positions_fit(positions, cos_sin_cache):
        return False
    for t in range(positions.shape[0]):
        _rotate_token(positions, t, query, key, cos_sin_cache)
    return True


@parallel
def _rotate_parallel(positions: Any, query: Any, key: Any, cos_sin_cache: Any) -> bool:
    if not _positions_fit(positions, cos_sin_cache):
        return False
    for t in numba.prange(positions.shape[0]):
        _rotate_token(positions, t, query, key, cos_sin_cache)
    return True
