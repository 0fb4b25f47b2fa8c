"""Batches for attention kernels, and what they must give, computed densely in float64.

A case is made from whole keys and values per sequence, which are then cut into pages one token at a
time; what is expected comes from the whole ones, so that it shares no code or idea with a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

GARBAGE = 2**30  # a block that no cache has, in table entries that nobody may read
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass
class Case:
    """Arguments of ``paged_attention``, and what they were made from."""

    query: Any
    key_cache: Any
    value_cache: Any
    block_tables: Any
    seq_lens: Any
    query_start_loc: Any
    scale: float
    window: int | None
    cap: float | None
    keys: list[Any]  # of each sequence, [seq_len, num_kv_heads, head_dim]
    values: list[Any]

    def run(self, kernels: Any) -> Any:
        """What a kernel set gives; out begins as NaN, so what it leaves unwritten shows."""
        out = np.full(self.query.shape, np.nan, np.float32)
        kernels.paged_attention(
            self.query,
            self.key_cache,
            self.value_cache,
            self.block_tables,
            self.seq_lens,
            self.query_start_loc,
            self.scale,
            self.window,
            self.cap,
            out,
        )
        return out

    def expected(self, attend: Any = None) -> Any:
        """The dense computation, float64 unless another is given."""
        attend = attend or dense_attention
        out = np.zeros(self.query.shape)
        for seq, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            rows = slice(self.query_start_loc[seq], self.query_start_loc[seq + 1])
            if len(keys) and rows.stop > rows.start:
                query = self.query[rows]
                out[rows] = attend(query, keys, values, self.scale, self.window, self.cap)
        return out


def dense_attention(query, keys, values, scale, window, cap, dtype=np.float64):
    """Causal attention of the newest tokens, head by head, every step rounded to ``dtype``.

    Products of bfloat16 are summed in float32 and rounded once, as hardware does.
    """
    wide = np.promote_types(dtype, np.float32)
    query_len, num_q_heads, head_dim = query.shape
    seq_len, num_kv_heads, _ = keys.shape
    positions = range(seq_len - query_len, seq_len)
    hidden = np.ones((query_len, seq_len), bool)
    for row, position in enumerate(positions):
        oldest = 0 if window is None else max(0, position - window + 1)
        hidden[row, oldest : position + 1] = False
    out = np.empty((query_len, num_q_heads, head_dim))
    scores = np.empty((query_len, seq_len), wide)  # one head's; in place, since it is large

    def round_scores():
        if dtype != wide:
            scores[:] = scores.astype(dtype)

    for head in range(num_q_heads):
        kv_head = head * num_kv_heads // num_q_heads
        low = query[:, head].astype(dtype).astype(wide)
        key = keys[:, kv_head].astype(dtype).astype(wide)
        value = values[:, kv_head].astype(dtype).astype(wide)
        np.matmul(low, key.T, out=scores)
        round_scores()
        scores *= wide.type(scale)
        round_scores()
        if cap is not None:
            scores /= cap
            np.tanh(scores, out=scores)
            scores *= cap
            round_scores()
        scores[hidden] = -np.inf
        scores -= scores.max(axis=1, keepdims=True)
        np.exp(scores, out=scores)
        round_scores()
        scores /= scores.sum(axis=1, keepdims=True)
        round_scores()
        out[:, head] = (scores @ value).astype(dtype)
    return out


def make_case(
    lengths,
    *,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=32,
    block_size=16,
    dtype="float32",
    window=None,
    cap=None,
    scale=None,
    shared_tokens=0,
    whole_numbers=None,
    rounded=False,
    seed=0,
):
    """A batch of sequences.

    Args:
        lengths: (seq_len, query_len) of each sequence.
        num_q_heads: heads of the query.
        num_kv_heads: heads of the cache.
        head_dim: elements of a head.
        block_size: tokens a block.
        dtype: of the cache.
        window: sliding window.
        cap: soft cap of the logits.
        scale: of the logits; one over the root of head_dim by default.
        shared_tokens: the first so many tokens are the same in all sequences that are as long, in
            the same blocks (a multiple of block_size).
        whole_numbers: draw whole numbers up to this size, whose products float32 holds exactly.
        rounded: keys and values that bfloat16 holds, whatever the cache's dtype.
        seed: of the random numbers.
    """
    random = np.random.default_rng(seed)
    kept = DTYPES[dtype]

    def draw(*shape):
        if whole_numbers is not None:
            return random.integers(-whole_numbers, whole_numbers + 1, shape).astype(np.float32)
        return random.standard_normal(shape).astype(np.float32)

    # 1 Whole keys and values. Some values are large, so that a wrong weight shows.
    keys, values = [], []
    head = (num_kv_heads, head_dim)
    prefix_keys, prefix_values = draw(shared_tokens, *head), draw(shared_tokens, *head)
    for seq_len, _ in lengths:
        key, value = draw(seq_len, *head), draw(seq_len, *head)
        if shared_tokens and seq_len >= shared_tokens:
            key[:shared_tokens], value[:shared_tokens] = prefix_keys, prefix_values
        low = ml_dtypes.bfloat16 if rounded else kept
        keys.append(key.astype(low).astype(kept))
        values.append(value.astype(low).astype(kept))
    # 2 Pages, in any order; slots that no token owns are NaN, entries past a table's end garbage.
    shared_blocks = shared_tokens // block_size
    counts = [-(-seq_len // block_size) for seq_len, _ in lengths]
    num_blocks = sum(counts) + shared_blocks + 2
    free = random.permutation(num_blocks).tolist()
    shared = [free.pop() for _ in range(shared_blocks)]
    key_cache = np.full((num_blocks, block_size, *head), np.nan, kept)
    value_cache = key_cache.copy()
    block_tables = np.full((len(lengths), max([1, *counts])), GARBAGE, np.int32)
    for seq, (seq_len, _) in enumerate(lengths):
        use_shared = shared_tokens and seq_len >= shared_tokens
        for column in range(counts[seq]):
            block = shared[column] if use_shared and column < shared_blocks else free.pop()
            block_tables[seq, column] = block
        for token in range(seq_len):
            block = block_tables[seq, token // block_size]
            key_cache[block, token % block_size] = keys[seq][token]
            value_cache[block, token % block_size] = values[seq][token]
    query_lens = [query_len for _, query_len in lengths]
    return Case(
        query=draw(sum(query_lens), num_q_heads, head_dim),
        key_cache=key_cache,
        value_cache=value_cache,
        block_tables=block_tables,
        seq_lens=np.array([seq_len for seq_len, _ in lengths], np.int32),
        query_start_loc=np.cumsum([0, *query_lens]).astype(np.int32),
        scale=head_dim**-0.5 if scale is None else scale,
        window=window,
        cap=cap,
        keys=keys,
        values=values,
    )


def relative_error(got, expected):
    """Largest difference, as a share of the largest expected number (infinite where got is NaN)."""
    difference = np.abs(got - expected)
    size = max(np.abs(expected).max(initial=0.0), np.finfo(np.float32).tiny)
    return np.inf if np.isnan(difference).any() else difference.max(initial=0.0) / size
