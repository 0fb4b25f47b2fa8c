"""Causal attention over a paged KV cache, in five steps."""

from __future__ import annotations

import numpy as np

from .bfloat16 import Array, Float32, narrow, widen
from .validation import check_paged_attention, check_sequences


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

    Keys and values of a sequence lie in blocks anywhere in the cache (PagedAttention, Kwon et al.
    2023, arXiv 2309.06180); its row of ``block_tables`` names them in order. The batch is flat:
    sequence s has the query tokens ``query_start_loc[s] .. query_start_loc[s + 1] - 1``, which are
    the last of its ``seq_lens[s]`` tokens. One query token is a decode, as many as the sequence has
    is a whole prompt, and anything between is a chunk of one.

    Example: ``block_size`` 4, ``seq_lens`` [6], ``block_tables`` [[7, 2]] and two query tokens, at
    positions 4 and 5. Tokens 0 to 3 lie in block 7, tokens 4 and 5 in the first half of block 2;
    the first query sees tokens 0 to 4, the second 0 to 5.

    Args:
        query: ``[num_tokens, num_q_heads, head_dim]``.
        key_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]``; float32, float16, or
            bfloat16 (also as uint16). Each key-value head serves ``num_q_heads / num_kv_heads``
            neighbouring query heads.
        value_cache: likewise.
        block_tables: ``[num_seqs, max_blocks]`` int32; entries past a sequence's end are not read.
        seq_lens: ``[num_seqs]`` int32, tokens in the cache, the query's own included. A sequence
            of length 0 reads nothing; its query tokens, if any, get zeros.
        query_start_loc: ``[num_seqs + 1]`` int32.
        scale: multiplies query-key products.
        sliding_window: a query at position p sees positions above p - sliding_window, itself
            included; None for all. Blocks that lie before every window are not read.
        logits_soft_cap: scaled products become ``cap * tanh(x / cap)``; None leaves them.
        out: like query; receives the result.

    Raises:
        ValueError: where a shape does not fit, or a table names what does not exist.
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
    check_sequences(query, key_cache, block_tables, seq_lens, query_start_loc, sliding_window)
    block_size = key_cache.shape[1]
    for seq, seq_len in enumerate(seq_lens.tolist()):
        rows = slice(int(query_start_loc[seq]), int(query_start_loc[seq + 1]))
        query_len = rows.stop - rows.start
        if seq_len == 0 or query_len == 0:
            out[rows] = 0
            continue
        query_positions = np.arange(seq_len - query_len, seq_len)  # [query_len]
        first = 0  # the oldest token that any query sees
        if sliding_window is not None:
            first = max(0, int(query_positions[0]) - sliding_window + 1)
        key_positions = np.arange(first, seq_len)  # [key_len]
        # 1 Gather the pages. Only slots that hold a token are read: the rest of the last block may
        #   hold anything, and NaN times a weight of zero would still be NaN.
        blocks = block_tables[seq, key_positions // block_size]  # [key_len]
        offsets = key_positions % block_size  # [key_len]
        keys = widen(key_cache[blocks, offsets])  # [key_len, num_kv_heads, head_dim]
        values = widen(value_cache[blocks, offsets])  # [key_len, num_kv_heads, head_dim]
        # 2 Scores of every query with every key, head by head.
        heads = widen(query[rows]).swapaxes(0, 1)  # [num_q_heads, query_len, head_dim]
        scores = heads @ _heads_for_queries(keys, heads).swapaxes(1, 2) * np.float32(scale)
        if logits_soft_cap is not None:
            scores = np.float32(logits_soft_cap) * np.tanh(scores / np.float32(logits_soft_cap))
        # 3 Mask: no query sees a later token, nor one that has left its window.
        distances = query_positions[:, np.newaxis] - key_positions  # [query_len, key_len]
        visible = distances >= 0
        if sliding_window is not None:
            visible &= distances < sliding_window
        scores = np.where(visible, scores, np.float32(-np.inf))  # [num_q_heads, query_len, key_len]
        # 4 Softmax. With the greatest score subtracted, exp cannot overflow.
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        # 5 Weighted values.
        result = weights @ _heads_for_queries(values, heads)  # [num_q_heads, query_len, head_dim]
        out[rows] = narrow(result.swapaxes(0, 1), out.dtype)


def _heads_for_queries(rows: Float32, queries: Float32) -> Float32:
    """``[len, num_kv_heads, d]`` to ``[num_q_heads, len, d]``: each head once a query head."""
    group = queries.shape[0] // rows.shape[1]
    return rows.swapaxes(0, 1).repeat(group, axis=0)
