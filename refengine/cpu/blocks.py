"""Moving whole blocks of the cache; twin of reference/blocks.py."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from refengine.cpu.arrays import Array
from refengine.cpu.jit import parallel
from refengine.reference.validation import check_block_copies


def copy_blocks(key_caches: Array, value_caches: Array, block_mapping: Array) -> None:
    """Copy blocks inside every layer's cache, pair after pair.

    Args:
        key_caches: ``[num_layers, num_blocks, block_size, num_kv_heads, head_dim]``, contiguous.
        value_caches: likewise.
        block_mapping: ``[num_pairs, 2]`` int64, source and destination, carried out in order.

    Raises:
        ValueError: where a shape or dtype does not fit or a block is not in the cache.
    """
    swap_blocks(key_caches, value_caches, key_caches, value_caches, block_mapping)


def swap_blocks(
    source_key_caches: Array,
    source_value_caches: Array,
    destination_key_caches: Array,
    destination_value_caches: Array,
    block_mapping: Array,
) -> None:
    """Copy blocks from one set of caches into another.

    Args:
        source_key_caches: ``[num_layers, num_blocks, block_size, num_kv_heads, head_dim]``,
            contiguous, any dtype.
        source_value_caches: likewise.
        destination_key_caches: likewise; the number of blocks may differ.
        destination_value_caches: likewise.
        block_mapping: ``[num_pairs, 2]`` int64, source and destination, carried out in order.

    Raises:
        ValueError: where a shape or dtype does not fit or a block is not in its cache.
    """
    check_block_copies(
        source_key_caches,
        source_value_caches,
        destination_key_caches,
        destination_value_caches,
        block_mapping,
    )
    if block_mapping.size:
        _copy(
            _block_bytes("source_key_caches", source_key_caches),
            _block_bytes("source_value_caches", source_value_caches),
            _block_bytes("destination_key_caches", destination_key_caches),
            _block_bytes("destination_value_caches", destination_value_caches),
            np.ascontiguousarray(block_mapping, np.int64),
        )


def _block_bytes(name: str, caches: Array) -> Array:
    """All layers' caches as ``[num_layers, num_blocks, bytes]``."""
    if not caches.flags.c_contiguous:
        raise ValueError(
            f"{name} must be contiguous, "
            f"got shape {list(caches.shape)} with strides {list(caches.strides)} bytes"
        )
    return caches.view(np.uint8).reshape(*caches.shape[:2], -1)


@parallel
def _copy(
    source_keys: Any, source_values: Any, to_keys: Any, to_values: Any, block_mapping: Any
) -> None:
    # Each layer's keys and values are one thread's, so that pairs keep their order.
    for part in numba.prange(2 * source_keys.shape[0]):
        layer = part // 2
        source = source_keys[layer] if part % 2 == 0 else source_values[layer]
        destination = to_keys[layer] if part % 2 == 0 else to_values[layer]
        for pair in range(block_mapping.shape[0]):
            a, b = block_mapping[pair, 0], block_mapping[pair, 1]
            for i in range(source.shape[1]):
                destination[b, i] = source[a, i]
