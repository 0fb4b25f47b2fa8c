"""Scattering new keys and values into the paged cache."""

from __future__ import annotations

from .bfloat16 import Array, narrow, widen
from .validation import check_slots, check_write_kv


def write_kv(
    key: Array, value: Array, key_cache: Array, value_cache: Array, slot_mapping: Array
) -> None:
    """Write each token's key and value heads into its slot.

    A slot is ``block * block_size + offset``, so seen as ``[num_slots, num_kv_heads, head_dim]``
    the cache is indexed by it directly. With ``block_size`` 4, slot 9 is the second place of
    block 2.

    Args:
        key: ``[num_tokens, num_kv_heads, head_dim]``.
        value: likewise.
        key_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]``, contiguous; float32,
            float16, or bfloat16 (also as uint16): values are rounded to nearest, ties to even.
        value_cache: likewise.
        slot_mapping: ``[num_tokens]`` int64; -1 is padding and is skipped. Of two tokens with one
            slot the later stays.

    Raises:
        ValueError: where a shape does not fit or a slot is not in the cache.
    """
    check_write_kv(key, value, key_cache, value_cache, slot_mapping)
    check_slots(slot_mapping, key_cache)
    real = slot_mapping >= 0  # [num_tokens]
    slots = slot_mapping[real]
    blocks, offsets = slots // key_cache.shape[1], slots % key_cache.shape[1]
    key_cache[blocks, offsets] = narrow(widen(key[real]), key_cache.dtype)
    value_cache[blocks, offsets] = narrow(widen(value[real]), value_cache.dtype)
