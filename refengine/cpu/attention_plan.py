"""Cutting a batch into items of work that threads take one after another."""

from __future__ import annotations

from typing import Any

import numpy as np

from refengine.cpu.attention_tile import NARROW_ROWS, tile_tokens
from refengine.cpu.jit import inner

UNLIMITED = 2**62  # a window that no sequence is as long as
_COST_CLASSES = 63


@inner
def sequences_fit(
    num_tokens: int, num_blocks: int, block_size: int, block_tables: Any, seq_lens: Any,
    query_start_loc: Any, window: int,
) -> bool:  # fmt: skip
    """Whether everything that a batch's tables name exists (``validation.check_sequences``)."""
    num_seqs, max_blocks = block_tables.shape
    if query_start_loc[0] != 0 or query_start_loc[num_seqs] != num_tokens:
        return False
    for seq in range(num_seqs):
        seq_len = int(seq_lens[seq])
        query_len = int(query_start_loc[seq + 1]) - int(query_start_loc[seq])
        if query_len < 0 or seq_len < 0 or seq_len > max_blocks * block_size:
            return False
        if seq_len == 0:
            continue
        if query_len > seq_len:
            return False
        first = max(0, seq_len - query_len - window + 1) // block_size
        for column in range(first, (seq_len + block_size - 1) // block_size):
            if block_tables[seq, column] < 0 or block_tables[seq, column] >= num_blocks:
                return False
    return True


@inner
def most_items(query_start_loc: Any, group: int, num_kv_heads: int) -> int:
    """Items that a batch has at most: rows that ``plan_items`` may fill."""
    num_seqs: int = query_start_loc.shape[0] - 1
    return (num_seqs + int(query_start_loc[num_seqs]) // tile_tokens(group)) * num_kv_heads


@inner
def plan_items(
    seq_lens: Any, query_start_loc: Any, group: int, num_kv_heads: int, window: int, workers: int,
    items: Any,
) -> tuple[int, int]:  # fmt: skip
    """List the calls of ``attend`` that a batch needs, those with most work first.

    Threads that take them in this order finish together: what is left for the end is short.

    Args:
        seq_lens: ``[num_seqs]`` int32.
        query_start_loc: ``[num_seqs + 1]`` int32.
        group: query heads a KV head.
        num_kv_heads: of the cache.
        window: tokens a query sees, or ``UNLIMITED``.
        workers: threads; results do not depend on it.
        items: ``[most_items(...), 6]`` int64; receives sequence, first token (in the batch),
            number of tokens, the first token's position in its sequence, first KV head, and number
            of KV heads.

    Returns:
        How many items there are, and how many products of a query and a key, roughly.
    """
    step = tile_tokens(group)
    places = np.zeros(_COST_CLASSES, np.int64)
    total = 0
    products = 0
    # Items are sorted by their work's power of two: counted in a first pass, placed in a second.
    for place in range(2):
        if place:
            for c in range(_COST_CLASSES - 1, -1, -1):
                total, places[c] = total + places[c], total
        for seq in range(seq_lens.shape[0]):
            if seq_lens[seq] == 0:
                continue
            begin, end = int(query_start_loc[seq]), int(query_start_loc[seq + 1])
            for token in range(begin, end, step):
                count = min(step, end - token)
                position = int(seq_lens[seq]) - (end - token)
                # Few sequences: their heads are shared out, so that no thread is idle.
                together = count * group <= NARROW_ROWS and seq_lens.shape[0] >= 2 * workers
                heads = num_kv_heads if together else 1
                work = heads * group * count * min(position + count, window + count)
                cost = 0
                while work >> cost > 1:
                    cost += 1
                for kv_head in range(0, num_kv_heads, heads):
                    if place:
                        at = places[cost]
                        items[at, 0], items[at, 1], items[at, 2] = seq, token, count
                        items[at, 3], items[at, 4], items[at, 5] = position, kv_head, heads
                        products += work
                    places[cost] += 1
    return total, products
