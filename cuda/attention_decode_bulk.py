"""Attention of single tokens, fed by Hopper's copy engine: the decode rung of sm_90.

The arithmetic is ``attention_decode``'s: S^T = K Q^T, O^T = V^T P^T with ``mma.m16n8k16``. What
differs is how keys and values arrive. One lane tells the copy engine "these 16 tokens, this head"
and the engine does the rest, so a warp keeps several tiles on their way at no cost in registers or
instructions. Every warp has a ring of its own in shared memory and waits for nobody: what is on its
way covers the folding of splits, when all warps of a block must meet.

Shared memory holds rows of 128 bytes, swizzled by the engine (16-byte piece p of row r lies at
p ^ (r % 8)), so that ``ldmatrix`` reads eight rows from eight different banks.
"""

from __future__ import annotations

import functools
from typing import Any

from numba import cuda

from . import ptx
from .attention_rows import NOTHING, find_context, find_token
from .attention_splits import HEADS, MAX_SPLITS, SHORT_SPLIT, folding, split_size
from .launch import Kernel
from .ptx import F32, U32, U64

WARPS = 4
THREADS = 32 * WARPS
RING_BYTES = 16384  # of a warp, at most


def box_slots(block_size: int) -> int:
    """Tokens that one copy brings; 0 where this rung can't serve the block size."""
    if block_size % 16 == 0:
        return 16
    return 8 if block_size == 8 else 0


def tile_tokens(head_dim: int) -> int:
    """Tokens of a warp's step: twice as many for small heads, whose tiles are soon computed."""
    return 32 if head_dim <= 64 else 16


def _stages(head_dim: int) -> int:
    return max(2, RING_BYTES // (2 * -(-head_dim // 64) * 128 * tile_tokens(head_dim)))


@functools.cache
def bulk_decode_kernel(
    dtype: str,
    NUM_KV: int,
    GROUP: int,
    DIM: int,
    BLOCK: int,
    windowed: bool,
    capped: bool,
    blocks_per_sm: int = 2,
) -> Kernel:
    """The bulk-copy decode rung for one shape of model; grid as for ``decode_kernel``."""
    HEAD_TILES = -(-GROUP // HEADS)
    TILE_HEADS = min(GROUP, HEADS)
    NUM_Q = NUM_KV * GROUP
    TILE = tile_tokens(DIM)
    SUBTILES = TILE // 16
    SCORES = 4 * SUBTILES
    ROUND = WARPS * TILE
    STAGES = _stages(DIM)
    BOX = box_slots(BLOCK)
    BOXES = TILE // BOX  # of a tile, for each half
    HALVES = -(-DIM // 64)  # of 64 dims: as wide as a box
    COPIES = 2 * HALVES * BOXES
    HALF_BYTES = TILE * 128
    STAGE_BYTES = 2 * HALVES * HALF_BYTES
    VALUES_AT = HALVES * HALF_BYTES
    STEPS = DIM // 16
    Q_WORDS, SUMS = 2 * STEPS, 4 * STEPS
    tools = folding(dtype, GROUP, DIM, WARPS)
    finish_split, finish = tools.finish_split, tools.finish
    STATE, WARP_SUMS, WARP_STATS = tools.state, tools.warp_sums, tools.warp_stats
    PER_THREAD = STATE // THREADS
    mma = {"bfloat16": ptx.mma_bf16, "float16": ptx.mma_f16}[dtype]
    pack = {"bfloat16": ptx.pack_bf16, "float16": ptx.pack_f16}[dtype]

    def next_tile(t0: Any, stop: Any, size: Any, parts: Any) -> tuple[Any, Any]:
        """The tile after ``t0`` of this warp, and the end of its split."""
        t0 = U32(t0 + U32(ROUND))
        if t0 >= stop:  # this block's splits are ``parts`` apart
            t0 = U32(t0 + U32(parts - U32(1)) * size)
            stop = U32(stop + parts * size)
        return t0, stop

    def fetch_block(block_tables: Any, table: Any, t0: Any, last: Any, lane: Any) -> Any:
        """The block of the tokens that this lane's copy will bring."""
        box = U32(U32(lane // U32(2 * HALVES)) % U32(BOXES))
        token = U32(min(U32(t0 + box * U32(BOX)), last))
        return U32(block_tables[table + U64(token // U32(BLOCK))])

    def start_copies(
        key_map: Any, value_map: Any, kv_head: Any, t0: Any, block: Any, ring: Any, barriers: Any,
        stage: Any, lane: Any,
    ) -> None:  # fmt: skip
        """Bring a tile: lane c starts copy c, of keys or values, of one half of the dims."""
        barrier = U32(barriers + stage * U32(8))
        if lane == U32(0):
            ptx.barrier_expect(barrier, U32(STAGE_BYTES))
        ptx.sync_warp()
        if lane < U32(COPIES):
            half = U32(lane % U32(HALVES))
            is_value = U32(U32(lane // U32(HALVES)) % U32(2))
            box = U32(lane // U32(2 * HALVES))
            to = U32(ring + stage * U32(STAGE_BYTES) + is_value * U32(VALUES_AT))
            to = U32(to + half * U32(HALF_BYTES) + box * U32(BOX * 128))
            slot = U32(block * U32(BLOCK) + U32(t0 + box * U32(BOX)) % U32(BLOCK))
            if is_value == U32(0):
                ptx.copy_box(to, key_map, U32(half * U32(64)), kv_head, slot, barrier)
            else:
                ptx.copy_box(to, value_map, U32(half * U32(64)), kv_head, slot, barrier)

    following_tile, block_of = ptx.device(next_tile), ptx.device(fetch_block)
    bring = ptx.device(start_copies)

    def decode(
        query: Any, key_map: Any, value_map: Any, block_tables: Any, seq_lens: Any,
        query_start_loc: Any, out: Any, partial_sums: Any, partial_stats: Any, tickets: Any,
        num_seqs: Any, per_sequence: Any, max_new_tokens: Any, query_step: Any, table_step: Any,
        window: Any,
        scale: Any, cap: Any,
    ) -> None:  # fmt: skip
        ptx.wait_for_previous_kernel()
        ptx.let_next_kernel_start()
        memory = cuda.shared.array(0, U32)
        warp_sums = cuda.shared.array(WARP_SUMS, F32)
        warp_highest = cuda.shared.array(WARP_STATS, F32)
        warp_mass = cuda.shared.array(WARP_STATS, F32)
        total = cuda.shared.array(STATE, F32)
        total_highest = cuda.shared.array(STATE, F32)
        total_mass = cuda.shared.array(STATE, F32)
        arrived = cuda.shared.array(1, U32)
        thread = U32(cuda.threadIdx.x)
        lane, warp = thread & U32(31), thread >> U32(5)
        g, t = lane >> U32(2), lane & U32(3)
        part, parts = U32(cuda.blockIdx.x), U32(cuda.gridDim.x)

        # 1 This warp's ring of tiles, each with a barrier that counts its bytes.
        base = U32(U32(ptx.shared_address(memory)) + U32(1023)) & U32(0xFFFFFC00)
        ring = U32(base + warp * U32(STAGES * STAGE_BYTES))
        barriers = U32(base + U32(WARPS * STAGES * STAGE_BYTES) + warp * U32(STAGES * 8))
        if lane == U32(0):
            for i in range(STAGES):
                ptx.barrier_init(U32(barriers + U32(8 * i)), U32(1))
            ptx.fence_barrier_init()
        ptx.sync_warp()

        # 2 Whose token this is, and which tokens of the context it sees.
        token = find_token(query_start_loc, U32(num_seqs), U32(per_sequence), U32(cuda.blockIdx.z))
        sequence, new_tokens, first, end = find_context(
            query_start_loc, seq_lens, U32(num_seqs), token, U32(window)
        )
        if sequence >= U32(num_seqs) or new_tokens > U32(max_new_tokens):
            return
        table = U64(sequence) * U64(table_step)
        tile_of_heads = U32(cuda.blockIdx.y)
        ticket = U64(cuda.blockIdx.z) * U64(NUM_KV * HEAD_TILES) + U64(tile_of_heads)
        kv_head = U32(tile_of_heads // U32(HEAD_TILES))
        head0 = U32((tile_of_heads % U32(HEAD_TILES)) * U32(HEADS))
        heads = U32(min(U32(U32(GROUP) - head0), U32(HEADS)))
        first_head = U32(kv_head * U32(GROUP) + head0)
        first_out = U64(token) * U64(NUM_Q * DIM) + U64(U32(first_head * U32(DIM)))
        if end == U32(0):
            for i in range(PER_THREAD):
                e = U32(thread + U32(i * THREADS))
                if part == U32(0) and e < U32(heads * U32(DIM)):
                    out[first_out + U64(e)] = ptx.U16(0)
            return
        size = split_size(U32(end - first))
        first_split = U32(first // size)
        splits = U32(U32(U32(end + size - U32(1)) // size) - first_split)
        blocks = U32(min(parts, splits))
        if part >= blocks:
            return

        # 3 Fill the ring. With a window, whole rounds before it are left out.
        last = U32(end - U32(1))
        t0 = U32((first_split + part) * size)
        if windowed:
            t0 = U32(max(t0, U32(U32(first // U32(ROUND)) * U32(ROUND))))
        t0 = U32(t0 + warp * U32(TILE))
        ahead = t0
        ahead_stop = U32((first_split + part + U32(1)) * size)
        for i in range(STAGES):
            if ahead < end:
                block = block_of(block_tables, table, ahead, last, lane)
                bring(key_map, value_map, kv_head, ahead, block, ring, barriers, U32(i), lane)
            ahead, ahead_stop = following_tile(ahead, ahead_stop, size, parts)
        block = block_of(block_tables, table, ahead, last, lane)

        # 4 The queries: columns of the product, one head each.
        q = cuda.local.array(Q_WORDS, U32)
        for i in range(Q_WORDS):
            q[i] = U32(0)
        if g < heads:
            at = U64(token) * U64(query_step) + U64(
                U32(U32(first_head + g) * U32(DIM) + t * U32(2))
            )
            for k in range(STEPS):
                q[2 * k] = ptx.load4(query, at + U64(16 * k))
                q[2 * k + 1] = ptx.load4(query, at + U64(16 * k + 8))
        sums = cuda.local.array(SUMS, F32)
        scores = cuda.local.array(SCORES, F32)
        for i in range(PER_THREAD):
            total[U32(thread + U32(i * THREADS))] = F32(0.0)
            total_highest[U32(thread + U32(i * THREADS))] = F32(NOTHING)
            total_mass[U32(thread + U32(i * THREADS))] = F32(0.0)
        # What this lane names for ldmatrix: row r of matrix i, for lane 8 i + r.
        r, i0, i1 = lane & U32(7), U32(lane >> U32(3)) & U32(1), lane >> U32(4)
        key_row = U32((r + i0 * U32(8)) * U32(128))
        value_row = U32((r + i1 * U32(8)) * U32(128))
        stage = U32(0)
        parity = U32(0)

        split = part
        while split < splits:
            stop = U32(min(U32((first_split + split + U32(1)) * size), end))
            highest0 = F32(NOTHING)
            highest1 = F32(NOTHING)
            mass0 = F32(0.0)
            mass1 = F32(0.0)
            for i in range(SUMS):
                sums[i] = F32(0.0)
            while t0 < stop:
                ptx.barrier_wait(U32(barriers + stage * U32(8)), parity)
                keys = U32(ring + stage * U32(STAGE_BYTES))
                values = U32(keys + U32(VALUES_AT))
                if U32(t0 + U32(TILE)) > first:
                    # 5 Scores of TILE tokens (rows) for 8 heads (columns).
                    for i in range(SCORES):
                        scores[i] = F32(0.0)
                    for k in range(STEPS):
                        piece = U32(U32(2 * (k % 4)) + i1) ^ r
                        at = U32(keys + U32((k // 4) * HALF_BYTES) + key_row + piece * U32(16))
                        for u in range(SUBTILES):
                            a = ptx.load_matrix(U32(at + U32(u * 2048)))
                            mma(scores, 4 * u, a[0], a[1], a[2], a[3], q[2 * k], q[2 * k + 1])
                    # 6 Scale, cap and mask. Rows that may not be seen may hold anything, NaN too,
                    #   and 0 times NaN is NaN: their values are cleared.
                    for i in range(SCORES):
                        if capped:
                            scores[i] = cap * ptx.tanh(scores[i] * scale)
                        else:
                            scores[i] = scores[i] * scale
                    if t0 < first or U32(t0 + U32(TILE)) > end:
                        for i in range(SCORES):
                            key = U32(t0 + g + U32(16 * (i // 4) + 8 * ((i // 2) % 2)))
                            if key < first or key >= end:
                                scores[i] = F32(NOTHING)
                        for u in range(SUBTILES):
                            row = U32(U32(lane & U32(15)) + U32(16 * u))
                            if U32(t0 + row) < first or U32(t0 + row) >= end:
                                for i in range(4 * HALVES):
                                    clear = U32(U32(i * 2) + i1)  # of the 8 pieces of each half
                                    to = U32(values + U32(clear >> U32(3)) * U32(HALF_BYTES))
                                    to = U32(to + row * U32(128) + (clear & U32(7)) * U32(16))
                                    ptx.store16_shared(to, U32(0), U32(0), U32(0), U32(0))
                        ptx.fence_async_shared()
                        ptx.sync_warp()
                    top0 = highest0
                    top1 = highest1
                    for u in range(SUBTILES):
                        top0 = ptx.fmax(top0, ptx.fmax(scores[4 * u], scores[4 * u + 2]))
                        top1 = ptx.fmax(top1, ptx.fmax(scores[4 * u + 1], scores[4 * u + 3]))
                    for i in range(2, 5):
                        top0 = ptx.fmax(top0, ptx.shuffle_xor(top0, U32(1 << i)))
                        top1 = ptx.fmax(top1, ptx.shuffle_xor(top1, U32(1 << i)))
                    keep0 = ptx.exp2(highest0 - top0)
                    keep1 = ptx.exp2(highest1 - top1)
                    highest0 = top0
                    highest1 = top1
                    mass0 = mass0 * keep0
                    mass1 = mass1 * keep1
                    for i in range(STEPS):
                        sums[4 * i] *= keep0
                        sums[4 * i + 1] *= keep1
                        sums[4 * i + 2] *= keep0
                        sums[4 * i + 3] *= keep1
                    # 7 Values times probabilities, which are transposed in registers.
                    for u in range(SUBTILES):
                        p0 = ptx.exp2(scores[4 * u] - top0)
                        p1 = ptx.exp2(scores[4 * u + 1] - top1)
                        p2 = ptx.exp2(scores[4 * u + 2] - top0)
                        p3 = ptx.exp2(scores[4 * u + 3] - top1)
                        mass0 += p0 + p2
                        mass1 += p1 + p3
                        b0 = ptx.transpose8x8(pack(p0, p1))
                        b1 = ptx.transpose8x8(pack(p2, p3))
                        for k in range(STEPS):
                            piece = U32(U32(2 * (k % 4)) + i0) ^ r
                            at = U32(values + U32((k // 4) * HALF_BYTES + u * 2048) + value_row)
                            a = ptx.load_matrix_transposed(U32(at + piece * U32(16)))
                            mma(sums, 4 * k, a[0], a[1], a[2], a[3], b0, b1)
                # 8 This tile's place is free for the one that comes STAGES later.
                ptx.sync_warp()
                if ahead < end:
                    bring(key_map, value_map, kv_head, ahead, block, ring, barriers, stage, lane)
                    ahead, ahead_stop = following_tile(ahead, ahead_stop, size, parts)
                    block = block_of(block_tables, table, ahead, last, lane)
                t0 = U32(t0 + U32(ROUND))
                stage = U32(stage + U32(1))
                if stage == U32(STAGES):
                    stage = U32(0)
                    parity = parity ^ U32(1)

            # 9 The split is read: merge its warps, then fold it or hand it in.
            for i in range(2, 5):
                mass0 += ptx.shuffle_xor(mass0, U32(1 << i))
                mass1 += ptx.shuffle_xor(mass1, U32(1 << i))
            cuda.syncthreads()
            column = U32(warp * U32(HEADS) + t * U32(2))
            if g == U32(0):
                warp_highest[column] = highest0
                warp_highest[U32(column + U32(1))] = highest1
                warp_mass[column] = mass0
                warp_mass[U32(column + U32(1))] = mass1
            for j in range(2):
                if U32(t * U32(2) + U32(j)) < U32(TILE_HEADS):
                    d = U32(U32(warp * U32(TILE_HEADS) + t * U32(2) + U32(j)) * U32(DIM) + g)
                    for k in range(STEPS):
                        warp_sums[U32(d + U32(16 * k))] = sums[4 * k + j]
                        warp_sums[U32(d + U32(16 * k + 8))] = sums[4 * k + 2 + j]
            cuda.syncthreads()
            finish_split(
                thread, warp_sums, warp_highest, warp_mass, total, total_highest, total_mass,
                blocks == U32(1), ticket * U64(MAX_SPLITS) + U64(split),
                partial_sums, partial_stats,
            )  # fmt: skip
            split = U32(split + parts)
            t0 = U32(t0 + U32(parts - U32(1)) * size)
        # 10 The result: at once, or by the last of the blocks that shared it.
        finish(
            thread, total, total_mass, arrived, blocks, splits, ticket, tickets,
            partial_sums, partial_stats, heads, out, first_out,
        )  # fmt: skip

    if SHORT_SPLIT % ROUND:
        raise ValueError(f"splits of {SHORT_SPLIT} tokens must be whole rounds of {ROUND}")
    half = ptx.POINTER_U16
    parameters = (
        *(half, ptx.POINTER_MAP, ptx.POINTER_MAP),
        *(ptx.POINTER_I32, ptx.POINTER_I32, ptx.POINTER_I32, half),
        *(ptx.POINTER_F32, ptx.POINTER_F32, ptx.POINTER_U32),
        *(ptx.U32, ptx.U32, ptx.U32, ptx.U64, ptx.U64, ptx.U32, ptx.F32, ptx.F32),
    )
    return Kernel(
        decode,
        parameters,
        threads=THREADS,
        blocks_per_sm=blocks_per_sm,
        shared_bytes=1024 + WARPS * STAGES * (STAGE_BYTES + 8),
    )
