"""Kernels of the contract with switches, each of which plants one mistake.

Written apart from the suite's own table of mistakes (and in another way: page by page, with a
running softmax), so that recognising one by the other means something.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

F32 = np.float32


class Bugs(dict):
    """Switches by name; what is not planted is off."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


def attention(**planted: Any) -> Any:
    """Paged attention, page by page (Milakov and Gimelshein 2018)."""
    bug = Bugs(planted)
    remembered: dict[Any, Any] = {}
    calls = [0]

    def paged_attention(
        query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, scale,
        sliding_window, logits_soft_cap, out,
    ):  # fmt: skip
        calls[0] += 1
        num_blocks, block_size, num_kv_heads, head_dim = key_cache.shape
        num_q_heads = query.shape[1]
        group = num_q_heads // num_kv_heads if not bug.group else bug.group
        heads = np.arange(num_q_heads)
        kv = {
            None: np.minimum(heads // group, num_kv_heads - 1),
            "modulo": heads % num_kv_heads,
            "first": heads * 0,
        }[bug.heads]
        kv_values = heads % num_kv_heads if bug.value_heads == "modulo" else kv
        if bug.hnd:
            shape = (num_blocks, num_kv_heads, block_size, head_dim)
            key_cache = key_cache.reshape(shape).swapaxes(1, 2)
            value_cache = value_cache.reshape(shape).swapaxes(1, 2)
        if bug.swapped:
            key_cache, value_cache = value_cache, key_cache
        size = bug.block_size or block_size
        equal = query.shape[0] // len(seq_lens)
        for s, length in enumerate(seq_lens.tolist()):
            rows = slice(int(query_start_loc[s]), int(query_start_loc[s + 1]))
            if bug.equal_chunks:
                rows = slice(s * equal, (s + 1) * equal)
            count = rows.stop - rows.start
            if bug.max_queries and count > bug.max_queries:
                rows = slice(rows.start, rows.start + bug.max_queries)
                positions = np.arange(length - count, length)[: bug.max_queries]
            else:
                positions = np.arange(length - count, length)
            if length == 0:
                if not bug.skips_empty:
                    out[rows] = 0
                continue
            if count == 0:
                continue
            if bug.top_left:
                positions = np.arange(count)
            q = query[rows].astype(F32).swapaxes(0, 1)
            table = block_tables[0 if bug.first_row else s]
            pages = -(-length // size)
            if bug.drops_partial:
                pages = length // size
            if bug.pages == "sorted":
                table = np.sort(table[:pages])
            elif bug.pages == "reversed":
                table = table[:pages][::-1]
            elif bug.pages == "logical":
                table = np.arange(pages) % num_blocks
            top = np.full(q.shape[:2], -np.inf, F32)
            mass, sums = np.zeros(q.shape[:2], F32), np.zeros(q.shape, F32)
            for page in range(pages + (1 if bug.past_table else 0)):
                if bug.max_context and page * size >= bug.max_context:
                    break
                reach = int(positions[-1]) - (sliding_window or 0) + 1
                if bug.skips_by_last and sliding_window and (page + 1) * size <= reach:
                    continue
                block = int(table[page])
                keep = min(size, length - page * size)
                if bug.whole_block or bug.past_table:
                    keep = size
                first = 1 if bug.drops_first and page == 0 else 0
                inside = slice(first, keep)
                index: Any = block
                if bug.int32:
                    row = block_size * num_kv_heads * head_dim
                    index = int(np.int64(block * row).astype(np.int32)) // row
                keys = key_cache[index, inside].astype(F32).swapaxes(0, 1)
                if bug.stale_keys:
                    memory = key_cache.__array_interface__["data"][0], key_cache.shape
                    if remembered.get("of") != memory:
                        remembered.clear()
                        remembered["of"] = memory
                    keys = remembered.setdefault(block, key_cache[index].astype(F32))
                    keys = keys[inside].swapaxes(0, 1)
                values = value_cache[index, inside].astype(F32).swapaxes(0, 1)
                at = np.arange(page * size, page * size + size)[inside]
                keys, values = keys[kv], values[kv_values]
                if bug.tail:
                    dims = max(bug.tail, head_dim // bug.tail * bug.tail)
                    scores = q[..., :dims] @ keys[..., :dims].swapaxes(1, 2)
                elif bug.max_dim:
                    scores = q[..., : bug.max_dim] @ keys[..., : bug.max_dim].swapaxes(1, 2)
                else:
                    scores = q @ keys.swapaxes(1, 2)
                distance = positions[:, None] - at
                seen = distance >= {None: 0, "ahead": -1, "behind": 1, "none": -(10**9)}[bug.causal]
                if sliding_window and not bug.no_window:
                    seen &= distance < sliding_window + (bug.window or 0)
                if bug.whole_block or bug.past_table:
                    seen &= at < length
                if bug.finite_mask:
                    scores = np.where(seen, scores, F32(-1e4))
                if logits_soft_cap and bug.cap == "before scale":
                    scores = F32(logits_soft_cap) * np.tanh(scores / F32(logits_soft_cap))
                scores = scores * F32({None: scale, "none": 1.0, "twice": scale**2}[bug.scale])
                if bug.cap == "after mask":
                    scores = np.where(seen, scores, F32(-np.inf))
                if logits_soft_cap and bug.cap in (None, "after mask"):
                    scores = F32(logits_soft_cap) * np.tanh(scores / F32(logits_soft_cap))
                if not bug.finite_mask and bug.cap != "after mask":
                    scores = np.where(seen, scores, F32(-np.inf))
                if bug.half_scores:
                    scores = scores.astype(np.float16).astype(F32)
                higher = np.maximum(top, scores.max(axis=-1, initial=-np.inf))
                if bug.shared_maximum:
                    higher = np.broadcast_to(higher.max(axis=0), higher.shape)
                if bug.no_maximum:
                    higher = np.zeros_like(top)
                safe = np.where(np.isneginf(higher), 0, higher)
                weights = np.exp(scores - safe[..., None])
                shrink = np.exp(np.where(np.isneginf(top), -np.inf, top - safe))
                if bug.no_maximum:
                    shrink = np.ones_like(top)
                if bug.race and calls[0] % 3 == 0 and page == pages - 1 and pages > 1:
                    values = values * 0  # read before the others had written them
                sums_shrink = np.where(mass > 0, 1, shrink) if bug.sums_not_rescaled else shrink
                mass_shrink = np.where(mass > 0, 1, shrink) if bug.mass_not_rescaled else shrink
                sums = sums * sums_shrink[..., None].astype(F32) + weights @ values
                mass = mass * mass_shrink.astype(F32) + weights.sum(axis=-1)
                if bug.half_sums:
                    sums = sums.astype(ml_dtypes.bfloat16).astype(F32)
                top = higher
            if bug.divisor == "none":
                mass = np.ones_like(mass)
            elif bug.divisor == "length":
                mass = np.full_like(mass, length)
            result = (sums / mass[..., None]).swapaxes(0, 1)
            if bug.value_tail:
                result[..., head_dim // bug.value_tail * bug.value_tail :] = 0
            if bug.spoils is not None:
                sequence, token, head, dim = bug.spoils
                if s == sequence and token < count:
                    result[token, head, dim] += 0.5
            out[rows] = result.astype(out.dtype)

    return paged_attention


def write_kv(**planted: Any) -> Any:
    """Scatter into slots."""
    bug = Bugs(planted)

    def kernel(key, value, key_cache, value_cache, slot_mapping):
        num_blocks, block_size, heads, head_dim = key_cache.shape
        if bug.swapped:
            key, value = value, key
        slots = slot_mapping.tolist()
        for t, wanted in enumerate(slots):
            slot = wanted
            if bug.last_token and t == len(slots) - 1:
                continue
            if slot < 0:
                if bug.padding is None:
                    continue
                slot = num_blocks * block_size - 1 if bug.padding == "last" else 0
            elif bug.slot_zero and slot == 0:
                continue
            slot = (slot + (bug.shift or 0)) % (num_blocks * block_size)
            block, offset = divmod(slot, block_size)
            if bug.int32:
                row = block_size * heads * head_dim
                element = int(np.int64(slot * heads * head_dim).astype(np.int32))
                block, offset = element // row, element % row // (heads * head_dim)
            for source, cache in ((key, key_cache), (value, value_cache)):
                if bug.keys_only and cache is value_cache:
                    continue
                new = source[t]
                if bug.truncates:
                    bits = new.astype(F32).view(np.uint32) & 0xFFFF0000
                    new = bits.view(F32)
                if bug.tail:
                    new = new[:, : max(bug.tail, head_dim // bug.tail * bug.tail)]
                width = new.shape[-1]
                if bug.hnd:
                    view = cache.reshape(num_blocks, heads, block_size, head_dim)
                    view[block, :, offset, :width] = new.astype(cache.dtype)
                else:
                    cache[block, offset, :, :width] = new.astype(cache.dtype)

    return kernel


def copy_blocks(**planted: Any) -> Any:
    """Copy inside one set of caches."""
    inner = swap_blocks(**planted)

    def kernel(key_caches, value_caches, block_mapping):
        sources = [key_caches, value_caches]
        if planted.get("at_once"):
            sources = [c.copy() for c in sources]
        inner(*sources, key_caches, value_caches, block_mapping)

    return kernel


def swap_blocks(**planted: Any) -> Any:
    """Copy from one set of caches into another."""
    bug = Bugs(planted)

    def kernel(
        source_key_caches, source_value_caches, destination_key_caches, destination_value_caches,
        block_mapping,
    ):  # fmt: skip
        pairs = block_mapping.tolist()
        for pair in pairs[: -1 if bug.last_pair else None]:
            a, b = reversed(pair) if bug.exchanged else pair
            a, b = a % source_key_caches.shape[1], b % destination_key_caches.shape[1]
            layers = slice(0, 1) if bug.first_layer else slice(None)
            size = source_key_caches.shape[2]
            rows = slice(0, max(size // 2, 1)) if bug.half_block else slice(None)
            destination_key_caches[layers, b, rows] = source_key_caches[layers, a, rows]
            if not bug.keys_only:
                destination_value_caches[layers, b, rows] = source_value_caches[layers, a, rows]

    return kernel


def rms_norm(**planted: Any) -> Any:
    """Normalise rows."""
    bug = Bugs(planted)

    def kernel(x, weight, eps, out):
        wide = x.astype(F32)
        if bug.centred:
            wide = wide - wide.mean(axis=-1, keepdims=True)
        width = min(bug.columns or wide.shape[-1], wide.shape[-1])
        squares = (wide[..., :width] ** 2).sum(axis=-1, keepdims=True)
        mean = squares / F32(1 if bug.no_mean else wide.shape[-1])
        if bug.half:
            mean = mean.astype(np.float16).astype(F32)
        eps = F32(0 if bug.no_eps else eps)
        scale = 1 / (np.sqrt(mean) + eps) if bug.eps_outside else 1 / np.sqrt(mean + eps)
        result = wide * scale
        if not bug.no_weight:
            result = result * weight.astype(F32)
        if bug.one_row:
            result[1:] = result[:1]
        out[...] = result.astype(out.dtype)

    return kernel


def fused_add_rms_norm(**planted: Any) -> Any:
    """Add, then normalise."""
    bug = Bugs(planted)
    norm = rms_norm(**planted)

    def kernel(x, residual, weight, eps, out):
        total = (residual.astype(F32) + x.astype(F32)).astype(residual.dtype)
        norm(x.copy() if bug.before else total, weight, eps, out)
        if not bug.not_stored:
            residual[...] = total

    return kernel


def rotary_embedding(**planted: Any) -> Any:
    """Rotate in place."""
    bug = Bugs(planted)

    def kernel(positions, query, key, cos_sin_cache):
        half = cos_sin_cache.shape[1] // 2
        if bug.own_positions:
            positions = np.arange(positions.size)
        rows = cos_sin_cache[np.minimum(positions + (bug.shift or 0), len(cos_sin_cache) - 1)]
        cos, sin = rows[:, None, :half], rows[:, None, half:] * (-1 if bug.sign else 1)
        for heads in (query,) if bug.query_only else (query, key):
            pairs = (slice(0, half), slice(half, 2 * half))
            if bug.neighbours:
                pairs = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
            if bug.whole_head:  # the half of the head, not of what is rotated
                half = heads.shape[2] // 2
                wide = min(half, cos.shape[2])
                pairs = (slice(0, wide), slice(half, half + wide))
                cos, sin = cos[..., :wide], sin[..., :wide]
            a, b = heads[..., pairs[0]].astype(F32), heads[..., pairs[1]].astype(F32)
            heads[..., pairs[0]] = (a * cos - b * sin).astype(heads.dtype)
            if bug.stale:
                a = heads[..., pairs[0]].astype(F32)
            heads[..., pairs[1]] = (b * cos + a * sin).astype(heads.dtype)

    return kernel


def silu_and_mul(**planted: Any) -> Any:
    """Gate."""
    bug = Bugs(planted)

    def kernel(x, out):
        wide = x.astype(F32)
        gate, up = np.split(wide, 2, axis=1)
        if bug.neighbours:
            gate, up = wide[:, ::2], wide[:, 1::2]
        if bug.exchanged:
            gate, up = up, gate
        with np.errstate(all="ignore"):
            if bug.overflows:
                result = gate * np.exp(gate) / (1 + np.exp(gate)) * up
            elif bug.sigmoid:
                result = up / (1 + np.exp(-gate))
            else:
                result = gate / (1 + np.exp(-gate)) * up
        out[...] = result.astype(out.dtype)

    return kernel


def merge_partial_attention(**planted: Any) -> Any:
    """Merge parts."""
    bug = Bugs(planted)

    def kernel(partial_outputs, log_sum_exps, out):
        sums = log_sum_exps
        with np.errstate(all="ignore"):
            greatest = sums.max(axis=0)
            if bug.no_maximum:
                greatest = np.zeros_like(greatest)
            elif not bug.nan_rows:
                greatest = np.where(np.isneginf(greatest), 0, greatest)
            power = np.exp2 if bug.base_two else np.exp
            weights = power(sums - greatest)
            if bug.average:
                weights = np.isfinite(sums).astype(F32)
            total = weights.sum(axis=0)
            shares = weights if bug.not_divided else weights / np.where(
                (total > 0) | bool(bug.nan_rows), total, 1)  # fmt: skip
            parts = partial_outputs
            if not bug.leaks:
                parts = np.where(np.isneginf(sums)[..., None], 0, parts)
            out[...] = (shares[..., None] * parts).sum(axis=0).astype(out.dtype)

    return kernel


def top_k_top_p(**planted: Any) -> Any:
    """Filter rows of logits."""
    bug = Bugs(planted)

    def kernel(logits, top_k, top_p, out):
        out[...] = logits
        for r, row in enumerate(out):
            k, p = int(top_k[0 if bug.first_row else r]), float(top_p[0 if bug.first_row else r])
            if 0 < k < row.size:
                row[row < np.sort(row)[-min(k + (bug.more or 0), row.size) or -1]] = -np.inf
            if p < 1:
                weights = np.exp(row.astype(np.float64) - row.max())
                order = np.argsort(-weights, kind="stable")
                share = weights[order] / weights.sum()
                before = np.cumsum(share) - share
                dropped = before + share > p if bug.drops_crossing else before >= p
                dropped[0] = False
                row[order[dropped]] = -np.inf

    return kernel


def verify_draft_tokens(**planted: Any) -> Any:
    """Speculative sampling, one sequence after the other."""
    bug = Bugs(planted)

    def kernel(draft_token_ids, draft_probs, target_probs, uniforms, out):
        out[...] = -1
        for s in range(len(out)):
            n, rejected = 0, False
            for i, token in enumerate(draft_token_ids[s].tolist()):
                if token < 0:
                    break
                p, q = float(target_probs[s, i, token]), float(draft_probs[s, i, token])
                if bug.inverted:
                    p, q = q, p
                if bug.accepts_all or float(uniforms[s, i]) * q < p:
                    out[s, n] = token
                    n += 1
                else:
                    rejected = True
                    break
            weights = target_probs[s, n].astype(np.float64)
            if rejected and not bug.no_residual:
                weights = np.maximum(weights - draft_probs[s, n], 0)
            cumulative = np.cumsum(weights)
            wanted = float(uniforms[s, -1]) * cumulative[-1]
            if not (bug.no_bonus and not rejected):
                out[s, n] = min(np.searchsorted(cumulative, wanted, side="right"), weights.size - 1)

    return kernel
