"""Finding a tile of keys in the pages of a sequence, and bringing it near."""

from __future__ import annotations

from typing import Any

from refengine.cpu.jit import inlined, inner
from refengine.cpu.simd import LANES
from refengine.cpu.simd_memory import fetch_ahead, load_first, store


@inner
def locate_keys(
    block_tables: Any, table_start: int, block_size: int, token_stride: int, head_start: int,
    tile: int, key_first: int, key_stop: int, offsets: Any,
) -> None:  # fmt: skip
    """Where the keys of one tile lie in the cache.

    Places of the tile outside ``key_first .. key_stop - 1`` repeat a valid one: they may be scored,
    four keys at a time, but are never given weight.

    Args:
        block_tables: flat int32; the sequence's row begins at ``table_start``.
        table_start: element offset.
        block_size: tokens a block.
        token_stride: elements of one token in the cache.
        head_start: of the wanted head among them.
        tile: the tile's first key, counted in the sequence.
        key_first: the first key that may be read, likewise.
        key_stop: one past the last.
        offsets: ``[tile's keys]`` int64; receives element offsets.
    """
    size = offsets.shape[0]
    begin, end = max(key_first - tile, 0), min(key_stop - tile, size)
    index, offset = (tile + begin) // block_size, (tile + begin) % block_size
    slot = int(block_tables[table_start + index]) * block_size + offset
    first = slot * token_stride + head_start
    for k in range(begin):
        offsets[k] = first
    for k in range(begin, end):
        offsets[k] = slot * token_stride + head_start
        slot += 1
        offset += 1
        if offset == block_size and k + 1 < end:
            index, offset = index + 1, 0
            slot = int(block_tables[table_start + index]) * block_size
    for k in range(end, size):
        offsets[k] = first


@inlined
def ask_for(cache: Any, start: int, count: int) -> None:
    """Let ``count`` elements of a cache come from memory, from ``start`` on, while others are used.

    Args:
        cache: flat.
        start: element offset.
        count: elements; 0 asks for nothing.
    """
    for i in range(0, count, 64 // cache.itemsize):
        fetch_ahead(cache, start + i)


@inner
def copy_keys(
    key_cache: Any, value_cache: Any, head_dim: int, padded: int, offsets: Any, shift: int,
    first: int, stop: int, scratch: Any, copies: int,
) -> None:  # fmt: skip
    """Widen keys ``first .. stop - 1`` of a tile, and their values, into the scratch.

    Args:
        key_cache: flat, float32 or bfloat16 as uint16.
        value_cache: likewise.
        head_dim: elements of a head.
        padded: elements of a row in the scratch; the rest is zero.
        offsets: where keys lie, less ``shift``.
        shift: added to every offset.
        first: of the tile's keys.
        stop: of the tile's keys.
        scratch: flat float32.
        copies: key k goes to ``copies + k * padded``; values follow after a whole tile of keys.
    """
    values = copies + offsets.shape[0] * padded
    for k in range(first, stop):
        for i in range(0, padded, LANES):
            source, rest, to = offsets[k] + shift + i, head_dim - i, k * padded + i
            store(scratch, copies + to, load_first(key_cache, source, rest))
            store(scratch, values + to, load_first(value_cache, source, rest))
