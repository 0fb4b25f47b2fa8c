"""Cutting a batch into tiles of query tokens that threads take one after another."""

from __future__ import annotations

from typing import Any

import numpy as np

from refengine.cpu.attention_tile import tile_tokens
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
        seq_len = np.int64(seq_lens[seq])
        query_len = np.int64(query_start_loc[seq + 1]) - np.int64(query_start_loc[seq])
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
def most_tiles(query_start_loc: Any, group: int) -> int:
    """Tiles that a batch has at most: rows that ``plan_tiles`` may fill."""
    num_seqs = query_start_loc.shape[0] - 1
    return num_seqs + query_start_loc[num_seqs] // tile_tokens(group)


@inner
def plan_tiles(
    seq_lens: Any, query_start_loc: Any, group: int, window: int, tiles: Any
) -> tuple[int, int]:
    """List the tiles of a batch, most work first, so that the last ones to finish are short.

    Args:
        seq_lens: ``[num_seqs]`` int32.
        query_start_loc: ``[num_seqs + 1]`` int32.
        group: query heads a KV head.
        window: tokens a query sees, or ``UNLIMITED``.
        tiles: ``[most_tiles(...), 4]`` int64; receives sequence, first token (in the batch),
            number of tokens, and the first token's position in its sequence.

    Returns:
        How many tiles there are, and query-key pairs in all of them, roughly.
    """
    step = tile_tokens(group)
    places = np.zeros(_COST_CLASSES, np.int64)
    total = 0
    all_work = 0
    # Tiles are sorted by their work's power of two: counted in a first pass, placed in a second.
    for place in range(2):
        if place:
            for c in range(_COST_CLASSES - 1, -1, -1):
                total, places[c] = total + places[c], total
        for seq in range(seq_lens.shape[0]):
            if seq_lens[seq] == 0:
                continue
            begin, end = np.int64(query_start_loc[seq]), np.int64(query_start_loc[seq + 1])
            for token in range(begin, end, step):
                count = min(step, end - token)
                position = seq_lens[seq] - (end - token)
                work = count * min(position + count, window + count)
                cost = 0
                while work >> cost > 1:
                    cost += 1
                if place:
                    at = places[cost]
                    tiles[at, 0], tiles[at, 1] = seq, token
                    tiles[at, 2], tiles[at, 3] = count, position
                    all_work += work
                places[cost] += 1
    return total, all_work
