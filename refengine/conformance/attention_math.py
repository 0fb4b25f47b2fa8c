"""Attention three times: exactly (float64), densely in low precision, and wrongly on purpose.

``Variant()`` is the right one. Every other setting is a mistake that kernels have had; the suite
computes what each would give and names the one that a failing kernel agrees with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from refengine.conformance.precision import (
    SINGLE,
    UNIT_ROUNDOFF,
    Array,
    Float64,
    budget_unit,
    format_name,
    is_low,
    rounded,
    single,
    wide,
)

EXP_ROUNDING = 4 * SINGLE  # what hardware's exp2 is off by, relatively
FINITE_MASK = -1e4  # what a careless kernel adds to a score instead of minus infinity


@dataclass(frozen=True)
class Variant:
    """Switches; each away from its default is one mistake.

    Args:
        ahead: how many tokens after itself a query sees (-1: not even itself; None: all).
        top_left: query i of a chunk stands at position i, not after its context.
        window: added to the sliding window, or "ignored".
        cap: where the soft cap is applied.
        scale: how often the scale multiplies.
        heads: which key-value head a query head reads.
        value_heads: the same for values; None means as ``heads``.
        pages: the order of a sequence's blocks.
        last_block: what becomes of a block that is not full.
        first_token: the oldest token is left out.
        hnd: the cache is read as ``[block, head, slot, dim]``.
        swapped: keys are taken for values and values for keys.
        maximum: the greatest score is subtracted before exp.
        divisor: what the weighted sum is divided by.
        finite_mask: the mask is a large number, not infinity, and comes before the scale.
    """

    ahead: int | None = 0
    top_left: bool = False
    window: int | Literal["ignored"] = 0
    cap: Literal["right", "ignored", "after mask", "before scale"] = "right"
    scale: int = 1
    heads: Literal["grouped", "modulo", "first"] = "grouped"
    value_heads: Literal["grouped", "modulo", "first"] | None = None
    pages: Literal["table", "logical", "sorted", "reversed", "first row"] = "table"
    last_block: Literal["right", "dropped", "whole", "next"] = "right"
    first_token: bool = True
    hnd: bool = False
    swapped: bool = False
    maximum: bool = True
    divisor: Literal["sum", "none", "length"] = "sum"
    finite_mask: bool = False


RIGHT = Variant()


@dataclass(frozen=True)
class Rows:
    """One sequence's part of a batch."""

    sequence: int
    rows: slice
    seq_len: int
    query_positions: Array


def sequences(arguments: dict[str, Any]) -> Iterator[Rows]:
    """The sequences that have query tokens."""
    starts = arguments["query_start_loc"].tolist()
    for sequence, seq_len in enumerate(arguments["seq_lens"].tolist()):
        rows = slice(starts[sequence], starts[sequence + 1])
        length = rows.stop - rows.start
        if length:
            yield Rows(sequence, rows, seq_len, np.arange(seq_len - length, seq_len))


def slots_of(arguments: dict[str, Any], sequence: int, positions: Array, pages: str) -> Array:
    """The slots of a sequence's tokens, ``block * block_size + offset``; -1 outside the cache."""
    num_blocks, block_size = arguments["key_cache"].shape[:2]
    table = arguments["block_tables"][0 if pages == "first row" else sequence]
    used = -(-int(arguments["seq_lens"][sequence]) // block_size)
    if pages == "sorted":
        table = np.concatenate([np.sort(table[:used]), table[used:]])
    elif pages == "reversed":
        table = np.concatenate([table[:used][::-1], table[used:]])
    elif pages == "logical":
        table = np.arange(table.size) % num_blocks
    blocks = table[np.minimum(positions // block_size, table.size - 1)].astype(np.int64)
    inside = (blocks >= 0) & (blocks < num_blocks)
    return np.where(inside, blocks * block_size + positions % block_size, -1)


def gather(cache: Array, slots: Array, heads: Array, hnd: bool = False) -> Array:
    """Rows of the cache for each query head, ``[num_q_heads, len, head_dim]``; NaN outside."""
    num_blocks, block_size, num_kv_heads, head_dim = cache.shape
    blocks, offsets = slots // block_size, slots % block_size
    if hnd:
        cache = cache.reshape(num_blocks, num_kv_heads, block_size, head_dim).swapaxes(1, 2)
    rows: Array = cache[blocks, offsets].swapaxes(0, 1)[heads]  # [num_q_heads, len, head_dim]
    if (slots < 0).any():
        rows = np.where((slots < 0)[:, np.newaxis], rows.dtype.type(np.nan), rows)
    return rows


def head_map(num_q_heads: int, num_kv_heads: int, kind: str) -> Array:
    """The key-value head of each query head."""
    heads = np.arange(num_q_heads)
    if kind == "modulo":
        return np.asarray(heads % num_kv_heads)
    out: Array = heads * 0 if kind == "first" else heads // (num_q_heads // num_kv_heads)
    return out


def visible(part: Rows, keys: Array, window: int | None, variant: Variant) -> Array:
    """Which key positions a query sees, ``[query_len, key_len]``."""
    positions = part.query_positions
    if variant.top_left:
        positions = np.arange(positions.size)
    distances = positions[:, np.newaxis] - keys
    seen = np.ones(distances.shape, bool)
    if variant.ahead is not None:
        seen &= distances >= -variant.ahead
    if window is not None and variant.window != "ignored":
        seen &= distances < window + variant.window
    return seen


def attend(arguments: dict[str, Any], variant: Variant = RIGHT) -> Float64:
    """Attention in float64, right or with one mistake: ``[num_tokens, num_q_heads, head_dim]``."""
    query = arguments["query"]
    out = np.zeros(query.shape)
    for part in sequences(arguments):
        if part.seq_len:
            with np.errstate(all="ignore"):
                out[part.rows] = _attend_one(arguments, part, variant).swapaxes(0, 1)
    return out


def _key_positions(arguments: dict[str, Any], part: Rows, variant: Variant) -> Array:
    block_size = arguments["key_cache"].shape[1]
    end = part.seq_len
    if variant.last_block == "dropped":
        end -= end % block_size
    elif variant.last_block in ("whole", "next"):
        end = (-(-end // block_size) + (variant.last_block == "next")) * block_size
    return np.arange(0 if variant.first_token else 1, end)


def _attend_one(arguments: dict[str, Any], part: Rows, variant: Variant) -> Float64:
    query = wide(arguments["query"][part.rows]).swapaxes(0, 1)  # [num_q_heads, query_len, d]
    caches = arguments["key_cache"], arguments["value_cache"]
    key_cache, value_cache = caches[::-1] if variant.swapped else caches
    scale, window = arguments["scale"], arguments["sliding_window"]
    cap = arguments["logits_soft_cap"]
    num_q_heads, num_kv_heads = query.shape[0], key_cache.shape[2]
    positions = _key_positions(arguments, part, variant)
    slots = slots_of(arguments, part.sequence, positions, variant.pages)
    heads = head_map(num_q_heads, num_kv_heads, variant.heads)
    value_heads = head_map(num_q_heads, num_kv_heads, variant.value_heads or variant.heads)
    keys = wide(gather(key_cache, slots, heads, variant.hnd))
    values = wide(gather(value_cache, slots, value_heads, variant.hnd))
    scores = query @ keys.swapaxes(1, 2)  # [num_q_heads, query_len, key_len]
    seen = visible(part, positions, window, variant)
    if variant.last_block in (
        "whole",
        "next",
    ):  # the mask hides what lies past the end, NaN times 0 stays
        seen = seen & (positions < part.seq_len)
    if variant.finite_mask:
        scores = np.where(seen, scores, FINITE_MASK)
    if cap is not None and variant.cap == "before scale":
        scores = cap * np.tanh(scores / cap)
    scores = scores * scale**variant.scale
    if cap is not None and variant.cap == "right":
        scores = cap * np.tanh(scores / cap)
    if not variant.finite_mask:
        scores = np.where(seen, scores, -np.inf)
    if cap is not None and variant.cap == "after mask":
        scores = cap * np.tanh(scores / cap)
    if variant.maximum:
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-1e30))
    else:
        weights = wide(np.exp(scores.astype(np.float32)))
    out: Float64 = weights @ values
    if variant.divisor == "sum":
        out /= weights.sum(axis=-1, keepdims=True)
    elif variant.divisor == "length":
        out /= part.seq_len
    return out


def dense_low_precision(arguments: dict[str, Any], out_dtype: Any) -> Array:
    """The same mathematics in the arguments' precision, summed one after another in float32.

    Where keys and values have 16 bits, the query and the softmax's weights are rounded to them, as
    tensor cores ask for, and so is the soft cap's tanh, which hardware approximates to 11 bits.
    """
    query, cache = arguments["query"], arguments["key_cache"]
    low, cap = cache.dtype if is_low(cache.dtype) else None, arguments["logits_soft_cap"]
    out = np.zeros(query.shape, np.float32)
    for part in sequences(arguments):
        if not part.seq_len:
            continue
        q = single(rounded(query[part.rows], low) if low else query[part.rows]).swapaxes(0, 1)
        positions = np.arange(part.seq_len)
        slots = slots_of(arguments, part.sequence, positions, "table")
        heads = head_map(q.shape[0], cache.shape[2], "grouped")
        keys = single(gather(cache, slots, heads))
        values = single(gather(arguments["value_cache"], slots, heads))
        scores = np.zeros((*q.shape[:2], part.seq_len), np.float32)
        for d in range(q.shape[2]):
            scores += q[:, :, d, np.newaxis] * keys[:, np.newaxis, :, d]
        scores *= np.float32(arguments["scale"])
        if cap is not None:
            tanh = np.tanh(scores / np.float32(cap))
            scores = np.float32(cap) * (single(rounded(tanh, low)) if low else tanh)
        seen = visible(part, positions, arguments["sliding_window"], RIGHT)
        scores = np.where(seen, scores, np.float32(-np.inf))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        total = np.cumsum(weights, axis=-1, dtype=np.float32)[..., -1:]
        if low:
            weights = single(rounded(weights, low))
        sums = np.zeros(q.shape, np.float32)
        for j in range(part.seq_len):
            sums += weights[:, :, j, np.newaxis] * values[:, np.newaxis, j]
        out[part.rows] = (sums / total).swapaxes(0, 1)
    return rounded(out, out_dtype)


def first_order_errors(arguments: dict[str, Any], exact: Float64, out_dtype: Any) -> Float64:
    """How far one rounding in each place would move each element: the budget's weights.

    Sums that cancel, and softmaxes that hang on a few large scores, magnify rounding; this says by
    how much, so that a ratio means the same everywhere.
    """
    query, cache = arguments["query"], arguments["key_cache"]
    scale, cap = arguments["scale"], arguments["logits_soft_cap"]
    low = UNIT_ROUNDOFF[format_name(cache.dtype)]
    unit = budget_unit(format_name(out_dtype), exact)
    for part in sequences(arguments):
        if not part.seq_len:
            continue
        q = wide(query[part.rows]).swapaxes(0, 1)
        positions = np.arange(part.seq_len)
        slots = slots_of(arguments, part.sequence, positions, "table")
        heads = head_map(q.shape[0], cache.shape[2], "grouped")
        keys = wide(gather(cache, slots, heads))
        values = wide(gather(arguments["value_cache"], slots, heads))
        scores = q @ keys.swapaxes(1, 2) * scale
        moved = SINGLE * scale * (np.abs(q) @ np.abs(keys).swapaxes(1, 2))
        if is_low(cache.dtype) and query.dtype != cache.dtype:  # the query is rounded
            lost = np.abs(q - wide(rounded(q, cache.dtype)))
            moved += scale * (lost @ np.abs(keys).swapaxes(1, 2))
        if cap is not None:
            capped = cap * np.tanh(scores / cap)
            moved = moved * (1 - (capped / cap) ** 2) + low * np.abs(capped)
            scores = capped
        moved += SINGLE * np.abs(scores)
        seen = visible(part, positions, arguments["sliding_window"], RIGHT)
        scores = np.where(seen, scores, -np.inf)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        here = exact[part.rows].swapaxes(0, 1)  # [num_q_heads, query_len, d]
        spread = p * moved
        # sum_j spread_j * |v_j - out|, at most sum_j spread_j * |v_j| + |out| * sum_j spread_j
        both = ((low + EXP_ROUNDING) * p + spread) @ np.abs(values)
        both += spread.sum(-1, keepdims=True) * np.abs(here)
        unit[part.rows] += both.swapaxes(0, 1)
    return unit
