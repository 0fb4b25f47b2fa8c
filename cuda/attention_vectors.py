"""Paged attention, rungs 3 and 4: 16-byte loads straight to registers; the context split.

A few neighbouring lanes hold one row of keys, so that a warp reads whole rows, 16 bytes a lane, and
several rows at once; the products' sum over the row is a handful of shuffles. Query heads of a
group share every load. With one split a block walks the whole context (rung 3); with more, blocks
share a sequence and a second kernel merges their partial softmaxes (rung 4, Flash-Decoding: Dao et
al., 2023), which is what a few long sequences need to fill the card.

Arithmetic is float32 on the ordinary cores: exact enough for float32 caches, for which this is the
fastest rung, and the bound for half precision where groups are large.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from numba import cuda

from . import ptx
from .attention_rows import NOTHING, find_context
from .elements import elements
from .launch import Kernel
from .ptx import F32, U32, U64

WARPS = 4
THREADS = 32 * WARPS
HEADS = 4  # query heads of a block at most; more would not fit the registers
LOG2_E = math.log2(math.e)
SPLIT = 1024  # tokens of a split: fixed, so that a result does not depend on the batch


@functools.cache
def vector_kernel(
    dtype: str, NUM_KV: int, GROUP: int, DIM: int, BLOCK: int, capped: bool
) -> Kernel:
    """One split of one token for up to ``HEADS`` query heads; grid (splits, head tiles, tokens)."""
    part = elements(dtype, wide=True)
    load, WIDTH = part.load, part.width
    store_one = elements(dtype, wide=False).store
    HEAD_TILES = -(-GROUP // HEADS)
    TILE_HEADS = min(GROUP, HEADS)
    ROW = NUM_KV * DIM
    NUM_Q = NUM_KV * GROUP
    PIECES = DIM // WIDTH  # of a row
    LANES = min(32, 1 << (PIECES - 1).bit_length())  # that hold a row
    LANE_BITS = LANES.bit_length() - 1
    PER_LANE = -(-PIECES // LANES)
    TOKENS = 32 // LANES  # that a warp reads at once
    KEPT = PER_LANE * WIDTH
    QUERY = TILE_HEADS * KEPT
    STEP = WARPS * TOKENS
    SHARED_SUMS, SHARED_STATS = WARPS * TILE_HEADS * DIM, WARPS * TILE_HEADS
    OUTPUTS = TILE_HEADS * DIM

    def vectors(
        query: Any, key_cache: Any, value_cache: Any, block_tables: Any, seq_lens: Any,
        query_start_loc: Any, out: Any, partial_sums: Any, partial_stats: Any,
        num_seqs: Any, query_step: Any, table_step: Any, window: Any, scale: Any, cap: Any,
        num_splits: Any,
    ) -> None:  # fmt: skip
        ptx.wait_for_previous_kernel()
        ptx.let_next_kernel_start()
        shared_sums = cuda.shared.array(SHARED_SUMS, F32)
        shared_highest = cuda.shared.array(SHARED_STATS, F32)
        shared_mass = cuda.shared.array(SHARED_STATS, F32)
        thread = U32(cuda.threadIdx.x)
        lane, warp = thread & U32(31), thread >> U32(5)
        piece, row_in_warp = lane & U32(LANES - 1), lane >> U32(LANE_BITS)
        token = U32(cuda.blockIdx.z)
        kv_head = U32(cuda.blockIdx.y) // U32(HEAD_TILES)
        first_head = U32(
            kv_head * U32(GROUP) + (U32(cuda.blockIdx.y) % U32(HEAD_TILES)) * U32(HEADS)
        )
        heads = U32(min(U32((kv_head + U32(1)) * U32(GROUP) - first_head), U32(TILE_HEADS)))
        sequence, _, first, end = find_context(
            query_start_loc, seq_lens, U32(num_seqs), token, U32(window)
        )
        if sequence >= U32(num_seqs):
            return
        low, high = first, end
        if U32(num_splits) > U32(1):
            low = U32(max(first, U32(U32(cuda.blockIdx.x) * U32(SPLIT))))
            high = U32(min(end, U32((U32(cuda.blockIdx.x) + U32(1)) * U32(SPLIT))))
            if low >= high and U32(cuda.blockIdx.x) > U32(0):
                return
        table = U64(sequence) * U64(table_step)
        q = cuda.local.array(QUERY, F32)
        sums = cuda.local.array(QUERY, F32)
        highest = cuda.local.array(TILE_HEADS, F32)
        mass = cuda.local.array(TILE_HEADS, F32)
        keys = cuda.local.array(KEPT, F32)
        values = cuda.local.array(KEPT, F32)
        # 1 The queries, in this lane's dims.
        for h in range(TILE_HEADS):
            highest[h] = F32(NOTHING)
            mass[h] = F32(0.0)
            for i in range(KEPT):
                q[h * KEPT + i] = F32(0.0)
                sums[h * KEPT + i] = F32(0.0)
            for i in range(PER_LANE):
                column = U32(piece + U32(i * LANES))
                if column < U32(PIECES) and U32(h) < heads:
                    at = U64(U32((first_head + U32(h)) * U32(DIM) + column * U32(WIDTH)))
                    load(query, U64(token) * U64(query_step) + at, q, h * KEPT + i * WIDTH)
        start = U32(low + warp * U32(TOKENS))
        while start < high:
            # 2 A row of keys and one of values; rows past the end are never read.
            key = U32(start + row_in_warp)
            seen = key < high
            block = U64(block_tables[table + U64(U32(min(key, U32(high - U32(1)))) // U32(BLOCK))])
            at = (block * U64(BLOCK) + U64(key % U32(BLOCK))) * U64(ROW)
            at = at + U64(U32(kv_head * U32(DIM) + piece * U32(WIDTH)))
            for i in range(KEPT):
                keys[i] = F32(0.0)
                values[i] = F32(0.0)
            for i in range(PER_LANE):
                if seen and U32(piece + U32(i * LANES)) < U32(PIECES):
                    load(key_cache, at + U64(i * LANES * WIDTH), keys, i * WIDTH)
                    load(value_cache, at + U64(i * LANES * WIDTH), values, i * WIDTH)
            # 3 Scores: each lane's share of the product, then the sum over a row's lanes.
            for h in range(TILE_HEADS):
                score = F32(0.0)
                for i in range(KEPT):
                    score += keys[i] * q[h * KEPT + i]
                for i in range(LANE_BITS):
                    score += ptx.shuffle_xor(score, U32(1 << i))
                score = score * scale
                if capped:
                    score = cap * ptx.tanh(score)
                weight = F32(0.0)
                shrink = F32(1.0)
                if seen:
                    top = ptx.fmax(highest[h], score)
                    shrink = ptx.exp2(highest[h] - top)
                    weight = ptx.exp2(score - top)
                    highest[h] = top
                # 4 Weighted values.
                mass[h] = mass[h] * shrink + weight
                for i in range(KEPT):
                    sums[h * KEPT + i] = sums[h * KEPT + i] * shrink + weight * values[i]
            start = U32(start + U32(STEP))
        # 5 Merge the rows that a warp read at once, then the warps.
        for h in range(TILE_HEADS):
            top = highest[h]
            for i in range(LANE_BITS, 5):
                top = ptx.fmax(top, ptx.shuffle_xor(top, U32(1 << i)))
            shrink = ptx.exp2(highest[h] - top)
            whole = mass[h] * shrink
            for i in range(LANE_BITS, 5):
                whole += ptx.shuffle_xor(whole, U32(1 << i))
            if lane == U32(0):
                shared_highest[U32(warp * U32(TILE_HEADS) + U32(h))] = top
                shared_mass[U32(warp * U32(TILE_HEADS) + U32(h))] = whole
            for j in range(KEPT):
                value = sums[h * KEPT + j] * shrink
                for i in range(LANE_BITS, 5):
                    value += ptx.shuffle_xor(value, U32(1 << i))
                column = U32(piece + U32((j // WIDTH) * LANES))
                if row_in_warp == U32(0) and column < U32(PIECES):
                    d = U32(column * U32(WIDTH) + U32(j % WIDTH))
                    shared_sums[U32((warp * U32(TILE_HEADS) + U32(h)) * U32(DIM) + d)] = value
        cuda.syncthreads()
        one = cuda.local.array(1, F32)
        e = thread
        while e < U32(heads * U32(DIM)):
            h = U32(e // U32(DIM))
            top = F32(NOTHING)
            for w in range(WARPS):
                top = ptx.fmax(top, shared_highest[U32(h + U32(w * TILE_HEADS))])
            value = F32(0.0)
            whole = F32(0.0)
            for w in range(WARPS):
                shrink = ptx.exp2(shared_highest[U32(h + U32(w * TILE_HEADS))] - top)
                value += shared_sums[U32(e + U32(w * OUTPUTS))] * shrink
                whole += shared_mass[U32(h + U32(w * TILE_HEADS))] * shrink
            at = U64(token) * U64(NUM_Q) + U64(first_head + h)
            if U32(num_splits) == U32(1):
                one[0] = F32(0.0)
                if whole > F32(0.0):
                    one[0] = value / whole
                store_one(out, at * U64(DIM) + U64(e % U32(DIM)), one, 0)
            else:
                slot = at * U64(num_splits) + U64(cuda.blockIdx.x)
                partial_sums[slot * U64(DIM) + U64(e % U32(DIM))] = value
                if e % U32(DIM) == U32(0):
                    partial_stats[slot * U64(2)] = top
                    partial_stats[slot * U64(2) + U64(1)] = whole
            e = U32(e + U32(THREADS))

    pointer = part.pointer
    parameters = (
        *(pointer, pointer, pointer),
        *(ptx.POINTER_I32, ptx.POINTER_I32, ptx.POINTER_I32, pointer),
        *(ptx.POINTER_F32, ptx.POINTER_F32),
        *(ptx.U32, ptx.U64, ptx.U64, ptx.U32, ptx.F32, ptx.F32, ptx.U32),
    )
    return Kernel(vectors, parameters, threads=THREADS)


@functools.cache
def merge_kernel(dtype: str, NUM_Q: int, DIM: int) -> Kernel:
    """Merge the splits' partial softmaxes; grid (query heads, tokens), a dim a thread."""
    part = elements(dtype, wide=False)
    store = part.store
    PER_THREAD = -(-DIM // THREADS)

    def merge(
        partial_sums: Any, partial_stats: Any, seq_lens: Any, query_start_loc: Any, out: Any,
        num_seqs: Any, window: Any, num_splits: Any,
    ) -> None:  # fmt: skip
        ptx.wait_for_previous_kernel()
        ptx.let_next_kernel_start()
        token = U32(cuda.blockIdx.y)
        sequence, _, first, end = find_context(
            query_start_loc, seq_lens, U32(num_seqs), token, U32(window)
        )
        if sequence >= U32(num_seqs):
            return
        at = U64(token) * U64(NUM_Q) + U64(cuda.blockIdx.x)
        base = at * U64(num_splits)
        first_split = first // U32(SPLIT)
        splits = U32((end + U32(SPLIT - 1)) // U32(SPLIT))
        one = cuda.local.array(1, F32)
        for i in range(PER_THREAD):
            d = U32(U32(cuda.threadIdx.x) + U32(i * THREADS))
            if d < U32(DIM):
                highest = F32(NOTHING)
                for j in range(first_split, splits):
                    highest = ptx.fmax(highest, partial_stats[(base + U64(j)) * U64(2)])
                value = F32(0.0)
                mass = F32(0.0)
                for j in range(first_split, splits):
                    slot = base + U64(j)
                    shrink = ptx.exp2(partial_stats[slot * U64(2)] - highest)
                    mass += partial_stats[slot * U64(2) + U64(1)] * shrink
                    value += partial_sums[slot * U64(DIM) + U64(d)] * shrink
                one[0] = F32(0.0)
                if mass > F32(0.0):
                    one[0] = value / mass
                store(out, at * U64(DIM) + U64(d), one, 0)

    parameters = (
        *(ptx.POINTER_F32, ptx.POINTER_F32, ptx.POINTER_I32, ptx.POINTER_I32, part.pointer),
        *(ptx.U32, ptx.U32, ptx.U32),
    )
    return Kernel(merge, parameters, threads=THREADS)
