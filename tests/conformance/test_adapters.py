"""Other projects' signatures and cache layouts, on NumPy functions that have them."""

from __future__ import annotations

import numpy as np
import pytest

from refengine import reference
from refengine.conformance import check_kernel


def contract(q, k, v, table, lengths, starts, scale, window, cap):
    out = np.empty_like(q)
    reference.paged_attention(q, k, v, table, lengths, starts, scale, window, cap, out)
    return out


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    assert causal
    lengths = np.diff(cu_seqlens_k).astype(np.int32)
    assert max_seqlen_q == np.diff(cu_seqlens_q).max()
    assert max_seqlen_k == lengths.max()
    window = window_size[0] + 1 if window_size[0] >= 0 else None
    return contract(
        q, k, v, block_table, lengths, cu_seqlens_q, softmax_scale, window, softcap or None
    )


def unified_attention(
    q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal,
    window_size, block_table, softcap, q_descale, k_descale, v_descale, alibi_slopes=None,
):  # fmt: skip
    assert causal
    window = window_size[0] + 1 if window_size[0] >= 0 else None
    out[...] = contract(
        q, k, v, block_table, seqused_k, cu_seqlens_q, softmax_scale, window, softcap or None
    )


class PrefillWrapper:
    """The two methods of FlashInfer's ``BatchPrefillWithPagedKVCacheWrapper`` that are called."""

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads,
        num_kv_heads, head_dim_qk, page_size, *, causal, sm_scale, window_left, logits_soft_cap,
        q_data_type, kv_data_type,
    ):  # fmt: skip
        assert causal
        pages = np.diff(paged_kv_indptr)
        self.table = np.zeros((len(pages), max(pages.max(), 1)), np.int32)
        for row, first, count in zip(self.table, paged_kv_indptr, pages, strict=False):
            row[:count] = paged_kv_indices[first : first + count]
        lengths = np.maximum(pages - 1, 0) * page_size + paged_kv_last_page_len
        self.lengths, self.starts = lengths.astype(np.int32), qo_indptr
        self.options = (
            sm_scale, window_left + 1 if window_left >= 0 else None, logits_soft_cap or None
        )  # fmt: skip

    def run(self, q, paged_kv_cache):
        return contract(q, *paged_kv_cache, self.table, self.lengths, self.starts, *self.options)


def heads_first(
    query, key_cache, value_cache, block_tables, seq_lens, query_start_loc, scale,
    sliding_window, logits_soft_cap, out,
):  # fmt: skip
    assert key_cache.flags.c_contiguous
    caches = key_cache.swapaxes(1, 2), value_cache.swapaxes(1, 2)
    reference.paged_attention(
        query, *caches, block_tables, seq_lens, query_start_loc, scale, sliding_window,
        logits_soft_cap, out,
    )  # fmt: skip


def heads_first_write(key, value, key_cache, value_cache, slot_mapping):
    size = key_cache.shape[2]
    for t, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            key_cache[slot // size, :, slot % size] = key[t]
            value_cache[slot // size, :, slot % size] = value[t]


@pytest.mark.parametrize(
    ("kernel", "function", "options"),
    [
        ("paged_attention", flash_attn_varlen_func, {"adapter": "flash_attn"}),
        ("paged_attention", unified_attention, {"adapter": "vllm"}),
        ("paged_attention", PrefillWrapper, {"adapter": "flashinfer"}),
        ("paged_attention", PrefillWrapper(), {"adapter": "flashinfer"}),
        ("paged_attention", heads_first, {"layout": "HND"}),
        ("write_kv", heads_first_write, {"layout": "HND"}),
        (
            "write_kv",
            lambda key, value, k, v, slots, kind, k_scale, v_scale: reference.write_kv(
                key, value, k, v, slots
            ),
            {"adapter": "vllm"},
        ),
        (
            "rms_norm",
            lambda out, input, weight, epsilon: reference.rms_norm(input, weight, epsilon, out),
            {"adapter": "vllm"},
        ),
        ("silu_and_mul", lambda out, x: reference.silu_and_mul(x, out), {"adapter": "vllm"}),
        (
            "rotary_embedding",
            lambda positions, query, key, size, table, is_neox: reference.rotary_embedding(
                positions, *(a.reshape(len(a), -1, size) for a in (query, key)), table
            ),
            {"adapter": "vllm"},
        ),
    ],
)
def test_a_function_of_that_signature_passes(kernel, function, options) -> None:
    report = check_kernel(kernel, function, **options)
    assert report.passed, report.text()


def test_a_mistake_is_seen_through_an_adapter() -> None:
    def off_by_one(*arguments, window_size, **named):
        window_size = (window_size[0] + 1, 0) if window_size[0] >= 0 else window_size
        return flash_attn_varlen_func(*arguments, window_size=window_size, **named)

    report = check_kernel("paged_attention", off_by_one, adapter="flash_attn")
    assert {failure.hint for failure in report.failures} == {"sliding window one token too long"}
