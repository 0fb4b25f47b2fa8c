"""Paged attention, rung 1: a thread block for one token and one query head. Read this one first.

Each thread scores one token of the context; together they find the maximum and the weights; then
each thread sums one dim of the values. The softmax is the running one (Milakov and Gimelshein,
2018): what was summed so far shrinks when a new maximum comes. Any dtype, any head size.

What it wastes: the query heads of a group each read the same keys and values; a thread reads two
bytes at a time; neighbouring threads read rows apart. It reaches some 6 % of the memory's rate.
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


@functools.cache
def plain_kernel(dtype: str, NUM_KV: int, GROUP: int, DIM: int, BLOCK: int, capped: bool) -> Kernel:
    """The plain rung for one shape of model; grid ``(query heads, tokens)``."""
    part = elements(dtype, wide=False)
    load, store = part.load, part.store
    ROW = NUM_KV * DIM
    NUM_Q = NUM_KV * GROUP
    PER_THREAD = -(-DIM // THREADS)

    def plain(
        query: Any, key_cache: Any, value_cache: Any, block_tables: Any, seq_lens: Any,
        query_start_loc: Any, out: Any,
        num_seqs: Any, query_step: Any, table_step: Any, window: Any, scale: Any, cap: Any,
    ) -> None:  # fmt: skip
        ptx.wait_for_previous_kernel()
        ptx.let_next_kernel_start()
        q = cuda.shared.array(DIM, F32)
        weights = cuda.shared.array(THREADS, F32)
        tops = cuda.shared.array(THREADS, F32)
        one = cuda.local.array(1, F32)
        sums = cuda.local.array(PER_THREAD, F32)
        thread = U32(cuda.threadIdx.x)
        head = U32(cuda.blockIdx.x)
        token = U32(cuda.blockIdx.y)
        kv_head = U64(head // U32(GROUP)) * U64(DIM)
        sequence, _, first, end = find_context(
            query_start_loc, seq_lens, U32(num_seqs), token, U32(window)
        )
        if sequence >= U32(num_seqs):
            return
        table = U64(sequence) * U64(table_step)
        # 1 The query, once.
        for i in range(PER_THREAD):
            d = U32(thread + U32(i * THREADS))
            sums[i] = F32(0.0)
            if d < U32(DIM):
                at = U64(token) * U64(query_step) + U64(head * U32(DIM) + d)
                load(query, at, one, 0)
                q[d] = one[0]
        cuda.syncthreads()
        highest, mass = F32(NOTHING), F32(0.0)
        start = first
        while start < end:
            # 2 A score a thread.
            key = U32(start + thread)
            score = F32(NOTHING)
            if key < end:
                block = U64(block_tables[table + U64(key // U32(BLOCK))])
                row = (block * U64(BLOCK) + U64(key % U32(BLOCK))) * U64(ROW) + kv_head
                score = F32(0.0)
                for d in range(DIM):
                    load(key_cache, row + U64(d), one, 0)
                    score += q[d] * one[0]
                score = score * scale
                if capped:
                    score = cap * ptx.tanh(score)
            # 3 The maximum of all.
            tops[thread] = score
            cuda.syncthreads()
            half = U32(THREADS // 2)
            while half > U32(0):
                if thread < half:
                    tops[thread] = ptx.fmax(tops[thread], tops[U32(thread + half)])
                cuda.syncthreads()
                half = half >> U32(1)
            top = ptx.fmax(highest, tops[0])
            # 4 Weights; what was summed before shrinks to the new maximum.
            weights[thread] = ptx.exp2(score - top)
            shrink = ptx.exp2(highest - top)
            highest = top
            mass = mass * shrink
            cuda.syncthreads()
            seen = U32(min(U32(end - start), U32(THREADS)))
            for i in range(PER_THREAD):
                sums[i] *= shrink
            # 5 Weighted values, a dim a thread. Rows past the end are never read.
            for j in range(seen):
                key = U32(start + U32(j))
                block = U64(block_tables[table + U64(key // U32(BLOCK))])
                row = (block * U64(BLOCK) + U64(key % U32(BLOCK))) * U64(ROW) + kv_head
                weight = weights[j]
                mass += weight
                for i in range(PER_THREAD):
                    d = U32(thread + U32(i * THREADS))
                    if d < U32(DIM):
                        load(value_cache, row + U64(d), one, 0)
                        sums[i] += weight * one[0]
            cuda.syncthreads()
            start = U32(start + U32(THREADS))
        for i in range(PER_THREAD):
            d = U32(thread + U32(i * THREADS))
            if d < U32(DIM):
                one[0] = F32(0.0)
                if end > U32(0):
                    one[0] = sums[i] / mass
                store(out, U64(token) * U64(NUM_Q * DIM) + U64(head * U32(DIM) + d), one, 0)

    pointer = part.pointer
    parameters = (
        *(pointer, pointer, pointer),
        *(ptx.POINTER_I32, ptx.POINTER_I32, ptx.POINTER_I32, pointer),
        *(ptx.U32, ptx.U64, ptx.U64, ptx.U32, ptx.F32, ptx.F32),
    )
    return Kernel(plain, parameters, threads=THREADS)
