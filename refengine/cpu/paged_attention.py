"""Causal attention over a paged KV cache; twin of reference/paged_attention.py.

The work on one tile of query tokens is in attention_tile.py, the cutting of a batch into items in
attention_plan.py; here threads take items from a queue.
"""

from __future__ import annotations

import threading
from typing import Any

import numba
import numpy as np

from refengine.cpu.arrays import FLOAT32, Array, aligned_empty
from refengine.cpu.attention_plan import UNLIMITED, most_items, plan_items, sequences_fit
from refengine.cpu.attention_tile import TILE_KEYS, attend_address, scratch_size
from refengine.cpu.calls import call_address
from refengine.cpu.jit import inner, parallel
from refengine.cpu.simd_memory import fetch_add, flat
from refengine.cpu.write_kv import cache_bits
from refengine.reference.validation import check_paged_attention, check_sequences

# Fewer products of a query and a key than this are done before other threads have woken up.
_SERIAL_PRODUCTS = 1 << 12
_scratch = threading.local()


def paged_attention(
    query: Array,
    key_cache: Array,
    value_cache: Array,
    block_tables: Array,
    seq_lens: Array,
    query_start_loc: Array,
    scale: float,
    sliding_window: int | None,
    logits_soft_cap: float | None,
    out: Array,
) -> None:
    """Attend from each sequence's newest tokens to all of its tokens, page by page.

    See ``refengine.reference.paged_attention.paged_attention`` for what it computes. A token's
    result has the same bits in every batch, chunk and number of threads.

    Args:
        query: ``[num_tokens, num_q_heads, head_dim]`` float32; a token's heads lie together.
        key_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]``, float32 or bfloat16 (or
            its uint16 view), contiguous.
        value_cache: likewise.
        block_tables: ``[num_seqs, max_blocks]`` int32.
        seq_lens: ``[num_seqs]`` int32.
        query_start_loc: ``[num_seqs + 1]`` int32.
        scale: multiplies query-key products.
        sliding_window: tokens that a query sees, itself included; None for all.
        logits_soft_cap: scaled products become ``cap * tanh(x / cap)``; None leaves them.
        out: like query; receives the result.

    Raises:
        ValueError: where shapes, dtypes or strides do not fit, or a table names what does not
            exist.
    """
    check_paged_attention(
        query,
        key_cache,
        value_cache,
        block_tables,
        seq_lens,
        query_start_loc,
        sliding_window,
        logits_soft_cap,
        out,
    )
    keys, values = cache_bits("key_cache", key_cache), cache_bits("value_cache", value_cache)
    _check_heads("query", query)
    _check_heads("out", out)
    group, head_dim = query.shape[1] // key_cache.shape[2], query.shape[2]
    threads = numba.get_num_threads()
    scratch, offsets = _thread_scratch(threads, group, key_cache.shape[2], head_dim)
    fits = _attend_batch(
        attend_address(keys.dtype),
        query,
        keys,
        values,
        np.ascontiguousarray(block_tables, np.int32),
        np.ascontiguousarray(seq_lens, np.int32),
        np.ascontiguousarray(query_start_loc, np.int32),
        np.float32(scale),
        UNLIMITED if sliding_window is None else sliding_window,
        np.float32(0.0 if logits_soft_cap is None else logits_soft_cap),
        out,
        scratch,
        offsets,
        threads,
    )
    if not fits:
        check_sequences(query, key_cache, block_tables, seq_lens, query_start_loc, sliding_window)


def _check_heads(name: str, array: Array) -> None:
    """A token's heads must be float32 and lie together; tokens may have any stride."""
    wanted = (array.shape[2] * 4, 4)
    if array.dtype != FLOAT32 or (array.strides[1:] != wanted and array.size):
        raise ValueError(
            f"{name} must be float32 with strides [any, {wanted[0]}, {wanted[1]}] bytes, "
            f"got {array.dtype} with strides {list(array.strides)}"
        )


def _thread_scratch(
    threads: int, group: int, num_kv_heads: int, head_dim: int
) -> tuple[Array, Array]:
    """Scratch for every thread, kept for the next call from the same Python thread."""
    size = scratch_size(group, num_kv_heads, head_dim)
    kept: tuple[Array, Array] | None = getattr(_scratch, "arrays", None)
    if kept is None or kept[0].shape[0] < threads or kept[0].shape[1] < size:
        offsets = np.empty((threads, 3 * TILE_KEYS), np.int64)
        kept = aligned_empty((threads, size), np.float32), offsets
        _scratch.arrays = kept
    return kept


@parallel
def _attend_batch(
    attend: int, query: Any, key_cache: Any, value_cache: Any, block_tables: Any, seq_lens: Any,
    query_start_loc: Any, scale: Any, window: int, soft_cap: Any, out: Any, scratch: Any,
    offsets: Any, threads: int,
) -> bool:  # fmt: skip
    num_blocks, block_size, num_kv_heads, _ = key_cache.shape
    group = query.shape[1] // num_kv_heads
    if not sequences_fit(
        query.shape[0], num_blocks, block_size, block_tables, seq_lens, query_start_loc, window
    ):
        return False
    # 1 Queries of empty sequences see nothing.
    for seq in range(seq_lens.shape[0]):
        if seq_lens[seq] == 0:
            _fill_with_zeros(out, query_start_loc[seq], query_start_loc[seq + 1])
    # 2 Plan, and let the threads work through the queue.
    items = np.empty((most_items(query_start_loc, group, num_kv_heads), 6), np.int64)
    num_items, products = plan_items(
        seq_lens, query_start_loc, group, num_kv_heads, window, threads, items
    )
    queue = np.empty(1, np.int64)
    queue[0] = 0  # np.zeros would be spread over the threads
    if threads == 1 or products < _SERIAL_PRODUCTS:
        _work_through(
            attend, query, key_cache, value_cache, block_tables, scale, window, soft_cap, out,
            items, num_items, queue, scratch, offsets, np.int64(0),
        )  # fmt: skip
    else:
        for worker in numba.prange(threads):
            _work_through(
                attend, query, key_cache, value_cache, block_tables, scale, window, soft_cap, out,
                items, num_items, queue, scratch, offsets, np.int64(worker),
            )  # fmt: skip
    return True


@inner
def _fill_with_zeros(out: Any, first: int, stop: int) -> None:
    out[first:stop] = np.float32(0.0)


@inner
def _work_through(
    attend: int, query: Any, key_cache: Any, value_cache: Any, block_tables: Any, scale: Any,
    window: int, soft_cap: Any, out: Any, items: Any, num_items: int, queue: Any, scratch: Any,
    offsets: Any, worker: Any,
) -> None:  # fmt: skip
    """One thread's part: take the next item until there is none."""
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    group = query.shape[1] // num_kv_heads
    query_stride, out_stride = query.strides[0] // 4, out.strides[0] // 4
    while True:
        item = fetch_add(queue, 0, 1)
        if item >= num_items:
            break
        seq, token, count = items[item, 0], items[item, 1], items[item, 2]
        position, kv_head, heads = items[item, 3], items[item, 4], items[item, 5]
        head = kv_head * group * head_dim
        call_address(
            attend, flat(query), token * query_stride + head, query_stride, group, count, position,
            flat(key_cache), flat(value_cache), num_kv_heads, head_dim, kv_head, heads,
            flat(block_tables), seq * block_tables.shape[1], block_size,
            scale, window, soft_cap,
            flat(out), token * out_stride + head, out_stride,
            flat(scratch), worker * scratch.shape[1], offsets[worker],
        )  # fmt: skip
