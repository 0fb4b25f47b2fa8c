"""Attention of one key-value head over the pages of one sequence, for a few query tokens.

One algorithm serves decode, prefill and everything between: the rows of a tile are the pairs
(query token, query head of the group), so grouped heads and neighbouring tokens share each load of
a key or value. Softmax is computed online over tiles of keys (Milakov and Gimelshein 2018, "Online
normalizer calculation for softmax"; Dao et al. 2022, "FlashAttention").

Tiles of keys begin at multiples of ``TILE_KEYS`` counted from the sequence's start, and every sum
has a fixed order (simd.py), so a row's result depends on its own query and keys alone: not on the
tile it was in, the batch, the chunks of a prompt, or the threads. Keys that a row may not see take
part with the exact weight zero; slots that no row may see are never read.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import carray, types

from refengine.cpu.attention_products import add_values, score_rows
from refengine.cpu.jit import compiled_address, inner
from refengine.cpu.simd import (
    LANES,
    first_lane,
    keep_lanes,
    max_lanes,
    maximum,
    splat,
    sum_lanes,
)
from refengine.cpu.simd_math import exp, tanh
from refengine.cpu.simd_memory import load, load_first, store, store_first

TILE_KEYS = 64
TILE_ROWS = 48  # rows that a tile of queries aims at
# Up to this many rows, keys and values are read where they lie; more rows share a widened copy.
_DIRECT_ROWS = 8
_NO_SCORE = np.float32(-np.inf)
_UNBOUNDED = (2**40,)  # pointers do not know where their array ends
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@inner
def tile_tokens(group: int) -> int:
    """Query tokens in a full tile, for ``group`` query heads a key-value head."""
    return max(1, TILE_ROWS // group)


@inner
def scratch_size(group: int, head_dim: int) -> int:
    """float32 elements of scratch that ``attend`` wants, a multiple of 16."""
    rows = tile_tokens(group) * group
    padded = (head_dim + LANES - 1) // LANES * LANES
    small = (3 * rows + LANES - 1) // LANES * LANES
    return rows * (2 * padded + TILE_KEYS) + 2 * TILE_KEYS * padded + small


@cache
def attend_address(cache_dtype: np.dtype[Any]) -> int:
    """The address of ``attend`` for a float32 cache, or a bfloat16 one (uint16).

    Compiled functions call it by ``calls.call_address(address, ...)``.
    """
    f32, i32, i64 = types.float32, types.int32, types.int64
    floats, kept = types.CPointer(f32), types.CPointer(numba.from_dtype(cache_dtype))
    signature = types.void(
        floats, i64, i64, i64, i64, i64,
        kept, kept, i64, i64, i64,
        types.CPointer(i32), i64, i64,
        f32, i64, f32,
        floats, i64, i64, floats, i64, types.CPointer(i64),
    )  # fmt: skip
    return compiled_address(attend, signature)


def attend(
    query: Any, query_start: int, query_stride: int, group: int, num_tokens: int, position: int,
    key_cache: Any, value_cache: Any, num_kv_heads: int, head_dim: int, kv_head: int,
    block_tables: Any, table_start: int, block_size: int,
    scale: Any, window: int, soft_cap: Any,
    out: Any, out_start: int, out_stride: int, scratch: Any, scratch_start: int, offsets: Any,
) -> None:  # fmt: skip
    """Attend from ``num_tokens`` neighbouring tokens with the ``group`` heads of one KV head.

    Arrays come as pointers; starts and strides count elements.

    Args:
        query: float32. Token t's head g lies at ``query_start + t * query_stride + g * head_dim``.
        query_start: of the first token's first head of the group.
        query_stride: from one token to the next.
        group: query heads that share the KV head.
        num_tokens: at most ``tile_tokens(group)``.
        position: the first token's position in its sequence.
        key_cache: one layer's ``[num_blocks, block_size, num_kv_heads, head_dim]``, float32, or
            bfloat16 as uint16.
        value_cache: likewise.
        num_kv_heads: of the cache.
        head_dim: of query and cache.
        kv_head: which one.
        block_tables: int32; the sequence's row begins at ``table_start``.
        table_start: element offset.
        block_size: tokens a block.
        scale: float32, multiplies query-key products.
        window: how many tokens a query sees, itself included; ``UNLIMITED`` for all.
        soft_cap: float32, or 0 for none.
        out: float32, laid out as query.
        out_start: of the first token's first head of the group.
        out_stride: from one token to the next.
        scratch: float32, ``scratch_size(group, head_dim)`` elements from ``scratch_start`` on, for
            this thread alone.
        scratch_start: element offset.
        offsets: int64 ``[TILE_KEYS]``, for this thread alone.
    """
    query, out = carray(query, _UNBOUNDED), carray(out, _UNBOUNDED)
    key_cache, value_cache = carray(key_cache, _UNBOUNDED), carray(value_cache, _UNBOUNDED)
    block_tables = carray(block_tables, _UNBOUNDED)
    scratch, offsets = carray(scratch, _UNBOUNDED), carray(offsets, _UNBOUNDED)
    # 1 Lay out the scratch, and the queries in it: scaled, and padded to whole lanes.
    rows = num_tokens * group
    padded = (head_dim + LANES - 1) // LANES * LANES
    queries = scratch_start  # [rows, padded]
    sums = queries + rows * padded  # [rows, padded]
    scores = sums + rows * padded  # [rows, TILE_KEYS]
    copies = scores + rows * TILE_KEYS  # [2, TILE_KEYS, padded]: keys, then values
    maxima = copies + 2 * TILE_KEYS * padded  # [rows]
    totals = maxima + rows  # [rows]
    scales = totals + rows  # [rows]
    for row in range(rows):
        source = query_start + row // group * query_stride + row % group * head_dim
        for i in range(0, padded, LANES):
            part = load_first(query, source + i, head_dim - i) * splat(scale)
            store(scratch, queries + row * padded + i, part)
            store(scratch, sums + row * padded + i, splat(_ZERO))
        scratch[maxima + row] = _NO_SCORE
        scratch[totals + row] = _ZERO
    # 2 Walk over the tiles of keys that some row may see.
    no_shift, shift = np.int64(0), TILE_KEYS * padded
    direct = rows <= _DIRECT_ROWS and padded == head_dim
    key_first = max(0, position - window + 1)
    key_stop = position + num_tokens
    for tile in range(key_first // TILE_KEYS * TILE_KEYS, key_stop, TILE_KEYS):
        first, stop = max(key_first, tile), min(key_stop, tile + TILE_KEYS)
        _locate_keys(
            block_tables, table_start, block_size, num_kv_heads, head_dim, kv_head,
            tile, first, stop, offsets,
        )  # fmt: skip
        if direct:
            _attend_tile(
                scratch, queries, sums, scores, maxima, totals, scales, rows, padded, group,
                position, window, soft_cap, key_cache, value_cache, offsets, no_shift, tile, first, stop,
            )  # fmt: skip
        else:
            _copy_keys(key_cache, value_cache, head_dim, padded, tile, first, stop, offsets,
                       scratch, copies)  # fmt: skip
            _attend_tile(
                scratch, queries, sums, scores, maxima, totals, scales, rows, padded, group,
                position, window, soft_cap, scratch, scratch, offsets, shift, tile, first, stop,
            )  # fmt: skip
    # 3 Divide by the sum of weights; a row that saw no key gives zeros.
    for row in range(rows):
        total = scratch[totals + row]
        inverse = splat(_ONE / total if total > _ZERO else _ZERO)
        target = out_start + row // group * out_stride + row % group * head_dim
        for i in range(0, padded, LANES):
            part = load(scratch, sums + row * padded + i) * inverse
            store_first(out, target + i, part, head_dim - i)


@inner
def _locate_keys(
    block_tables: Any, table_start: int, block_size: int, num_kv_heads: int, head_dim: int,
    kv_head: int, tile: int, first: int, stop: int, offsets: Any,
) -> None:  # fmt: skip
    """Where keys ``first .. stop - 1`` of the sequence lie in the cache.

    Places of the tile outside them repeat a valid one: they may be scored, four keys at a time,
    but are never given weight.
    """
    token_stride = num_kv_heads * head_dim
    head = kv_head * head_dim
    index, offset = first // block_size, first % block_size
    slot = np.int64(block_tables[table_start + index]) * block_size + offset
    for k in range(first - tile):
        offsets[k] = slot * token_stride + head
    for k in range(first - tile, stop - tile):
        offsets[k] = slot * token_stride + head
        slot += 1
        offset += 1
        if offset == block_size and k + 1 < stop - tile:
            index, offset = index + 1, 0
            slot = np.int64(block_tables[table_start + index]) * block_size
    for k in range(stop - tile, TILE_KEYS):
        offsets[k] = offsets[first - tile]


@inner
def _copy_keys(
    key_cache: Any, value_cache: Any, head_dim: int, padded: int, tile: int, first: int, stop: int,
    offsets: Any, scratch: Any, copies: int,
) -> None:  # fmt: skip
    """Widen a tile's keys and values into the scratch, and let ``offsets`` point there."""
    for k in range(first - tile, stop - tile):
        to = copies + k * padded
        for i in range(0, padded, LANES):
            source, rest = offsets[k] + i, head_dim - i
            store(scratch, to + i, load_first(key_cache, source, rest))
            store(scratch, to + i + TILE_KEYS * padded, load_first(value_cache, source, rest))
    for k in range(TILE_KEYS):
        offsets[k] = copies + k * padded


@inner
def _attend_tile(
    scratch: Any, queries: int, sums: int, scores: int, maxima: int, totals: int, scales: int,
    rows: int, padded: int, group: int, position: int, window: int, soft_cap: Any,
    keys: Any, values: Any, offsets: Any, shift: int, tile: int, first: int, stop: int,
) -> None:  # fmt: skip
    """Bring every row's running softmax forward by one tile of keys, four rows at a time."""
    for row in range(0, rows, 4):
        count = min(4, rows - row)
        # The keys that some of these rows may see, counted from the tile's first.
        low = max(first, position + row // group - window + 1) - tile
        high = min(stop, position + (row + count - 1) // group + 1) - tile
        if low >= high:
            continue
        # 1 Scores.
        score = scores + row * TILE_KEYS
        score_rows(scratch, queries + row * padded, padded, count, keys, offsets,
                   low // 4 * 4, high, scratch, score, TILE_KEYS)  # fmt: skip
        # 2 Mask and softmax.
        for r in range(row, row + count):
            newest = position + r // group
            _update_softmax(
                scratch, scores + r * TILE_KEYS, maxima + r, totals + r, scales + r, soft_cap,
                max(first, newest - window + 1) - tile, min(stop, newest + 1) - tile,
            )  # fmt: skip
        # 3 Weighted values.
        add_values(scratch, score, TILE_KEYS, scratch, scales + row, count, values, offsets, shift,
                   low, high, scratch, sums + row * padded, padded)  # fmt: skip


@inner
def _update_softmax(
    scratch: Any, score: int, maximum_at: int, total_at: int, scale_at: int, soft_cap: Any,
    low: int, high: int,
) -> None:  # fmt: skip
    """Turn one row's scores into weights relative to its greatest score so far.

    ``scratch[scale_at]`` receives what earlier sums must be multiplied by, since the greatest score
    may have grown.
    """
    masked = splat(_NO_SCORE)
    s0, s1 = load(scratch, score), load(scratch, score + LANES)
    s2, s3 = load(scratch, score + 2 * LANES), load(scratch, score + 3 * LANES)
    if soft_cap > _ZERO:
        cap = splat(soft_cap)
        s0, s1 = cap * tanh(s0 / cap), cap * tanh(s1 / cap)
        s2, s3 = cap * tanh(s2 / cap), cap * tanh(s3 / cap)
    s0 = keep_lanes(s0, low, high, masked)
    s1 = keep_lanes(s1, low - LANES, high - LANES, masked)
    s2 = keep_lanes(s2, low - 2 * LANES, high - 2 * LANES, masked)
    s3 = keep_lanes(s3, low - 3 * LANES, high - 3 * LANES, masked)
    before = scratch[maximum_at]
    greatest = max(before, max_lanes(maximum(maximum(s0, s1), maximum(s2, s3))))
    # A row that has seen no key yet: every weight is exp(-inf) = 0, whatever finite number is
    # subtracted.
    reference = splat(_ZERO if greatest == _NO_SCORE else greatest)
    s0, s1 = exp(s0 - reference), exp(s1 - reference)
    s2, s3 = exp(s2 - reference), exp(s3 - reference)
    store(scratch, score, s0)
    store(scratch, score + LANES, s1)
    store(scratch, score + 2 * LANES, s2)
    store(scratch, score + 3 * LANES, s3)
    scale = _ONE
    if greatest > before:
        scale = first_lane(exp(splat(before) - reference))
    scratch[maximum_at] = greatest
    scratch[scale_at] = scale
    scratch[total_at] = scratch[total_at] * scale + sum_lanes((s0 + s1) + (s2 + s3))
