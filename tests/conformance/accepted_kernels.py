"""Correct kernels that are unlike ours: torch's attention, and other orders of summation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

F32 = np.float32


def torch_attention(
    query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, scale,
    sliding_window, logits_soft_cap, out,
):  # fmt: skip
    """torch's scaled_dot_product_attention, page tables gathered; soft caps by its formula."""
    import torch

    block_size, group = key_cache.shape[1], query.shape[1] // key_cache.shape[2]
    for s, length in enumerate(seq_lens.tolist()):
        first, end = query_start_loc[s : s + 2].tolist()
        if first == end:
            continue
        if length == 0:
            out[first:end] = 0
            continue
        blocks = block_tables[s, : -(-length // block_size)].long()
        keys = key_cache[blocks].flatten(0, 1)[:length].repeat_interleave(group, 1).transpose(0, 1)
        values = value_cache[blocks].flatten(0, 1)[:length].repeat_interleave(group, 1)
        values = values.transpose(0, 1)
        q = query[first:end].transpose(0, 1).to(keys.dtype)
        distance = torch.arange(length - (end - first), length)[:, None] - torch.arange(length)
        seen = distance >= 0
        if sliding_window is not None:
            seen &= distance < sliding_window
        if logits_soft_cap is None:
            result = torch.nn.functional.scaled_dot_product_attention(
                q[None], keys[None], values[None], attn_mask=seen, scale=scale
            )[0]
        else:
            scores = (q.float() @ keys.float().transpose(1, 2)) * scale
            scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
            weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
            result = weights.to(values.dtype) @ values
        out[first:end] = result.transpose(0, 1).to(out.dtype)


def backwards_attention(*arguments: Any) -> None:
    """One key after the other, the last first, with a running softmax in base 2."""
    _attention(*arguments, order="backwards")


def split_attention(*arguments: Any) -> None:
    """Keys in seven interleaved parts that are merged by their log-sum-exps, tree-wise."""
    _attention(*arguments, order="split")


def _attention(
    query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, scale,
    sliding_window, logits_soft_cap, out, order,
):  # fmt: skip
    block_size, group = key_cache.shape[1], query.shape[1] // key_cache.shape[2]
    for s, length in enumerate(seq_lens.tolist()):
        first, end = int(query_start_loc[s]), int(query_start_loc[s + 1])
        for token in range(first, end):
            position = length - (end - token)
            oldest = max(0, position - sliding_window + 1) if sliding_window else 0
            places = np.arange(oldest, position + 1)
            if length == 0 or places.size == 0:
                out[token] = 0
                continue
            blocks, offsets = block_tables[s, places // block_size], places % block_size
            keys = key_cache[blocks, offsets].astype(F32).repeat(group, axis=1)
            values = value_cache[blocks, offsets].astype(F32).repeat(group, axis=1)
            q = query[token].astype(F32)
            scores = np.einsum("hd,nhd->nh", q * F32(scale), keys)
            if logits_soft_cap:
                scores = F32(logits_soft_cap) * np.tanh(scores / F32(logits_soft_cap))
            rule = _backwards if order == "backwards" else _split
            out[token] = rule(scores.astype(F32), values).astype(out.dtype)


def _backwards(scores, values):
    log2e = F32(np.log2(np.e))
    top, mass = np.full(scores.shape[1], -np.inf, F32), np.zeros(scores.shape[1], F32)
    sums = np.zeros(values.shape[1:], F32)
    for score, value in zip(scores[::-1], values[::-1], strict=True):
        higher = np.maximum(top, score)
        shrink, weight = np.exp2((top - higher) * log2e), np.exp2((score - higher) * log2e)
        sums = sums * shrink[:, None] + weight[:, None] * value
        mass, top = mass * shrink + weight, higher
    return sums / mass[:, None]


def _split(scores, values):
    parts = []
    for i in range(min(7, len(scores))):
        some, their = scores[i::7], values[i::7]
        top = some.max(axis=0)
        weights = np.exp(some - top)
        mass = weights.sum(axis=0)
        parts.append(((weights[..., None] * their).sum(axis=0) / mass[:, None], top + np.log(mass)))
    while len(parts) > 1:
        (a, la), (b, lb) = parts.pop(), parts.pop()
        both = np.logaddexp(la, lb)
        merged = np.exp(la - both)[:, None] * a + np.exp(lb - both)[:, None] * b
        parts.insert(0, (merged.astype(F32), both))
    return parts[0][0]
