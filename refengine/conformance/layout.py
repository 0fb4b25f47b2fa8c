"""Laying sequences out in pages, as unkindly as the contract allows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from refengine.conformance.precision import Array

SPARE_BLOCKS = 3
# What a table may hold past a sequence's end; the block itself is full of NaN where it exists.
WILD = (-1, 2**31 - 1, -(2**31), 123_456_789)


@dataclass(frozen=True)
class Pages:
    """Block tables over a cache, and what is owned of it.

    Args:
        tables: ``[num_seqs, max_blocks]`` int32.
        num_blocks: of the cache.
        owned: ``[num_blocks, block_size]`` bool, slots that hold a token.
    """

    tables: Array
    num_blocks: int
    owned: Array


def lay_out(
    seq_lens: list[int],
    block_size: int,
    rng: np.random.Generator,
    *,
    table: str = "permuted",
    garbage: str = "nan block",
    num_blocks: int | None = None,
    min_block: int = 0,
) -> Pages:
    """Give every sequence its blocks.

    Args:
        seq_lens: tokens of each.
        block_size: tokens a block.
        rng: chooses the blocks.
        table: "permuted", "ordered", or "shared": sequences begin with the same full blocks.
        garbage: past a table's end, "nan block" (an existing block that nobody owns) or "wild".
        num_blocks: of the cache; None for a few more than needed.
        min_block: blocks below it are not used.
    """
    needed = [-(-length // block_size) for length in seq_lens]
    total = num_blocks or sum(needed) + SPARE_BLOCKS
    if num_blocks and min_block:  # a huge cache: from its far end
        ids = total - 1 - rng.permutation(min(sum(needed) + SPARE_BLOCKS, total - min_block))
    elif table == "ordered":
        ids = np.arange(total)
    else:
        ids = rng.permutation(total)
    nobody, free = int(ids[-1]), list(ids[:-1])
    tables = np.full((len(seq_lens), max([*needed, 0]) + 2), nobody, np.int32)
    if garbage == "wild":
        tables[:] = np.resize(np.array(WILD, np.int32), tables.shape)
    owned = np.zeros((total, block_size), bool) if total < 2**24 else np.zeros((0, block_size))
    for sequence, count in enumerate(needed):
        mine = [int(free.pop(0)) for _ in range(count)]
        if table == "shared" and sequence:
            full = min(seq_lens[0], seq_lens[sequence]) // block_size
            mine[:full] = tables[0, :full].tolist()
        tables[sequence, :count] = mine
        if owned.size:
            for number, block in enumerate(mine):
                owned[block, : min(block_size, seq_lens[sequence] - number * block_size)] = True
    return Pages(tables, total, owned)
