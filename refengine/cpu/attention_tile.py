"""Attention over the pages of one sequence, for a few of its query tokens.

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

from refengine.cpu.attention_pages import ask_for, copy_keys, locate_keys
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
TILE_ROWS = 48  # rows of one KV head that a tile of queries aims at
# A tile with at most this many rows a KV head is narrow: keys and values are read where they lie,
# and several KV heads may be served together. More rows share a widened copy.
NARROW_ROWS = 8
_NO_SCORE = np.float32(-np.inf)
_UNBOUNDED = (2**40,)  # pointers do not know where their array ends
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@inner
def tile_tokens(group: int) -> int:
    """Query tokens in a full tile, for ``group`` query heads a key-value head."""
    return max(1, TILE_ROWS // group)


@inner
def scratch_size(group: int, num_kv_heads: int, head_dim: int) -> int:
    """float32 elements of scratch that ``attend`` wants, a multiple of 16."""
    rows = max(tile_tokens(group) * group, NARROW_ROWS * num_kv_heads)
    padded = (head_dim + LANES - 1) // LANES * LANES
    size = rows * (2 * padded + TILE_KEYS + 3) + 2 * TILE_KEYS * padded
    return (size + LANES - 1) // LANES * LANES


@cache
def attend_address(cache_dtype: np.dtype[Any]) -> int:
    """The address of ``attend`` for a float32 cache, or a bfloat16 one (uint16).

    Compiled functions call it by ``calls.call_address(address, ...)``.
    """
    f32, i32, i64 = types.float32, types.int32, types.int64
    floats, kept = types.CPointer(f32), types.CPointer(numba.from_dtype(cache_dtype))
    signature = types.void(
        floats, i64, i64, i64, i64, i64,
        kept, kept, i64, i64, i64, i64,
        types.CPointer(i32), i64, i64,
        f32, i64, f32,
        floats, i64, i64, floats, i64, types.CPointer(i64),
    )  # fmt: skip
    return compiled_address(attend, signature)


def attend(
    query: Any, query_start: int, query_stride: int, group: int, num_tokens: int, position: int,
    key_cache: Any, value_cache: Any, num_kv_heads: int, head_dim: int, kv_head: int, heads: int,
    block_tables: Any, table_start: int, block_size: int,
    scale: Any, window: int, soft_cap: Any,
    out: Any, out_start: int, out_stride: int, scratch: Any, scratch_start: int, offsets: Any,
) -> None:  # fmt: skip
    """Attend from ``num_tokens`` neighbouring tokens of one sequence with some KV heads' queries.

    Arrays come as pointers; starts and strides count elements.

    Args:
        query: float32. Token t's head h lies at ``query_start + t * query_stride + h * head_dim``.
        query_start: of the first token's first query head of KV head ``kv_head``.
        query_stride: from one token to the next.
        group: query heads that share a KV head.
        num_tokens: at most ``tile_tokens(group)``.
        position: the first token's position in its sequence.
        key_cache: one layer's ``[num_blocks, block_size, num_kv_heads, head_dim]``, float32, or
            bfloat16 as uint16.
        value_cache: likewise.
        num_kv_heads: of the cache.
        head_dim: of query and cache.
        kv_head: the first KV head.
        heads: KV heads from there on; several only where ``num_tokens * group <= NARROW_ROWS``.
            Neighbouring heads of a token lie together in the cache, so reading them together is
            reading memory in order, which hardware does ahead: up to three times faster.
        block_tables: int32; the sequence's row begins at ``table_start``.
        table_start: element offset.
        block_size: tokens a block.
        scale: float32, multiplies query-key products.
        window: how many tokens a query sees, itself included; ``UNLIMITED`` for all.
        soft_cap: float32, or 0 for none.
        out: float32, laid out as query.
        out_start: of the first token's first query head of KV head ``kv_head``.
        out_stride: from one token to the next.
        scratch: float32, ``scratch_size(...)`` elements from ``scratch_start`` on, for this thread
            alone.
        scratch_start: element offset.
        offsets: int64 ``[3 * TILE_KEYS]``, for this thread alone.
    """
    query, out = carray(query, _UNBOUNDED), carray(out, _UNBOUNDED)
    key_cache, value_cache = carray(key_cache, _UNBOUNDED), carray(value_cache, _UNBOUNDED)
    block_tables = carray(block_tables, _UNBOUNDED)
    scratch, offsets = carray(scratch, _UNBOUNDED), carray(offsets, (3 * TILE_KEYS,))
    located, upcoming = offsets[:TILE_KEYS], offsets[TILE_KEYS : 2 * TILE_KEYS]
    copied = offsets[2 * TILE_KEYS :]
    # 1 Lay out the scratch. Rows are ordered by KV head, then token, then query head.
    rows = num_tokens * group  # of one KV head
    padded = (head_dim + LANES - 1) // LANES * LANES
    queries = scratch_start  # [heads * rows, padded]
    sums = queries + heads * rows * padded  # [heads * rows, padded]
    scores = sums + heads * rows * padded  # [rows, TILE_KEYS]
    copies = scores + rows * TILE_KEYS  # [2, TILE_KEYS, padded]: keys, then values
    maxima = copies + 2 * TILE_KEYS * padded  # [heads * rows]
    totals = maxima + heads * rows  # [heads * rows]
    scales = totals + heads * rows  # [rows]
    for k in range(TILE_KEYS):
        copied[k] = copies + k * padded
    # 2 Bring in the queries, scaled, and padded to whole lanes.
    for row in range(heads * rows):
        head = row // rows * group + row % group
        source = query_start + row % rows // group * query_stride + head * head_dim
        for i in range(0, padded, LANES):
            part = load_first(query, source + i, head_dim - i) * splat(scale)
            store(scratch, queries + row * padded + i, part)
            store(scratch, sums + row * padded + i, splat(_ZERO))
        scratch[maxima + row] = _NO_SCORE
        scratch[totals + row] = _ZERO
    # 3 Walk over the tiles of keys that some row may see.
    narrow = rows <= NARROW_ROWS
    no_shift: Any = np.int64(0)  # as a bare 0 it would be a type of its own, compiled once more
    token_stride = num_kv_heads * head_dim
    key_first = max(0, position - window + 1)
    key_stop = position + num_tokens
    tile_first = key_first // TILE_KEYS * TILE_KEYS
    locate_keys(block_tables, table_start, block_size, token_stride, kv_head * head_dim,
                tile_first, key_first, key_stop, located)  # fmt: skip
    if narrow:  # the first tile is asked for at once
        for k in range(min(key_stop - tile_first, TILE_KEYS)):
            ask_for(key_cache, located[k], heads * head_dim)
            ask_for(value_cache, located[k], heads * head_dim)
    for tile in range(tile_first, key_stop, TILE_KEYS):
        first, stop = max(key_first, tile), min(key_stop, tile + TILE_KEYS)
        # While a narrow tile is worked on, the next keys and values are asked for. A wide tile
        # computes for so long that waiting for memory does not show.
        ahead = 0
        if tile + TILE_KEYS < key_stop:
            locate_keys(block_tables, table_start, block_size, token_stride, kv_head * head_dim,
                        tile + TILE_KEYS, key_first, key_stop, upcoming)  # fmt: skip
            ahead = head_dim if narrow else 0
        for h in range(heads):
            shift = h * head_dim
            ask = (key_cache, value_cache, upcoming, shift, ahead)
            if narrow and padded == head_dim:
                _attend_tile(
                    scratch, queries + h * rows * padded, sums + h * rows * padded, scores,
                    maxima + h * rows, totals + h * rows, scales, rows, padded, group, position,
                    window, soft_cap, key_cache, value_cache, located, shift, shift,
                    tile, first, stop, ask,
                )  # fmt: skip
            else:
                copy_keys(key_cache, value_cache, head_dim, padded, located, shift,
                          first - tile, stop - tile, scratch, copies)  # fmt: skip
                _attend_tile(
                    scratch, queries + h * rows * padded, sums + h * rows * padded, scores,
                    maxima + h * rows, totals + h * rows, scales, rows, padded, group, position,
                    window, soft_cap, scratch, scratch, copied, no_shift, TILE_KEYS * padded,
                    tile, first, stop, ask,
                )  # fmt: skip
        located, upcoming = upcoming, located
    # 4 Divide by the sum of weights; a row that saw no key gives zeros.
    for row in range(heads * rows):
        total = scratch[totals + row]
        inverse = splat(_ONE / total if total > _ZERO else _ZERO)
        head = row // rows * group + row % group
        target = out_start + row % rows // group * out_stride + head * head_dim
        for i in range(0, padded, LANES):
            part = load(scratch, sums + row * padded + i) * inverse
            store_first(out, target + i, part, head_dim - i)


@inner
def _attend_tile(
    scratch: Any, queries: int, sums: int, scores: int, maxima: int, totals: int, scales: int,
    rows: int, padded: int, group: int, position: int, window: int, soft_cap: Any,
    keys: Any, values: Any, offsets: Any, key_shift: int, value_shift: int,
    tile: int, first: int, stop: int, ask: Any,
) -> None:  # fmt: skip
    """Bring one KV head's rows forward by one tile of keys, four rows at a time."""
    for row in range(0, rows, 4):
        count = min(4, rows - row)
        # The keys that some of these rows may see, counted from the tile's first.
        low = max(first, position + row // group - window + 1) - tile
        high = min(stop, position + (row + count - 1) // group + 1) - tile
        if low >= high:
            continue
        # 1 Scores.
        score = scores + row * TILE_KEYS
        score_rows(scratch, queries + row * padded, padded, count, keys, offsets, key_shift,
                   low // 4 * 4, high, scratch, score, TILE_KEYS, ask)  # fmt: skip
        # 2 Mask and softmax.
        for r in range(row, row + count):
            newest = position + r // group
            _update_softmax(
                scratch, scores + r * TILE_KEYS, maxima + r, totals + r, scales + r, soft_cap,
                max(first, newest - window + 1) - tile, min(stop, newest + 1) - tile,
            )  # fmt: skip
        # 3 Weighted values.
        add_values(scratch, score, TILE_KEYS, scratch, scales + row, count, values, offsets,
                   value_shift, low, high, scratch, sums + row * padded, padded, ask)  # fmt: skip


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
