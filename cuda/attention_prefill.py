"""Attention of many new tokens on the tensor cores, tile by tile: the prefill rung (sm_80 and up).

FlashAttention-2 (Dao, 2023) over pages. A thread block holds 64 or 128 queries of one head in
shared memory and walks the context in tiles of 64 tokens, newest first; scores stay in registers
from the first product (queries times keys) to the second (weights times values). While one product
runs, the operands of the next are on their way from memory (``cp.async``), and pages are followed
per row, so any block size will do. Rows of shared memory are padded by 16 bytes: eight rows then
lie in eight different banks, which is what ``ldmatrix`` asks for.

A tile in which a query sees nothing leaves its sums as they are, to the bit; so how queries are cut
into blocks does not show in the result.
"""

from __future__ import annotations

import functools
from typing import Any

from numba import cuda

from . import ptx
from .attention_rows import NOTHING, UNSEEN
from .launch import Kernel
from .ptx import F32, U32, U64

WARPS = 4
THREADS = 32 * WARPS
KEYS = 64  # tokens of a key tile


def rows_of_tile(head_dim: int) -> int:
    """Queries of a thread block: 32 a warp, 16 where sums of large heads fill the registers."""
    return WARPS * (32 if head_dim <= 128 else 16)


def tile_of(query_start_loc: Any, num_seqs: Any, tile: Any, rows: Any) -> tuple[Any, Any]:
    """The sequence of a tile of ``rows`` queries, and the tile's number in it.

    Sequence s owns tiles from ``query_start_loc[s] // rows + s`` on: room enough for its last,
    partly filled tile, so that no sums over sequences are needed; some tiles are then empty.
    """
    low, high = U32(0), num_seqs
    while U32(low + U32(1)) < high:
        middle = U32((low + high) // U32(2))
        if U32(U32(query_start_loc[U64(middle)]) // rows + middle) <= tile:
            low = middle
        else:
            high = middle
    return low, U32(tile - U32(U32(query_start_loc[U64(low)]) // rows + low))


find_tile = ptx.device(tile_of)


@functools.cache
def prefill_kernel(
    dtype: str, NUM_KV: int, GROUP: int, DIM: int, BLOCK: int, windowed: bool, capped: bool
) -> Kernel:
    """The prefill rung for one shape of model; grid (query heads, tiles of queries).

    Args:
        dtype: ``"bfloat16"`` or ``"float16"``.
        NUM_KV: key-value heads.
        GROUP: query heads of each.
        DIM: head size, a multiple of 16 up to 256.
        BLOCK: tokens of a cache block.
        windowed: whether there is a sliding window.
        capped: whether logits are soft-capped.
    """
    ROWS = rows_of_tile(DIM)
    STRIPS = ROWS // (16 * WARPS)  # of 16 queries, a warp
    NUM_Q = NUM_KV * GROUP
    STRIDE = 2 * DIM + 16  # bytes of a row in shared memory
    PIECES = DIM // 8  # of 16 bytes, a row
    Q_PASSES = ROWS * PIECES // THREADS
    K_PASSES = KEYS * PIECES // THREADS
    Q_BYTES, K_BYTES = ROWS * STRIDE, KEYS * STRIDE
    K_STEPS, D_TILES, K_TILES = DIM // 16, DIM // 8, KEYS // 8
    SUMS, SCORES, STATS = STRIPS * D_TILES * 4, STRIPS * K_TILES * 4, STRIPS * 2
    SLOTS = 2 * KEYS
    ROW = NUM_KV * DIM
    mma = {"bfloat16": ptx.mma_bf16, "float16": ptx.mma_f16}[dtype]
    pack = {"bfloat16": ptx.pack_bf16, "float16": ptx.pack_f16}[dtype]

    def find_slots(
        block_tables: Any, table: Any, tile: Any, thread: Any, end: Any, slots: Any
    ) -> None:
        """The cache slots of a key tile's rows, for all threads; two tiles have room."""
        if thread < U32(KEYS):
            key = U32(min(U32(tile * U32(KEYS) + thread), U32(end - U32(1))))
            block = U32(block_tables[table + U64(key // U32(BLOCK))])
            at = U32((tile & U32(1)) * U32(KEYS) + thread)
            slots[at] = U32(block * U32(BLOCK) + key % U32(BLOCK))

    def copy_rows(
        cache: Any, head: Any, to: Any, tile: Any, thread: Any, end: Any, slots: Any
    ) -> None:
        """Start copying a key or value tile; rows past the end become zeros."""
        for p in range(K_PASSES):
            i = U32(thread + U32(p * THREADS))
            row = U32(i // U32(PIECES))
            piece = U32(i % U32(PIECES))
            num_bytes = U32(16) if U32(tile * U32(KEYS) + row) < end else U32(0)
            slot = U64(slots[U32((tile & U32(1)) * U32(KEYS) + row)])
            at = slot * U64(ROW) + U64(head) + U64(piece * U32(8))
            ptx.copy16_async(U32(to + row * U32(STRIDE) + piece * U32(16)), cache, at, num_bytes)

    look_up, copy_tile = ptx.device(find_slots), ptx.device(copy_rows)

    def prefill(
        query: Any, key_cache: Any, value_cache: Any, block_tables: Any, seq_lens: Any,
        query_start_loc: Any, out: Any,
        num_seqs: Any, max_decode_tokens: Any, query_step: Any, table_step: Any, window: Any,
        scale: Any, cap: Any,
    ) -> None:  # fmt: skip
        ptx.wait_for_previous_kernel()
        ptx.let_next_kernel_start()
        thread = U32(cuda.threadIdx.x)
        lane, warp = thread & U32(31), thread >> U32(5)
        query_head = U32(cuda.blockIdx.x)
        head = U32((query_head // U32(GROUP)) * U32(DIM))

        # 1 Which queries these are. Last tiles first: they see the most, so they should not be
        #   what is left at the end.
        number = U32(U32(cuda.gridDim.y) - U32(cuda.blockIdx.y) - U32(1))
        sequence, tile = find_tile(query_start_loc, U32(num_seqs), number, U32(ROWS))
        start = U32(query_start_loc[U64(sequence)])
        new_tokens = U32(U32(query_start_loc[U64(sequence) + U64(1)]) - start)
        q0 = U32(tile * U32(ROWS))
        if q0 >= new_tokens or new_tokens <= U32(max_decode_tokens):
            return
        length = U32(seq_lens[U64(sequence)])
        if length == U32(0):
            for p in range(Q_PASSES):
                i = U32(thread + U32(p * THREADS))
                row = U32(q0 + i // U32(PIECES))
                if row < new_tokens:
                    at = U64(U32(start + row)) * U64(NUM_Q * DIM)
                    at = at + U64(U32(query_head * U32(DIM) + (i % U32(PIECES)) * U32(8)))
                    ptx.store16(out, at, U32(0), U32(0), U32(0), U32(0))
            return
        before = U32(length - new_tokens)
        end = U32(min(U32(before + q0 + U32(ROWS)), length))  # keys that any query here sees
        first = U32(0)
        if windowed and U32(before + q0 + U32(1)) > U32(window):
            first = U32(before + q0 + U32(1) - U32(window))
        table = U64(sequence) * U64(table_step)

        # 2 Queries and the newest keys start on their way to shared memory.
        memory = cuda.shared.array(0, U32)
        slots = cuda.shared.array(SLOTS, U32)
        q_at = U32(ptx.shared_address(memory))
        k_at = U32(q_at + U32(Q_BYTES))
        v_at = U32(k_at + U32(K_BYTES))
        for p in range(Q_PASSES):
            i = U32(thread + U32(p * THREADS))
            row = U32(i // U32(PIECES))
            piece = U32(i % U32(PIECES))
            token = U64(U32(start + min(U32(q0 + row), U32(new_tokens - U32(1)))))
            at = token * U64(query_step) + U64(U32(query_head * U32(DIM) + piece * U32(8)))
            ptx.copy16_async(U32(q_at + row * U32(STRIDE) + piece * U32(16)), query, at, U32(16))
        key_tile = U32((end + U32(KEYS - 1)) // U32(KEYS))
        last_tile = first // U32(KEYS)
        look_up(block_tables, table, U32(key_tile - U32(1)), thread, end, slots)
        cuda.syncthreads()
        copy_tile(key_cache, head, k_at, U32(key_tile - U32(1)), thread, end, slots)
        ptx.copy_commit()

        sums = cuda.local.array(SUMS, F32)
        scores = cuda.local.array(SCORES, F32)
        highest = cuda.local.array(STATS, F32)
        mass = cuda.local.array(STATS, F32)
        for i in range(SUMS):
            sums[i] = F32(0.0)
        for i in range(STATS):
            highest[i] = F32(NOTHING)
            mass[i] = F32(0.0)
        # Where this lane's rows lie for ldmatrix: lane 8 i + r names row r of 8 x 8 matrix i.
        lane_row, lane_column = U32(lane & U32(15)), U32((lane >> U32(4)) * U32(16))
        q_lane = U32(q_at + (warp * U32(16 * STRIPS) + lane_row) * U32(STRIDE) + lane_column)
        k_row = U32((lane & U32(7)) + ((lane >> U32(4)) << U32(3)))
        k_lane = U32(k_at + k_row * U32(STRIDE) + ((lane >> U32(3)) & U32(1)) * U32(16))
        v_lane = U32(v_at + lane_row * U32(STRIDE) + lane_column)
        position = U32(before + q0 + warp * U32(16 * STRIPS))  # of the warp's first query
        row0 = U32(position + (lane >> U32(2)))
        column0 = U32((lane & U32(3)) * U32(2))

        while key_tile > last_tile:
            key_tile = U32(key_tile - U32(1))
            # 3 Keys are here; values start on their way; slots of the next keys are looked up.
            ptx.copy_wait_all()
            cuda.syncthreads()
            copy_tile(value_cache, head, v_at, key_tile, thread, end, slots)
            ptx.copy_commit()
            if key_tile > last_tile:
                look_up(block_tables, table, U32(key_tile - U32(1)), thread, end, slots)
            # 4 Scores: queries times keys.
            for i in range(SCORES):
                scores[i] = F32(0.0)
            for k in range(K_STEPS):
                a = ptx.load_matrix(U32(q_lane + U32(32 * k)))
                if STRIPS == 2:
                    b = ptx.load_matrix(U32(q_lane + U32(32 * k + 16 * STRIDE)))
                for n in range(K_TILES // 2):
                    x = ptx.load_matrix(U32(k_lane + U32(32 * k + 16 * n * STRIDE)))
                    mma(scores, n * 8, a[0], a[1], a[2], a[3], x[0], x[1])
                    mma(scores, n * 8 + 4, a[0], a[1], a[2], a[3], x[2], x[3])
                    if STRIPS == 2:
                        s = (K_TILES + 2 * n) * 4
                        mma(scores, s, b[0], b[1], b[2], b[3], x[0], x[1])
                        mma(scores, s + 4, b[0], b[1], b[2], b[3], x[2], x[3])
            if capped:
                for i in range(SCORES):
                    scores[i] = cap * ptx.tanh(scores[i] * scale)
            # 5 Mask, where this tile reaches the diagonal or leaves the window.
            key0 = U32(key_tile * U32(KEYS))
            masked = U32(key0 + U32(KEYS - 1)) > position
            if windowed:
                masked = masked or U32(key0 + U32(window)) < U32(position + U32(16 * STRIPS))
            if masked:
                for m in range(STRIPS):
                    for n in range(K_TILES):
                        for i in range(4):
                            key = U32(key0 + column0 + U32(n * 8 + i % 2))
                            at = U32(row0 + U32(m * 16 + (i // 2) * 8))
                            if key > at or (windowed and U32(key + U32(window)) <= at):
                                scores[(m * K_TILES + n) * 4 + i] = F32(NOTHING)
            # 6 Values are here; the next keys start on their way.
            ptx.copy_wait_all()
            cuda.syncthreads()
            if key_tile > last_tile:
                copy_tile(key_cache, head, k_at, U32(key_tile - U32(1)), thread, end, slots)
                ptx.copy_commit()
            # 7 The running softmax, row by row.
            for m in range(STRIPS):
                for r in range(2):
                    top = scores[m * K_TILES * 4 + 2 * r]
                    for n in range(K_TILES):
                        top = ptx.fmax(top, scores[(m * K_TILES + n) * 4 + 2 * r])
                        top = ptx.fmax(top, scores[(m * K_TILES + n) * 4 + 2 * r + 1])
                    top = ptx.fmax(top, ptx.shuffle_xor(top, U32(1)))
                    top = ptx.fmax(top, ptx.shuffle_xor(top, U32(2)))
                    factor = F32(1.0)
                    if not capped:
                        factor = scale
                    top = ptx.fmax(highest[2 * m + r], top * factor)
                    shrink = ptx.exp2(highest[2 * m + r] - top)
                    highest[2 * m + r] = top
                    # A row that has seen nothing yet must not take exp(nothing - nothing) for 1.
                    base = top if top > F32(UNSEEN) else F32(0.0)
                    whole = mass[2 * m + r] * shrink
                    for n in range(K_TILES):
                        s = (m * K_TILES + n) * 4 + 2 * r
                        scores[s] = ptx.exp2(scores[s] * factor - base)
                        scores[s + 1] = ptx.exp2(scores[s + 1] * factor - base)
                        whole += scores[s] + scores[s + 1]
                    mass[2 * m + r] = whole
                    for n in range(D_TILES):
                        sums[(m * D_TILES + n) * 4 + 2 * r] *= shrink
                        sums[(m * D_TILES + n) * 4 + 2 * r + 1] *= shrink
            # 8 Weights times values. A product's result is the next one's operand, as it lies.
            for k in range(KEYS // 16):
                s = k * 8
                a0 = pack(scores[s], scores[s + 1])
                a1 = pack(scores[s + 2], scores[s + 3])
                a2 = pack(scores[s + 4], scores[s + 5])
                a3 = pack(scores[s + 6], scores[s + 7])
                if STRIPS == 2:
                    s2 = (K_TILES + 2 * k) * 4
                    b0 = pack(scores[s2], scores[s2 + 1])
                    b1 = pack(scores[s2 + 2], scores[s2 + 3])
                    b2 = pack(scores[s2 + 4], scores[s2 + 5])
                    b3 = pack(scores[s2 + 6], scores[s2 + 7])
                for n in range(D_TILES // 2):
                    x = ptx.load_matrix_transposed(U32(v_lane + U32(32 * n + 16 * k * STRIDE)))
                    mma(sums, n * 8, a0, a1, a2, a3, x[0], x[1])
                    mma(sums, n * 8 + 4, a0, a1, a2, a3, x[2], x[3])
                    if STRIPS == 2:
                        d = (D_TILES + 2 * n) * 4
                        mma(sums, d, b0, b1, b2, b3, x[0], x[1])
                        mma(sums, d + 4, b0, b1, b2, b3, x[2], x[3])
        # 9 Divide by the mass and write, two elements a word.
        for m in range(STRIPS):
            for r in range(2):
                whole = mass[2 * m + r]
                whole += ptx.shuffle_xor(whole, U32(1))
                whole += ptx.shuffle_xor(whole, U32(2))
                inverse = ptx.reciprocal(whole)
                row = U32(q0 + warp * U32(16 * STRIPS) + U32(16 * m + 8 * r) + (lane >> U32(2)))
                if row < new_tokens:
                    at = U64(U32(start + row)) * U64(NUM_Q * DIM)
                    at = at + U64(U32(query_head * U32(DIM) + column0))
                    for n in range(D_TILES):
                        s = (m * D_TILES + n) * 4 + 2 * r
                        ptx.store4(
                            out, at + U64(8 * n), pack(sums[s] * inverse, sums[s + 1] * inverse)
                        )

    half = ptx.POINTER_U16
    parameters = (
        *(half, half, half, ptx.POINTER_I32, ptx.POINTER_I32, ptx.POINTER_I32, half),
        *(ptx.U32, ptx.U32, ptx.U64, ptx.U64, ptx.U32, ptx.F32, ptx.F32),
    )
    return Kernel(prefill, parameters, threads=THREADS, shared_bytes=Q_BYTES + 2 * K_BYTES)
