"""Moving whole blocks: copy-on-write inside a cache, swapping between two."""

from __future__ import annotations

from .bfloat16 import Array
from .validation import check_block_copies


def copy_blocks(key_caches: Array, value_caches: Array, block_mapping: Array) -> None:
    """Copy blocks inside every layer's cache, pair after pair.

    Args:
        key_caches: ``[num_layers, num_blocks, block_size, num_kv_heads, head_dim]``.
        value_caches: likewise.
        block_mapping: ``[num_pairs, 2]`` int64, source and destination. Pairs are carried out in
            order, so a later one reads what an earlier one wrote.

    Raises:
        ValueError: where a shape does not fit or a block is not in the cache.
    """
    swap_blocks(key_caches, value_caches, key_caches, value_caches, block_mapping)


def swap_blocks(
    source_key_caches: Array,
    source_value_caches: Array,
    destination_key_caches: Array,
    destination_value_caches: Array,
    block_mapping: Array,
) -> None:
    """Copy blocks from one set of caches into another: device to host memory, or back.

    Args:
        source_key_caches: ``[num_layers, num_blocks, block_size, num_kv_heads, head_dim]``.
        source_value_caches: likewise.
        destination_key_caches: likewise; the number of blocks may differ.
        destination_value_caches: likewise.
        block_mapping: ``[num_pairs, 2]`` int64, source and destination, carried out in order.

    Raises:
        ValueError: where a shape does not fit or a block is not in its cache.
    """
    check_block_copies(
        source_key_caches,
        source_value_caches,
        destination_key_caches,
        destination_value_caches,
        block_mapping,
    )
    for source, destination in block_mapping:
        destination_key_caches[:, destination] = source_key_caches[:, source]
        destination_value_caches[:, destination] = source_value_caches[:, source]
