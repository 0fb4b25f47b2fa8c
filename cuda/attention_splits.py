"""Cutting a context into splits, and folding their partial softmaxes: shared by decode kernels.

Flash-Decoding (Dao et al., 2023) lets many thread blocks share one sequence. The cut depends on the
sequence's own length alone. Every split is reduced from a fresh start, and splits are folded from
left to right with the same arithmetic whether one block did them all or many blocks did and the
last to finish folds: so a result's bits never depend on the rest of the batch.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from numba import cuda

from . import ptx
from .attention_rows import NOTHING
from .launch import num_multiprocessors
from .ptx import F32, U32, U64

# A split's tokens, for contexts up to SHORT_CONTEXT; longer ones are cut into MAX_SPLITS or fewer.
SHORT_SPLIT, SHORT_CONTEXT = 256, 4096
LONG_SPLIT, LONG_CONTEXT = 1024, 32768
MAX_SPLITS = 32
BLOCKS_PER_SM = 2  # thread blocks wanted of a launch of few sequences
HEADS = 8  # query heads of a tile: the short side of the tensor core's product
FOLD_AHEAD = 8  # partial results that the folding block has in flight


def size_of_split(context: Any) -> Any:
    """Tokens of a split, for a token that attends to ``context`` tokens."""
    size = U32(SHORT_SPLIT)
    if context > U32(SHORT_CONTEXT):
        size = U32(LONG_SPLIT)
    if context > U32(LONG_CONTEXT):
        most = U32(MAX_SPLITS * LONG_SPLIT)
        size = U32(U32(U32(context + most - U32(1)) // most) * U32(LONG_SPLIT))
    return size


split_size = ptx.device(size_of_split)


def num_splits(max_context: int) -> int:
    """The most splits that any context of up to ``max_context`` tokens is cut into."""
    short = -(-min(max_context, SHORT_CONTEXT) // SHORT_SPLIT)
    long = -(-min(max_context, LONG_CONTEXT) // LONG_SPLIT)
    return max(short, long, MAX_SPLITS if max_context > LONG_CONTEXT else 1)


def num_parts(tiles: int, max_context: int) -> int:
    """Blocks that share a sequence, where ``tiles`` sequences and heads leave the device idle.

    Sharing costs a hand-over, so it is left out as soon as three in four multiprocessors have a
    block: 64 sequences of 2,048 tokens take 182 us alone and 196 us shared by two.
    """
    multiprocessors = num_multiprocessors()
    if 4 * tiles >= 3 * multiprocessors:
        return 1
    return max(1, min(-(-BLOCKS_PER_SM * multiprocessors // tiles), num_splits(max_context)))


def fold_parts(
    total: Any, highest: Any, mass: Any, part: Any, part_highest: Any, part_mass: Any
) -> tuple[Any, Any, Any]:
    """Fold one split's (sum, maximum, mass) into the running ones; written out to the rounding."""
    top = ptx.fmax(highest, part_highest)
    keep = ptx.exp2(highest - top)
    take = ptx.exp2(part_highest - top)
    return (
        ptx.fma(total, keep, ptx.mul(part, take)),
        top,
        ptx.fma(mass, keep, ptx.mul(part_mass, take)),
    )


fold = ptx.device(fold_parts)


class Folding(NamedTuple):
    """Device functions of one shape of kernel, and the sizes of the shared arrays they want.

    ``finish_split`` merges the warps' parts of a split (``warp_sums [warps, heads, DIM]``,
    ``warp_highest`` and ``warp_mass [warps, HEADS]``) and folds it into ``total`` if this block
    does all splits, else hands it in. ``finish`` writes the result: at once, or, as the last of the
    blocks that share a token and head tile, after folding what all handed in.
    """

    finish_split: Any
    finish: Any
    state: int
    warp_sums: int
    warp_stats: int


@functools.cache
def folding(dtype: str, GROUP: int, DIM: int, WARPS: int) -> Folding:
    """The end of a split and of a token, for blocks of ``WARPS`` warps."""
    THREADS = 32 * WARPS
    OUTPUTS = min(GROUP, HEADS) * DIM
    PER_THREAD = -(-OUTPUTS // THREADS)
    QUADS_PER_THREAD = -(-OUTPUTS // (4 * THREADS))
    AHEAD_WORDS = 4 * FOLD_AHEAD
    pack = {"bfloat16": ptx.pack_bf16, "float16": ptx.pack_f16}[dtype]

    def finish_split(
        thread: Any, warp_sums: Any, warp_highest: Any, warp_mass: Any,
        total: Any, total_highest: Any, total_mass: Any,
        alone: Any, slot: Any, partial_sums: Any, partial_stats: Any,
    ) -> None:  # fmt: skip
        for i in range(PER_THREAD):
            e = U32(thread + U32(i * THREADS))
            if e < U32(OUTPUTS):
                h = U32(e // U32(DIM))
                top = warp_highest[h]
                for w in range(1, WARPS):
                    top = ptx.fmax(top, warp_highest[U32(h + U32(w * HEADS))])
                value = F32(0.0)
                mass = F32(0.0)
                for w in range(WARPS):
                    take = ptx.exp2(warp_highest[U32(h + U32(w * HEADS))] - top)
                    value = ptx.fma(warp_sums[U32(e + U32(w * OUTPUTS))], take, value)
                    mass = ptx.fma(warp_mass[U32(h + U32(w * HEADS))], take, mass)
                if alone:
                    value, top, mass = fold(
                        total[e], total_highest[e], total_mass[e], value, top, mass
                    )
                    total[e] = value
                    total_highest[e] = top
                    total_mass[e] = mass
                else:
                    partial_sums[slot * U64(OUTPUTS) + U64(e)] = value
                    if e % U32(DIM) == U32(0):
                        partial_stats[(slot * U64(HEADS) + U64(h)) * U64(2)] = top
                        partial_stats[(slot * U64(HEADS) + U64(h)) * U64(2) + U64(1)] = mass

    def finish(
        thread: Any, total: Any, total_mass: Any, arrived: Any, blocks: Any, splits: Any,
        ticket: Any, tickets: Any, partial_sums: Any, partial_stats: Any,
        heads: Any, out: Any, first_out: Any,
    ) -> None:  # fmt: skip
        last = True
        if blocks == U32(1):
            for i in range(PER_THREAD):
                e = U32(thread + U32(i * THREADS))
                if e < U32(heads * U32(DIM)):
                    result = total[e] * ptx.reciprocal(total_mass[e])
                    out[first_out + U64(e)] = ptx.U16(pack(result, F32(0.0)) & U32(0xFFFF))
        else:
            # The barrier orders the block's writes before thread 0's releasing add, and its
            # acquiring half before the block's reads: no fence of every thread is needed.
            cuda.syncthreads()
            if thread == U32(0):
                arrived[0] = ptx.atomic_add(tickets, ticket, U32(1))
            cuda.syncthreads()
            last = U32(arrived[0]) == U32(blocks - U32(1))
            if last and thread == U32(0):
                tickets[ticket] = U32(0)  # as the next launch wants to find it
        if blocks > U32(1) and last:
            read = cuda.local.array(AHEAD_WORDS, F32)
            stats = cuda.local.array(AHEAD_WORDS, F32)
            result4 = cuda.local.array(4, F32)
            base = ticket * U64(MAX_SPLITS)
            for i in range(QUADS_PER_THREAD):
                e = U32(U32(thread + U32(i * THREADS)) * U32(4))
                if e < U32(heads * U32(DIM)):
                    h = U64(e // U32(DIM))
                    for j in range(4):
                        result4[j] = F32(0.0)
                    highest = F32(NOTHING)
                    mass = F32(0.0)
                    at = U32(0)
                    while at < splits:
                        for j in range(FOLD_AHEAD):
                            if U32(at + U32(j)) < splits:
                                slot = base + U64(at) + U64(j)
                                x = ptx.load16_fresh(partial_sums, slot * U64(OUTPUTS) + U64(e))
                                y = (slot * U64(HEADS) + h) * U64(2)
                                for k in range(4):
                                    read[4 * j + k] = x[k]
                                stats[2 * j] = ptx.load_fresh(partial_stats, y)
                                stats[2 * j + 1] = ptx.load_fresh(partial_stats, y + U64(1))
                        for j in range(FOLD_AHEAD):
                            if U32(at + U32(j)) < splits:
                                top = highest
                                new_mass = mass
                                for k in range(4):
                                    value, top, new_mass = fold(
                                        result4[k], highest, mass,
                                        read[4 * j + k], stats[2 * j], stats[2 * j + 1],
                                    )  # fmt: skip
                                    result4[k] = value
                                highest = top
                                mass = new_mass
                        at = U32(at + U32(FOLD_AHEAD))
                    scale = ptx.reciprocal(mass)
                    for k in range(4):
                        x = ptx.U16(pack(result4[k] * scale, F32(0.0)) & U32(0xFFFF))
                        out[first_out + U64(e) + U64(k)] = x

    return Folding(
        ptx.device(finish_split),
        ptx.device(finish),
        PER_THREAD * THREADS,
        WARPS * OUTPUTS,
        WARPS * HEADS,
    )
