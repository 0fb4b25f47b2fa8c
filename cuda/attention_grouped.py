"""Paged attention, rung 2: the query heads of a group share what is read.

Where rung 1 reads keys and values once for every query head, here a thread block owns a key-value
head: it brings a tile of 32 tokens to shared memory, and all query heads of the group work from
there. A group of 4 reads a quarter of the bytes. What it still wastes: two bytes a load, and
nothing is on its way while the tile is worked on, so it reaches some 17 % of the memory's rate.
"""

from __future__ import annotations

import functools
from typing import Any

from numba import cuda

from . import ptx
from .attention_rows import NOTHING, find_context
from .elements import elements
from .launch import Kernel
from .ptx import F32, U32, U64

THREADS = 128
TOKENS = 32  # of a tile
HEADS = 8  # query heads of a block at most


@functools.cache
def grouped_kernel(
    dtype: str, NUM_KV: int, GROUP: int, DIM: int, BLOCK: int, capped: bool
) -> Kernel:
    """The grouped rung for one shape of model; grid ``(NUM_KV * head tiles, tokens)``."""
    part = elements(dtype, wide=False)
    load, store = part.load, part.store
    HEAD_TILES = -(-GROUP // HEADS)
    TILE_HEADS = min(GROUP, HEADS)
    ROW = NUM_KV * DIM
    NUM_Q = NUM_KV * GROUP
    PER_THREAD = -(-TILE_HEADS * DIM // THREADS)
    KEPT_QUERY, KEPT_TILE, KEPT_WEIGHTS = TILE_HEADS * DIM, TOKENS * DIM, TILE_HEADS * TOKENS

    def grouped(
        query: Any, key_cache: Any, value_cache: Any, block_tables: Any, seq_lens: Any,
        query_start_loc: Any, out: Any,
        num_seqs: Any, query_step: Any, table_step: Any, window: Any, scale: Any, cap: Any,
    ) -> None:  # fmt: skip
        ptx.wait_for_previous_kernel()
        ptx.let_next_kernel_start()
        q = cuda.shared.array(KEPT_QUERY, F32)
        keys = cuda.shared.array(KEPT_TILE, F32)
        values = cuda.shared.array(KEPT_TILE, F32)
        scores = cuda.shared.array(KEPT_WEIGHTS, F32)
        one = cuda.local.array(1, F32)
        sums = cuda.local.array(PER_THREAD, F32)
        highest = cuda.local.array(PER_THREAD, F32)
        mass = cuda.local.array(PER_THREAD, F32)
        thread = U32(cuda.threadIdx.x)
        token = U32(cuda.blockIdx.y)
        kv_head = U32(cuda.blockIdx.x) // U32(HEAD_TILES)
        head0 = U32((U32(cuda.blockIdx.x) % U32(HEAD_TILES)) * U32(HEADS))
        heads = U32(min(U32(U32(GROUP) - head0), U32(HEADS)))
        first_head = U32(kv_head * U32(GROUP) + head0)
        sequence, _, first, end = find_context(
            query_start_loc, seq_lens, U32(num_seqs), token, U32(window)
        )
        if sequence >= U32(num_seqs):
            return
        table = U64(sequence) * U64(table_step)
        # 1 The group's queries, once. Element e of the output is dim e % DIM of head e // DIM.
        for i in range(PER_THREAD):
            e = U32(thread + U32(i * THREADS))
            sums[i] = F32(0.0)
            highest[i] = F32(NOTHING)
            mass[i] = F32(0.0)
            if e < U32(heads * U32(DIM)):
                at = U64(token) * U64(query_step) + U64(U32(first_head * U32(DIM) + e))
                load(query, at, one, 0)
                q[e] = one[0]
        start = first
        while start < end:
            # 2 A tile of keys and values; rows past the end are never read.
            seen = U32(min(U32(end - start), U32(TOKENS)))
            cuda.syncthreads()
            e = thread
            while e < U32(seen * U32(DIM)):
                key = U32(start + e // U32(DIM))
                block = U64(block_tables[table + U64(key // U32(BLOCK))])
                at = (block * U64(BLOCK) + U64(key % U32(BLOCK))) * U64(ROW)
                at = at + U64(U32(kv_head * U32(DIM) + e % U32(DIM)))
                load(key_cache, at, one, 0)
                keys[e] = one[0]
                load(value_cache, at, one, 0)
                values[e] = one[0]
                e = U32(e + U32(THREADS))
            cuda.syncthreads()
            # 3 Scores of every head with every token of the tile.
            e = thread
            while e < U32(heads * seen):
                h, j = U32(e // seen), U32(e % seen)
                score = F32(0.0)
                for d in range(DIM):
                    score += q[U32(h * U32(DIM) + U32(d))] * keys[U32(j * U32(DIM) + U32(d))]
                score = score * scale
                if capped:
                    score = cap * ptx.tanh(score)
                scores[U32(h * U32(TOKENS) + j)] = score
                e = U32(e + U32(THREADS))
            cuda.syncthreads()
            # 4 The running softmax, for the elements of the output that this thread owns.
            for i in range(PER_THREAD):
                e = U32(thread + U32(i * THREADS))
                if e < U32(heads * U32(DIM)):
                    h, d = U32(e // U32(DIM)), U32(e % U32(DIM))
                    top = highest[i]
                    for j in range(seen):
                        top = ptx.fmax(top, scores[U32(h * U32(TOKENS) + U32(j))])
                    shrink = ptx.exp2(highest[i] - top)
                    value = sums[i] * shrink
                    whole = mass[i] * shrink
                    for j in range(seen):
                        weight = ptx.exp2(scores[U32(h * U32(TOKENS) + U32(j))] - top)
                        whole += weight
                        value += weight * values[U32(U32(j) * U32(DIM) + d)]
                    highest[i] = top
                    sums[i] = value
                    mass[i] = whole
            start = U32(start + U32(TOKENS))
        for i in range(PER_THREAD):
            e = U32(thread + U32(i * THREADS))
            if e < U32(heads * U32(DIM)):
                one[0] = F32(0.0)
                if end > U32(0):
                    one[0] = sums[i] / mass[i]
                at = U64(token) * U64(NUM_Q * DIM) + U64(U32(first_head * U32(DIM) + e))
                store(out, at, one, 0)

    pointer = part.pointer
    parameters = (
        *(pointer, pointer, pointer),
        *(ptx.POINTER_I32, ptx.POINTER_I32, ptx.POINTER_I32, pointer),
        *(ptx.U32, ptx.U64, ptx.U64, ptx.U32, ptx.F32, ptx.F32),
    )
    return Kernel(grouped, parameters, threads=THREADS)
