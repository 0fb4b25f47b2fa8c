"""Attention of many new tokens with Hopper's warpgroup products and copy engine (sm_90a).

After FlashAttention-3 (Shah et al., 2024), over pages. A thread block has two producer warps
and two groups of four consumer warps, and stays for the whole launch:

- One producer warp takes tiles of 128 queries from a queue, longest first, and brings them. Another
  keeps a ring of key and value tiles filled: one instruction of the copy engine brings a page's
  rows of one head. Both run ahead of the consumers, into the next tile of queries too.
- Each consumer group owns 64 queries. While the tensor cores multiply queries with the next keys
  and weights with the values at hand, the group computes the softmax of what is in between.

Nobody meets anybody else except through barriers in shared memory: "full" counts bytes that landed,
"empty" counts warps that are done reading.
"""

from __future__ import annotations

import functools
from typing import Any

from numba import cuda

from . import ptx
from .attention_prefill import find_tile
from .attention_rows import NOTHING, UNSEEN
from .launch import Kernel
from .ptx import F32, U32, U64

ROWS = 128  # queries of a tile: 64 for each consumer group
CONSUMERS = 256  # threads
THREADS = CONSUMERS + 128
# The three groups of four warps start with 168 registers a thread; the producers' gives most away.
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232
CONSUMER_WARPS = CONSUMERS // 32
STAGES = 2
PING_PONG = True  # the groups take turns at the tensor cores
NO_MORE = 0xFFFFFFFF
# Descriptor of a 128-byte swizzled matrix whose groups of eight rows are 1,024 bytes apart.
SWIZZLED = (1 << 62) | (64 << 32)


def keys_of_tile(head_dim: int) -> int:
    """Tokens of a key tile: fewer for large heads, whose sums fill the registers."""
    return 128 if head_dim <= 128 else 64


@functools.cache
def bulk_prefill_kernel(
    dtype: str,
    NUM_KV: int,
    GROUP: int,
    DIM: int,
    BLOCK: int,
    BOX: int,
    windowed: bool,
    capped: bool,
) -> Kernel:
    """The Hopper prefill rung for one shape of model; grid (thread blocks, as many as fit).

    Args:
        dtype: ``"bfloat16"`` or ``"float16"``.
        NUM_KV: key-value heads.
        GROUP: query heads of each.
        DIM: head size, a multiple of 16 up to 256.
        BLOCK: tokens of a cache block.
        BOX: tokens that one copy brings: 8, or 16 where blocks are multiples of it.
        windowed: whether there is a sliding window.
        capped: whether logits are soft-capped.
    """
    KEYS = keys_of_tile(DIM)
    NUM_Q = NUM_KV * GROUP
    HALVES = -(-DIM // 64)
    PIECES = DIM // 8
    Q_HALF, K_HALF = ROWS * 128, KEYS * 128  # bytes
    Q_BYTES, K_BYTES = HALVES * Q_HALF, HALVES * K_HALF
    Q_COPIES = ROWS * PIECES // 32  # a lane
    COPIES = KEYS // BOX * HALVES
    LANE_COPIES = -(-COPIES // 32)
    D_TILES, K_TILES = DIM // 8, KEYS // 8
    SUMS, SCORES, WEIGHTS = 4 * D_TILES, 4 * K_TILES, 2 * K_TILES
    # Two places for queries where they fit: the next tile's come while this one is computed.
    Q_STAGES = 2 if 2 * Q_BYTES + 2 * STAGES * K_BYTES <= 224 * 1024 else 1
    BARRIERS_AT = Q_STAGES * Q_BYTES + 2 * STAGES * K_BYTES
    INFO_WORDS = 8 * Q_STAGES
    kind = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    pack = {"bfloat16": ptx.pack_bf16, "float16": ptx.pack_f16}[dtype]
    steps = range(DIM // 16)
    start_scores = ptx.wgmma_shared(
        kind,
        KEYS,
        [(k // 4) * (Q_HALF >> 4) + (k % 4) * 2 for k in steps],
        [(k // 4) * (K_HALF >> 4) + (k % 4) * 2 for k in steps],
    )
    start_sums = ptx.wgmma_registers(kind, DIM, [128 * k for k in range(KEYS // 16)])
    scores_ready, scores_ready_first = ptx.wgmma_wait(SCORES, 0), ptx.wgmma_wait(SCORES, 1)
    sums_ready = ptx.wgmma_wait(SUMS, 0)
    KEY_MATRIX = SWIZZLED | (1 << 16)
    VALUE_MATRIX = SWIZZLED | ((K_HALF >> 4) << 16)

    def find_slots(
        block_tables: Any, table: Any, key_tile: Any, length: Any, lane: Any, slots: Any
    ) -> None:
        """Where the pages of a tile lie, of the copies that this lane starts.

        What lies past the end repeats the last page.
        """
        for i in range(LANE_COPIES):
            box = U32(U32(lane + U32(32 * i)) // U32(HALVES))
            token = U32(min(U32(key_tile * U32(KEYS) + box * U32(BOX)), U32(length - U32(1))))
            token = U32(U32(token // U32(BOX)) * U32(BOX))
            block = U32(block_tables[table + U64(token // U32(BLOCK))])
            slots[i] = U32(block * U32(BLOCK) + token % U32(BLOCK))

    def copies(tensor_map: Any, kv_head: Any, to: Any, barrier: Any, lane: Any, slots: Any) -> None:
        """Bring a tile of keys or values."""
        if lane == U32(0):
            ptx.barrier_expect(barrier, U32(K_BYTES))
        ptx.sync_warp()
        for i in range(LANE_COPIES):
            c = U32(lane + U32(32 * i))
            if c < U32(COPIES):
                half = U32(c % U32(HALVES))
                at = U32(to + half * U32(K_HALF) + U32(c // U32(HALVES)) * U32(BOX * 128))
                ptx.copy_box(at, tensor_map, U32(half * U32(64)), kv_head, slots[i], barrier)

    def softmax(
        scores: Any, highest: Any, mass: Any, shrink: Any, key0: Any, position: Any, row0: Any,
        column0: Any, window: Any, scale: Any, cap: Any,
    ) -> None:  # fmt: skip
        """Turn scores into weights in place; ``shrink`` is what earlier sums shrink by."""
        if capped:
            for i in range(SCORES):
                scores[i] = cap * ptx.tanh(scores[i] * scale)
        masked = U32(key0 + U32(KEYS - 1)) > position
        if windowed:
            masked = masked or U32(key0 + window) < U32(position + U32(16))
        if masked:
            for n in range(K_TILES):
                for i in range(4):
                    key = U32(key0 + column0 + U32(n * 8 + i % 2))
                    at = U32(row0 + U32((i // 2) * 8))
                    if key > at or (windowed and U32(key + window) <= at):
                        scores[4 * n + i] = F32(NOTHING)
        for r in range(2):
            top = scores[2 * r]
            for n in range(K_TILES):
                top = ptx.fmax(top, ptx.fmax(scores[4 * n + 2 * r], scores[4 * n + 2 * r + 1]))
            top = ptx.fmax(top, ptx.shuffle_xor(top, U32(1)))
            top = ptx.fmax(top, ptx.shuffle_xor(top, U32(2)))
            factor = F32(1.0)
            if not capped:
                factor = scale
            top = ptx.fmax(highest[r], top * factor)
            shrink[r] = ptx.exp2(highest[r] - top)
            highest[r] = top
            # A row that has seen nothing yet must not take exp(nothing - nothing) for 1.
            base = top if top > F32(UNSEEN) else F32(0.0)
            whole = mass[r] * shrink[r]
            for n in range(K_TILES):
                s = 4 * n + 2 * r
                scores[s] = ptx.exp2(scores[s] * factor - base)
                scores[s + 1] = ptx.exp2(scores[s + 1] * factor - base)
                whole += scores[s] + scores[s + 1]
            mass[r] = whole

    give_registers = ptx.set_registers("dec", PRODUCER_REGISTERS)
    take_registers = ptx.set_registers("inc", CONSUMER_REGISTERS)

    def read_word(tile_info: Any, word: Any, lane: Any) -> Any:
        """One word of what the query warp told, read by the lane that gives the place back."""
        value = U32(0)
        if lane == U32(0):
            value = U32(tile_info[word])
        return U32(ptx.shuffle(value, U32(0)))

    told = ptx.device(read_word)
    look_up, bring, weigh = ptx.device(find_slots), ptx.device(copies), ptx.device(softmax)

    def prefill(
        query: Any, key_map: Any, value_map: Any, block_tables: Any, seq_lens: Any,
        query_start_loc: Any, out: Any, queue: Any,
        num_seqs: Any, num_tiles: Any, max_decode_tokens: Any, query_step: Any, table_step: Any,
        window: Any, scale: Any, cap: Any,
    ) -> None:  # fmt: skip
        ptx.wait_for_previous_kernel()
        ptx.let_next_kernel_start()
        memory = cuda.shared.array(0, U32)
        tile_info = cuda.shared.array(INFO_WORDS, U32)
        thread = U32(cuda.threadIdx.x)
        lane, warp = thread & U32(31), thread >> U32(5)
        q_at = U32(U32(ptx.shared_address(memory)) + U32(1023)) & U32(0xFFFFFC00)
        k_at = U32(q_at + U32(Q_STAGES * Q_BYTES))
        v_at = U32(k_at + U32(STAGES * K_BYTES))
        # Barriers, 8 bytes each: full and empty of each place for queries, keys and values.
        q_full = U32(q_at + U32(BARRIERS_AT))
        q_empty = U32(q_full + U32(8 * Q_STAGES))
        k_full = U32(q_full + U32(16 * Q_STAGES))
        k_empty = U32(k_full + U32(8 * STAGES))
        v_full = U32(k_full + U32(16 * STAGES))
        v_empty = U32(k_full + U32(24 * STAGES))
        if thread == U32(0):
            for i in range(Q_STAGES):
                ptx.barrier_init(U32(q_full + U32(8 * i)), U32(1))
                ptx.barrier_init(U32(q_empty + U32(8 * i)), U32(CONSUMER_WARPS + 1))
            for i in range(STAGES):
                ptx.barrier_init(U32(k_full + U32(8 * i)), U32(1))
                ptx.barrier_init(U32(k_empty + U32(8 * i)), U32(CONSUMER_WARPS))
                ptx.barrier_init(U32(v_full + U32(8 * i)), U32(1))
                ptx.barrier_init(U32(v_empty + U32(8 * i)), U32(CONSUMER_WARPS))
            ptx.fence_barrier_init()
        cuda.syncthreads()
        k_stage, k_parity = U32(0), U32(0)
        v_stage, v_parity = U32(0), U32(0)
        q_stage, q_parity = U32(0), U32(0)
        working = True

        if warp >= U32(CONSUMER_WARPS):
            give_registers()
            if warp == U32(CONSUMER_WARPS):
                # ---- The warp that brings queries.
                while working:
                    # 1 The next tile of queries; some numbers stand for no tile.
                    found = False
                    start, new_tokens, q0, query_head = U32(0), U32(0), U32(0), U32(0)
                    sequence = U32(0)
                    while working and not found:
                        item = U32(0)
                        if lane == U32(0):
                            item = ptx.atomic_add(queue, U64(0), U32(1))
                        item = ptx.shuffle(item, U32(0))
                        if item >= U32(U32(num_tiles) * U32(NUM_Q)):
                            working = False
                        else:
                            query_head = U32(item % U32(NUM_Q))
                            number = U32(U32(num_tiles) - U32(1) - U32(item // U32(NUM_Q)))
                            sequence, tile = find_tile(
                                query_start_loc, U32(num_seqs), number, U32(ROWS)
                            )
                            start = U32(query_start_loc[U64(sequence)])
                            new_tokens = U32(U32(query_start_loc[U64(sequence) + U64(1)]) - start)
                            q0 = U32(tile * U32(ROWS))
                            found = q0 < new_tokens and new_tokens > U32(max_decode_tokens)
                    length = U32(0)
                    if found:
                        length = U32(seq_lens[U64(sequence)])
                    # 2 Bring it to a free place, and tell the others what it is.
                    ptx.barrier_wait(U32(q_empty + q_stage * U32(8)), q_parity ^ U32(1))
                    if lane == U32(0):
                        info = U32(q_stage * U32(8))
                        tile_info[info] = U32(NO_MORE)
                        if found:
                            tile_info[info] = start
                            tile_info[U32(info + U32(1))] = new_tokens
                            tile_info[U32(info + U32(2))] = q0
                            tile_info[U32(info + U32(3))] = length
                            tile_info[U32(info + U32(4))] = query_head
                            tile_info[U32(info + U32(5))] = sequence
                    if found:
                        place = U32(q_at + q_stage * U32(Q_BYTES))
                        for i in range(Q_COPIES):
                            c = U32(lane + U32(32 * i))
                            row, piece = U32(c // U32(PIECES)), U32(c % U32(PIECES))
                            token = U32(start + min(U32(q0 + row), U32(new_tokens - U32(1))))
                            at = U64(token) * U64(query_step)
                            at = at + U64(U32(query_head * U32(DIM) + piece * U32(8)))
                            to = U32(place + U32(piece >> U32(3)) * U32(Q_HALF) + row * U32(128))
                            to = U32(to + ((piece ^ row) & U32(7)) * U32(16))
                            ptx.copy16_async(to, query, at, U32(16))
                        ptx.copy_commit()
                    ptx.copy_wait_all()
                    ptx.fence_async_shared()
                    ptx.sync_warp()
                    if lane == U32(0):
                        ptx.barrier_arrive(U32(q_full + q_stage * U32(8)))
                    q_stage = U32(q_stage + U32(1))
                    if q_stage == U32(Q_STAGES):
                        q_stage = U32(0)
                        q_parity = q_parity ^ U32(1)
                # 3 The last block to leave makes the queue ready for the next launch.
                if lane == U32(0):
                    left = ptx.atomic_add(queue, U64(1), U32(1))
                    if left == U32(U32(cuda.gridDim.x) - U32(1)):
                        queue[U64(0)] = U32(0)
                        queue[U64(1)] = U32(0)
            elif warp == U32(CONSUMER_WARPS + 1):
                # ---- The warp that brings keys and values, newest first, keys a tile ahead.
                slots = cuda.local.array(LANE_COPIES, U32)
                ahead = cuda.local.array(LANE_COPIES, U32)
                while working:
                    ptx.barrier_wait(U32(q_full + q_stage * U32(8)), q_parity)
                    info = U32(q_stage * U32(8))
                    start = told(tile_info, info, lane)
                    new_tokens = told(tile_info, U32(info + U32(1)), lane)
                    q0 = told(tile_info, U32(info + U32(2)), lane)
                    length = told(tile_info, U32(info + U32(3)), lane)
                    kv_head = U32(told(tile_info, U32(info + U32(4)), lane) // U32(GROUP))
                    table = U64(told(tile_info, U32(info + U32(5)), lane)) * U64(table_step)
                    if lane == U32(0):
                        ptx.barrier_arrive(U32(q_empty + q_stage * U32(8)))
                    q_stage = U32(q_stage + U32(1))
                    if q_stage == U32(Q_STAGES):
                        q_stage = U32(0)
                        q_parity = q_parity ^ U32(1)
                    working = start != U32(NO_MORE)
                    key_tile, last_tile = U32(0), U32(0)
                    if working and length > U32(0):
                        before = U32(length - new_tokens)
                        end = U32(min(U32(before + q0 + U32(ROWS)), length))
                        key_tile = U32(U32(end + U32(KEYS - 1)) // U32(KEYS))
                        if windowed and U32(before + q0 + U32(1)) > U32(window):
                            last_tile = U32(U32(before + q0 + U32(1) - U32(window)) // U32(KEYS))
                        look_up(block_tables, table, U32(key_tile - U32(1)), length, lane, ahead)
                        ptx.barrier_wait(U32(k_empty + k_stage * U32(8)), k_parity ^ U32(1))
                        bring(key_map, kv_head, U32(k_at + k_stage * U32(K_BYTES)),
                              U32(k_full + k_stage * U32(8)), lane, ahead)  # fmt: skip
                        k_stage = k_stage ^ U32(1)
                        if k_stage == U32(0):
                            k_parity = k_parity ^ U32(1)
                    while key_tile > last_tile:
                        key_tile = U32(key_tile - U32(1))
                        for i in range(LANE_COPIES):
                            slots[i] = ahead[i]
                        if key_tile > last_tile:
                            look_up(
                                block_tables, table, U32(key_tile - U32(1)), length, lane, ahead
                            )
                            ptx.barrier_wait(U32(k_empty + k_stage * U32(8)), k_parity ^ U32(1))
                            bring(key_map, kv_head, U32(k_at + k_stage * U32(K_BYTES)),
                                  U32(k_full + k_stage * U32(8)), lane, ahead)  # fmt: skip
                            k_stage = k_stage ^ U32(1)
                            if k_stage == U32(0):
                                k_parity = k_parity ^ U32(1)
                        ptx.barrier_wait(U32(v_empty + v_stage * U32(8)), v_parity ^ U32(1))
                        bring(value_map, kv_head, U32(v_at + v_stage * U32(K_BYTES)),
                              U32(v_full + v_stage * U32(8)), lane, slots)  # fmt: skip
                        v_stage = v_stage ^ U32(1)
                        if v_stage == U32(0):
                            v_parity = v_parity ^ U32(1)
        else:
            # ---- The consumers.
            take_registers()
            sums = cuda.local.array(SUMS, F32)
            scores = cuda.local.array(SCORES, F32)
            weights = cuda.local.array(WEIGHTS, U32)
            highest = cuda.local.array(2, F32)
            mass = cuda.local.array(2, F32)
            shrink = cuda.local.array(2, F32)
            column0 = U32((lane & U32(3)) * U32(2))
            group = U32(warp >> U32(2))
            if PING_PONG and group == U32(1):
                ptx.arrive_named(U32(2), U32(CONSUMERS))  # group 0 begins
            while working:
                ptx.barrier_wait(U32(q_full + q_stage * U32(8)), q_parity)
                info = U32(q_stage * U32(8))
                q_free = U32(q_empty + q_stage * U32(8))
                q_place = U32(q_at + q_stage * U32(Q_BYTES) + group * U32(8192))
                q_matrix = U64(KEY_MATRIX) + U64(q_place >> U32(4))
                q_stage = U32(q_stage + U32(1))
                if q_stage == U32(Q_STAGES):
                    q_stage = U32(0)
                    q_parity = q_parity ^ U32(1)
                start = U32(tile_info[info])
                working = start != U32(NO_MORE)
                if working:
                    new_tokens = U32(tile_info[U32(info + U32(1))])
                    q0 = U32(tile_info[U32(info + U32(2))])
                    length = U32(tile_info[U32(info + U32(3))])
                    query_head = U32(tile_info[U32(info + U32(4))])
                    ptx.sync_warp()  # all lanes have read before lane 0 gives the place back
                    before = U32(0)
                    end = U32(0)
                    first = U32(0)
                    if length > U32(0):
                        before = U32(length - new_tokens)
                        end = U32(min(U32(before + q0 + U32(ROWS)), length))
                        if windowed and U32(before + q0 + U32(1)) > U32(window):
                            first = U32(before + q0 + U32(1) - U32(window))
                    key_tile = U32(U32(end + U32(KEYS - 1)) // U32(KEYS))
                    last_tile = U32(first // U32(KEYS))
                    position = U32(before + q0 + warp * U32(16))
                    row0 = U32(position + (lane >> U32(2)))
                    for i in range(SUMS):
                        sums[i] = F32(0.0)
                    for r in range(2):
                        highest[r] = F32(NOTHING)
                        mass[r] = F32(0.0)
                    if key_tile > last_tile:
                        # 1 Scores and weights of the newest tile.
                        key_tile = U32(key_tile - U32(1))
                        ptx.barrier_wait(U32(k_full + k_stage * U32(8)), k_parity)
                        at = U32(k_at + k_stage * U32(K_BYTES)) >> U32(4)
                        start_scores(scores, q_matrix, U64(KEY_MATRIX) + U64(at))
                        scores_ready(scores)
                        if lane == U32(0):
                            ptx.barrier_arrive(U32(k_empty + k_stage * U32(8)))
                        k_stage = k_stage ^ U32(1)
                        if k_stage == U32(0):
                            k_parity = k_parity ^ U32(1)
                        weigh(scores, highest, mass, shrink, U32(key_tile * U32(KEYS)), position,
                              row0, column0, U32(window), scale, cap)  # fmt: skip
                        for n in range(WEIGHTS):
                            weights[n] = pack(scores[2 * n], scores[2 * n + 1])
                        # 2 Rows past the sequence's end may hold NaN, and 0 times NaN is NaN.
                        ptx.barrier_wait(U32(v_full + v_stage * U32(8)), v_parity)
                        if U32(U32(key_tile + U32(1)) * U32(KEYS)) > length:
                            unowned = U32(length - key_tile * U32(KEYS))
                            base = U32(v_at + v_stage * U32(K_BYTES))
                            for i in range(KEYS * HALVES * 8 // CONSUMERS):
                                c = U32(thread + U32(CONSUMERS * i))
                                row = U32(c // U32(8)) % U32(KEYS)
                                if row >= unowned:
                                    to = U32(base + c * U32(16))
                                    ptx.store16_shared(to, U32(0), U32(0), U32(0), U32(0))
                            ptx.fence_async_shared()
                            ptx.sync_named(U32(1), U32(CONSUMERS))
                        # 3 While these weights meet their values, the next scores are computed.
                        while key_tile > last_tile:
                            key_tile = U32(key_tile - U32(1))
                            ptx.barrier_wait(U32(k_full + k_stage * U32(8)), k_parity)
                            at = U32(k_at + k_stage * U32(K_BYTES)) >> U32(4)
                            if PING_PONG:
                                ptx.sync_named(U32(U32(2) + group), U32(CONSUMERS))
                            start_scores(scores, q_matrix, U64(KEY_MATRIX) + U64(at))
                            ptx.barrier_wait(U32(v_full + v_stage * U32(8)), v_parity)
                            at = U32(v_at + v_stage * U32(K_BYTES)) >> U32(4)
                            start_sums(sums, weights, U64(VALUE_MATRIX) + U64(at))
                            if PING_PONG:
                                ptx.arrive_named(U32(U32(3) - group), U32(CONSUMERS))
                            scores_ready_first(scores)
                            if lane == U32(0):
                                ptx.barrier_arrive(U32(k_empty + k_stage * U32(8)))
                            k_stage = k_stage ^ U32(1)
                            if k_stage == U32(0):
                                k_parity = k_parity ^ U32(1)
                            weigh(scores, highest, mass, shrink, U32(key_tile * U32(KEYS)),
                                  position, row0, column0, U32(window), scale, cap)  # fmt: skip
                            sums_ready(sums)
                            if lane == U32(0):
                                ptx.barrier_arrive(U32(v_empty + v_stage * U32(8)))
                            v_stage = v_stage ^ U32(1)
                            if v_stage == U32(0):
                                v_parity = v_parity ^ U32(1)
                            for n in range(WEIGHTS):
                                weights[n] = pack(scores[2 * n], scores[2 * n + 1])
                            for n in range(D_TILES):
                                for i in range(4):
                                    sums[4 * n + i] *= shrink[i // 2]
                        # 4 The oldest tile's values; the queries' place is free already.
                        if lane == U32(0):
                            ptx.barrier_arrive(q_free)
                        ptx.barrier_wait(U32(v_full + v_stage * U32(8)), v_parity)
                        at = U32(v_at + v_stage * U32(K_BYTES)) >> U32(4)
                        start_sums(sums, weights, U64(VALUE_MATRIX) + U64(at))
                        sums_ready(sums)
                        if lane == U32(0):
                            ptx.barrier_arrive(U32(v_empty + v_stage * U32(8)))
                        v_stage = v_stage ^ U32(1)
                        if v_stage == U32(0):
                            v_parity = v_parity ^ U32(1)
                    elif lane == U32(0):
                        ptx.barrier_arrive(q_free)
                    # 5 Divide by the mass and write, two elements a word.
                    for r in range(2):
                        whole = mass[r]
                        whole += ptx.shuffle_xor(whole, U32(1))
                        whole += ptx.shuffle_xor(whole, U32(2))
                        inverse = F32(0.0)
                        if whole > F32(0.0):
                            inverse = ptx.reciprocal(whole)
                        row = U32(q0 + warp * U32(16) + U32(8 * r) + (lane >> U32(2)))
                        if row < new_tokens:
                            to64 = U64(U32(start + row)) * U64(NUM_Q * DIM)
                            to64 = to64 + U64(U32(query_head * U32(DIM) + column0))
                            for n in range(D_TILES):
                                x = sums[4 * n + 2 * r] * inverse
                                y = sums[4 * n + 2 * r + 1] * inverse
                                ptx.store4(out, to64 + U64(8 * n), pack(x, y))

    half = ptx.POINTER_U16
    parameters = (
        *(half, ptx.POINTER_MAP, ptx.POINTER_MAP),
        *(ptx.POINTER_I32, ptx.POINTER_I32, ptx.POINTER_I32, half, ptx.POINTER_U32),
        *(ptx.U32, ptx.U32, ptx.U32, ptx.U64, ptx.U64, ptx.U32, ptx.F32, ptx.F32),
    )
    return Kernel(
        prefill,
        parameters,
        threads=THREADS,
        shared_bytes=1024 + BARRIERS_AT + 16 * Q_STAGES + 32 * STAGES,
        hopper=True,
    )
