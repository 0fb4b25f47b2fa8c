"""Scattering new keys and values into the cache; twin of reference/write_kv.py."""

from __future__ import annotations

from typing import Any

import numba

from refengine.cpu.arrays import SERIAL_ELEMENTS, Array, bits
from refengine.cpu.jit import inner, parallel
from refengine.cpu.rows import as_rows, row_start
from refengine.cpu.simd import LANES
from refengine.cpu.simd_memory import flat, load_first, store_first
from refengine.reference.validation import check_slots, check_write_kv


def write_kv(
    key: Array, value: Array, key_cache: Array, value_cache: Array, slot_mapping: Array
) -> None:
    """Write each token's key and value heads into its slot; slot -1 is skipped.

    Args:
        key: ``[num_tokens, num_kv_heads, head_dim]`` float32, contiguous along the last axis.
        value: likewise.
        key_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]``, float32 or bfloat16 (or
            its uint16 view), rounded to nearest even; contiguous.
        value_cache: likewise.
        slot_mapping: ``[num_tokens]`` int64, block * block_size + offset.

    Raises:
        ValueError: where shapes, dtypes or strides do not fit, or a slot is not in the cache;
            nothing is written then.
    """
    check_write_kv(key, value, key_cache, value_cache, slot_mapping)
    rows = as_rows("key", key), as_rows("value", value)
    caches = cache_bits("key_cache", key_cache), cache_bits("value_cache", value_cache)
    loop = _write if key.size < SERIAL_ELEMENTS else _write_parallel
    if not loop(*rows, *caches, slot_mapping):
        check_slots(slot_mapping, key_cache)


def cache_bits(name: str, cache: Array) -> Array:
    """A cache as kernels read it: contiguous float32, or bfloat16 as uint16.

    Raises:
        ValueError: where it is neither.
    """
    cache = bits(cache)
    if cache.dtype.kind + str(cache.itemsize) not in ("f4", "u2"):
        raise ValueError(f"{name} must be float32 or bfloat16 on the CPU, got {cache.dtype}")
    if not cache.flags.c_contiguous:
        raise ValueError(
            f"{name} must be contiguous, "
            f"got shape {list(cache.shape)} with strides {list(cache.strides)} bytes"
        )
    return cache


@inner
def write_kv_head(source: Any, start: int, cache: Any, to: int, head_dim: int) -> None:
    """Copy (and round) one head, or several that lie together, into the cache; arrays are flat.

    Args:
        source: float32.
        start: element offset.
        cache: float32, or bfloat16 as uint16.
        to: element offset, ``(slot * num_kv_heads + head) * head_dim``.
        head_dim: how many elements.
    """
    for i in range(0, head_dim, LANES):
        rest = min(LANES, head_dim - i)
        store_first(cache, to + i, load_first(source, start + i, rest), rest)


@inner
def _slots_fit(key_cache: Any, slot_mapping: Any) -> bool:
    num_slots = key_cache.shape[0] * key_cache.shape[1]
    for t in range(slot_mapping.shape[0]):
        if slot_mapping[t] < -1 or slot_mapping[t] >= num_slots:
            return False
    return True


@inner
def _write_one_head(source: Any, h: int, cache: Any, slot_mapping: Any) -> None:
    """Every token's head h, in order: of two tokens with one slot the later stays."""
    _, num_kv_heads, head_dim = source.shape
    for t in range(slot_mapping.shape[0]):
        slot = slot_mapping[t]
        if slot >= 0:
            to = (slot * num_kv_heads + h) * head_dim
            write_kv_head(flat(source), row_start(source, t, h), flat(cache), to, head_dim)


@inner
def _write(key: Any, value: Any, key_cache: Any, value_cache: Any, slot_mapping: Any) -> bool:
    if not _slots_fit(key_cache, slot_mapping):
        return False
    for h in range(key.shape[1]):
        _write_one_head(key, h, key_cache, slot_mapping)
        _write_one_head(value, h, value_cache, slot_mapping)
    return True


@parallel
def _write_parallel(
    key: Any, value: Any, key_cache: Any, value_cache: Any, slot_mapping: Any
) -> bool:
    if not _slots_fit(key_cache, slot_mapping):
        return False
    for item in numba.prange(2 * key.shape[1]):
        if item % 2 == 0:
            _write_one_head(key, item // 2, key_cache, slot_mapping)
        else:
            _write_one_head(value, item // 2, value_cache, slot_mapping)
    return True
