"""Attention of single tokens on the tensor cores, split over the context: the decode rung.

The bound is reading keys and values once, so everything serves keeping loads in flight:

- All query heads of a key-value head share one read. S^T = K Q^T and O^T = V^T P^T put the (at
  most 8) heads on the 8-wide side of ``mma.m16n8k16`` and 16 tokens on the other.
- Keys and values go from memory straight into the fragment registers, 16 bytes a load, with no
  shared memory between. A fragment wants other dims than 16 bytes hold in a row; since a dot
  product does not care in which order dims are summed, both sides take them permuted alike.
- The next tile's keys and the table entry after it are fetched while this tile is computed.
"""

from __future__ import annotations

import functools
from typing import Any

from numba import cuda

from . import ptx
from .attention_rows import NOTHING, find_context, find_token
from .attention_splits import HEADS, MAX_SPLITS, folding, split_size
from .launch import Kernel
from .ptx import F32, U32, U64

WARPS = 4
THREADS = 32 * WARPS


@functools.cache
def decode_kernel(
    dtype: str,
    NUM_KV: int,
    GROUP: int,
    DIM: int,
    BLOCK: int,
    windowed: bool,
    capped: bool,
    blocks_per_sm: int = 3,
) -> Kernel:
    """The decode rung for one shape of model; grid ``(parts, NUM_KV * head tiles, tokens)``.

    Args:
        dtype: ``"bfloat16"`` or ``"float16"``.
        NUM_KV: key-value heads.
        GROUP: query heads of each.
        DIM: head size, a multiple of 8 up to 256.
        BLOCK: tokens of a cache block.
        windowed: whether there is a sliding window.
        capped: whether logits are soft-capped.
        blocks_per_sm: blocks to fit on a multiprocessor.
    """
    HEAD_TILES = -(-GROUP // HEADS)
    TILE_HEADS = min(GROUP, HEADS)
    NUM_Q = NUM_KV * GROUP
    SUBTILES = 2 if DIM <= 64 else 1  # of 16 tokens, in one step of a warp
    TILE = 16 * SUBTILES
    ROUND = WARPS * TILE
    K_CHUNKS, V_CHUNKS = -(-DIM // 32), -(-DIM // 64)
    ROW = NUM_KV * DIM
    WHOLE_TILES = BLOCK % 16 == 0  # 16 tokens lie in one block
    Q_WORDS, K_WORDS, V_WORDS = 4 * K_CHUNKS, 8 * K_CHUNKS * SUBTILES, 16 * V_CHUNKS * SUBTILES
    SUMS, SCORES = 16 * V_CHUNKS, 4 * SUBTILES
    tools = folding(dtype, GROUP, DIM, WARPS)
    finish_split, finish = tools.finish_split, tools.finish
    STATE, WARP_SUMS, WARP_STATS = tools.state, tools.warp_sums, tools.warp_stats
    PER_THREAD = STATE // THREADS
    mma = {"bfloat16": ptx.mma_bf16, "float16": ptx.mma_f16}[dtype]
    pack = {"bfloat16": ptx.pack_bf16, "float16": ptx.pack_f16}[dtype]

    def find_rows(block_tables: Any, table: Any, t0: Any, last: Any, lane: Any) -> Any:
        """What tells where 16 tokens lie: their block, or (small blocks) each lane's own slot."""
        if WHOLE_TILES:
            return U32(block_tables[table + U64(U32(min(t0, last)) // U32(BLOCK))])
        token = U32(min(U32(t0 + (lane & U32(15))), last))
        block = U32(block_tables[table + U64(token // U32(BLOCK))])
        return U32(block * U32(BLOCK) + token % U32(BLOCK))

    def row(where: Any, t0: Any, r: Any) -> Any:
        """Element offset of token ``t0 + r``."""
        if WHOLE_TILES:
            return U64(U64(where) * U64(BLOCK) + U64(U32(t0 % U32(BLOCK)) + r)) * U64(ROW)
        return U64(ptx.shuffle(where, r)) * U64(ROW)

    rows_of, row_of = ptx.device(find_rows), ptx.device(row)

    def load_keys(key_cache: Any, head: Any, where: Any, t0: Any, lane: Any, keys: Any) -> None:
        column = U64(head) + U64((lane & U32(3)) * U32(8))
        for u in range(SUBTILES):
            first = U32(t0 + U32(16 * u))
            upper = row_of(U32(where[u]), first, lane >> U32(2)) + column
            lower = row_of(U32(where[u]), first, U32((lane >> U32(2)) + U32(8))) + column
            for c in range(K_CHUNKS):
                k = (u * K_CHUNKS + c) * 8
                if DIM % 32 == 0 or U32(c * 32) + (lane & U32(3)) * U32(8) < U32(DIM):
                    x = ptx.load16(key_cache, upper + U64(c * 32))
                    y = ptx.load16(key_cache, lower + U64(c * 32))
                    for i in range(4):
                        keys[k + i] = x[i]
                        keys[k + 4 + i] = y[i]

    def load_values(
        value_cache: Any, head: Any, where: Any, t0: Any, lane: Any, values: Any
    ) -> None:
        column = U64(head) + U64((lane >> U32(2)) * U32(8))
        pair = U32((lane & U32(3)) * U32(2))
        for u in range(SUBTILES):
            first = U32(t0 + U32(16 * u))
            for r in range(4):  # rows 2t, 2t + 1, 2t + 8, 2t + 9
                offset = U32(pair + U32((r & 1) + 8 * (r >> 1)))
                at = row_of(U32(where[u]), first, offset) + column
                for c in range(V_CHUNKS):
                    v = (u * V_CHUNKS + c) * 16 + r * 4
                    if DIM % 64 == 0 or U32(c * 64) + (lane >> U32(2)) * U32(8) < U32(DIM):
                        x = ptx.load16(value_cache, at + U64(c * 64))
                        for i in range(4):
                            values[v + i] = x[i]

    def clear_unseen_values(values: Any, t0: Any, first: Any, end: Any, lane: Any) -> None:
        """Rows that may not be seen may hold anything, NaN too, and 0 times NaN is NaN."""
        for u in range(SUBTILES):
            for r in range(4):
                token = U32(t0 + (lane & U32(3)) * U32(2) + U32(16 * u + (r & 1) + 8 * (r >> 1)))
                if token < first or token >= end:
                    for c in range(V_CHUNKS):
                        for i in range(4):
                            values[(u * V_CHUNKS + c) * 16 + r * 4 + i] = U32(0)

    load_key_tile, load_value_tile = ptx.device(load_keys), ptx.device(load_values)
    clear_unseen = ptx.device(clear_unseen_values)

    def decode(
        query: Any,
        key_cache: Any,
        value_cache: Any,
        block_tables: Any,
        seq_lens: Any,
        query_start_loc: Any,
        out: Any,
        partial_sums: Any,
        partial_stats: Any,
        tickets: Any,
        num_seqs: Any,
        per_sequence: Any,
        max_new_tokens: Any,
        query_step: Any,
        table_step: Any,
        window: Any,
        scale: Any,
        cap: Any,
    ) -> None:
        ptx.wait_for_previous_kernel()
        ptx.let_next_kernel_start()
        # Shared memory first: one array a line, so that the simulator tells them apart.
        warp_sums = cuda.shared.array(WARP_SUMS, F32)
        warp_highest = cuda.shared.array(WARP_STATS, F32)
        warp_mass = cuda.shared.array(WARP_STATS, F32)
        total = cuda.shared.array(STATE, F32)
        total_highest = cuda.shared.array(STATE, F32)
        total_mass = cuda.shared.array(STATE, F32)
        arrived = cuda.shared.array(1, U32)
        thread = U32(cuda.threadIdx.x)
        lane = thread & U32(31)
        warp = thread >> U32(5)
        g, t = lane >> U32(2), lane & U32(3)

        # 1 Whose token this is, and which tokens of the context it sees.
        token = find_token(query_start_loc, U32(num_seqs), U32(per_sequence), U32(cuda.blockIdx.z))
        sequence, new_tokens, first, end = find_context(
            query_start_loc, seq_lens, U32(num_seqs), token, U32(window)
        )
        part = U32(cuda.blockIdx.x)
        if sequence >= U32(num_seqs) or new_tokens > U32(max_new_tokens):
            return
        table = U64(sequence) * U64(table_step)

        tile_of_heads = U32(cuda.blockIdx.y)
        ticket = U64(cuda.blockIdx.z) * U64(NUM_KV * HEAD_TILES) + U64(tile_of_heads)
        kv_head = U32(tile_of_heads // U32(HEAD_TILES))
        head0 = U32((tile_of_heads % U32(HEAD_TILES)) * U32(HEADS))
        heads = U32(min(U32(U32(GROUP) - head0), U32(HEADS)))
        first_head = U32(kv_head * U32(GROUP) + head0)
        first_out = U64(token) * U64(NUM_Q * DIM) + U64(first_head * U32(DIM))
        if end == U32(0):
            for i in range(PER_THREAD):
                e = U32(thread + U32(i * THREADS))
                if part == U32(0) and e < U32(heads * U32(DIM)):
                    out[first_out + U64(e)] = ptx.U16(0)
            return

        # 2 This block's run of splits.
        size = split_size(U32(end - first))
        first_split = first // size
        splits = U32((end + size - U32(1)) // size - first_split)
        per_block = U32((splits + U32(cuda.gridDim.x) - U32(1)) // U32(cuda.gridDim.x))
        blocks = U32((splits + per_block - U32(1)) // per_block)
        if part >= blocks:
            return
        split = U32(part * per_block)
        split_end = U32(min(U32(split + per_block), splits))

        # 3 The queries, once, in the order of dims that the keys will have.
        head = U32(kv_head * U32(DIM))
        q = cuda.local.array(Q_WORDS, U32)
        for i in range(Q_WORDS):
            q[i] = U32(0)
        if g < heads:
            at = U64(token) * U64(query_step) + U64(U32(first_head + g) * U32(DIM) + t * U32(8))
            for c in range(K_CHUNKS):
                if DIM % 32 == 0 or U32(c * 32) + t * U32(8) < U32(DIM):
                    x = ptx.load16(query, at + U64(c * 32))
                    for i in range(4):
                        q[4 * c + i] = x[i]
        sums = cuda.local.array(SUMS, F32)
        scores = cuda.local.array(SCORES, F32)
        keys = cuda.local.array(K_WORDS, U32)
        values = cuda.local.array(V_WORDS, U32)
        where = cuda.local.array(SUBTILES, U32)
        where_next = cuda.local.array(SUBTILES, U32)
        for i in range(K_WORDS):
            keys[i] = U32(0)
        for i in range(V_WORDS):
            values[i] = U32(0)
        for i in range(PER_THREAD):
            total[thread + U32(i * THREADS)] = F32(0.0)
            total_highest[thread + U32(i * THREADS)] = F32(NOTHING)
            total_mass[thread + U32(i * THREADS)] = F32(0.0)

        # 4 Fetch the first tile's keys. With a window, whole rounds before it are left out.
        last = U32(end - U32(1))
        t0 = U32(max(U32((first_split + split) * size), U32(first // U32(ROUND)) * U32(ROUND)))
        t0 = U32(t0 + warp * U32(TILE))
        for u in range(SUBTILES):
            where[u] = rows_of(block_tables, table, U32(t0 + U32(16 * u)), last, lane)
            where_next[u] = rows_of(block_tables, table, U32(t0 + U32(ROUND + 16 * u)), last, lane)
        load_key_tile(key_cache, head, where, t0, lane, keys)

        while split < split_end:
            stop = U32(min(U32((first_split + split + U32(1)) * size), end))
            highest0, highest1 = F32(NOTHING), F32(NOTHING)
            mass0, mass1 = F32(0.0), F32(0.0)
            for i in range(SUMS):
                sums[i] = F32(0.0)
            while t0 < stop:
                seen = U32(t0 + U32(TILE)) > first
                # 5 Scores of TILE tokens (rows) for 8 heads (columns); meanwhile values come in.
                load_value_tile(value_cache, head, where, t0, lane, values)
                for i in range(SCORES):
                    scores[i] = F32(0.0)
                for u in range(SUBTILES):
                    for c in range(K_CHUNKS):
                        k = (u * K_CHUNKS + c) * 8
                        mma(scores, 4 * u, keys[k], keys[k + 4], keys[k + 1], keys[k + 5],
                            q[4 * c], q[4 * c + 1])  # fmt: skip
                        mma(scores, 4 * u, keys[k + 2], keys[k + 6], keys[k + 3], keys[k + 7],
                            q[4 * c + 2], q[4 * c + 3])  # fmt: skip
                # 6 The next tile's keys, and the table entries of the one after it.
                following = U32(t0 + U32(ROUND))
                for u in range(SUBTILES):
                    where[u] = where_next[u]
                load_key_tile(key_cache, head, where, following, lane, keys)
                for u in range(SUBTILES):
                    ahead = U32(following + U32(ROUND + 16 * u))
                    where_next[u] = rows_of(block_tables, table, ahead, last, lane)
                if seen:
                    # 7 Scale, cap and mask; the tile's maximum for each head.
                    for i in range(SCORES):
                        if capped:
                            scores[i] = cap * ptx.tanh(scores[i] * scale)
                        else:
                            scores[i] = scores[i] * scale
                    if t0 < first or U32(t0 + U32(TILE)) > end:
                        clear_unseen(values, t0, first, end, lane)
                        for i in range(SCORES):
                            key = U32(t0 + g + U32(16 * (i // 4) + 8 * ((i // 2) % 2)))
                            if key < first or key >= end:
                                scores[i] = F32(NOTHING)
                    top0, top1 = highest0, highest1
                    for u in range(SUBTILES):
                        top0 = ptx.fmax(top0, ptx.fmax(scores[4 * u], scores[4 * u + 2]))
                        top1 = ptx.fmax(top1, ptx.fmax(scores[4 * u + 1], scores[4 * u + 3]))
                    for i in range(2, 5):
                        top0 = ptx.fmax(top0, ptx.shuffle_xor(top0, U32(1 << i)))
                        top1 = ptx.fmax(top1, ptx.shuffle_xor(top1, U32(1 << i)))
                    keep0, keep1 = ptx.exp2(highest0 - top0), ptx.exp2(highest1 - top1)
                    highest0, highest1 = top0, top1
                    mass0, mass1 = mass0 * keep0, mass1 * keep1
                    for i in range(V_CHUNKS * 4):
                        sums[4 * i] *= keep0
                        sums[4 * i + 1] *= keep1
                        sums[4 * i + 2] *= keep0
                        sums[4 * i + 3] *= keep1
                    # 8 Probabilities, transposed in registers; then values times probabilities.
                    for u in range(SUBTILES):
                        p0 = ptx.exp2(scores[4 * u] - highest0)
                        p1 = ptx.exp2(scores[4 * u + 1] - highest1)
                        p2 = ptx.exp2(scores[4 * u + 2] - highest0)
                        p3 = ptx.exp2(scores[4 * u + 3] - highest1)
                        mass0 += p0 + p2
                        mass1 += p1 + p3
                        b0 = ptx.transpose8x8(pack(p0, p1))
                        b1 = ptx.transpose8x8(pack(p2, p3))
                        for c in range(V_CHUNKS):
                            v = (u * V_CHUNKS + c) * 16
                            for i in range(4):
                                x, y = values[v + i], values[v + 4 + i]
                                a0 = ptx.byte_permute(x, y, U32(0x5410))
                                a1 = ptx.byte_permute(x, y, U32(0x7632))
                                x, y = values[v + 8 + i], values[v + 12 + i]
                                a2 = ptx.byte_permute(x, y, U32(0x5410))
                                a3 = ptx.byte_permute(x, y, U32(0x7632))
                                mma(sums, 16 * c + 4 * i, a0, a1, a2, a3, b0, b1)
                t0 = following

            # 9 The split is read: merge its warps, then fold it or hand it in.
            for i in range(2, 5):
                mass0 += ptx.shuffle_xor(mass0, U32(1 << i))
                mass1 += ptx.shuffle_xor(mass1, U32(1 << i))
            cuda.syncthreads()
            column = U32(warp * U32(HEADS) + t * U32(2))
            if g == U32(0):
                warp_highest[column] = highest0
                warp_highest[column + U32(1)] = highest1
                warp_mass[column] = mass0
                warp_mass[column + U32(1)] = mass1
            for j in range(2):
                if U32(t * U32(2) + U32(j)) < U32(TILE_HEADS):
                    d = U32(
                        U32(warp * U32(TILE_HEADS) + t * U32(2) + U32(j)) * U32(DIM) + g * U32(8)
                    )
                    for c in range(V_CHUNKS):
                        if DIM % 64 == 0 or U32(c * 64) + g * U32(8) < U32(DIM):
                            for i in range(4):
                                at = U32(d + U32(c * 64 + 2 * i))
                                warp_sums[at] = sums[16 * c + 4 * i + j]
                                warp_sums[U32(at + U32(1))] = sums[16 * c + 4 * i + 2 + j]
            cuda.syncthreads()
            finish_split(
                thread, warp_sums, warp_highest, warp_mass, total, total_highest, total_mass,
                blocks == U32(1), ticket * U64(MAX_SPLITS) + U64(split),
                partial_sums, partial_stats,
            )  # fmt: skip
            split = U32(split + U32(1))

        # 10 The result: at once, or by the last of the blocks that shared it.
        finish(
            thread, total, total_mass, arrived, blocks, splits, ticket, tickets,
            partial_sums, partial_stats, heads, out, first_out,
        )  # fmt: skip

    half = ptx.POINTER_U16
    parameters = (
        *(half, half, half, ptx.POINTER_I32, ptx.POINTER_I32, ptx.POINTER_I32, half),
        *(ptx.POINTER_F32, ptx.POINTER_F32, ptx.POINTER_U32),
        *(ptx.U32, ptx.U32, ptx.U32, ptx.U64, ptx.U64, ptx.U32, ptx.F32, ptx.F32),
    )
    return Kernel(decode, parameters, threads=THREADS, blocks_per_sm=blocks_per_sm)
