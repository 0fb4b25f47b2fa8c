"""Putting together attention that was computed over parts of the keys."""

from __future__ import annotations

import numpy as np

from .bfloat16 import Array, narrow, widen
from .validation import check_partial_attention


def merge_partial_attention(partial_outputs: Array, log_sum_exps: Array, out: Array) -> None:
    """Merge results over disjoint parts of the keys into the result over all of them.

    A part's softmax is divided by its own sum of exponentials, ``exp(log_sum_exp)``, instead of the
    whole sum; weighting each part by its share of the whole undoes that. One long sequence can so
    be spread over many processors (Flash-Decoding, Dao et al. 2023).

    Args:
        partial_outputs: ``[num_parts, num_tokens, num_q_heads, head_dim]``. What an empty part
            holds does not matter.
        log_sum_exps: ``[num_parts, num_tokens, num_q_heads]`` float32, the logarithm of each
            part's sum of ``exp(score)``; -inf for a part without visible keys.
        out: ``[num_tokens, num_q_heads, head_dim]``; zeros where no part has keys.

    Raises:
        ValueError: where a shape does not fit.
    """
    check_partial_attention(partial_outputs, log_sum_exps, out)
    # 1 The parts' shares, computed like a softmax; a row without any key gets shares of zero.
    greatest = log_sum_exps.max(axis=0, initial=-np.inf)  # [num_tokens, num_q_heads]
    shares = np.exp(log_sum_exps - np.where(np.isneginf(greatest), 0, greatest))
    total = shares.sum(axis=0)  # [num_tokens, num_q_heads]
    shares = np.divide(shares, total, out=np.zeros_like(shares), where=total > 0)
    # 2 The weighted sum. An empty part may hold NaN, which a share of zero would not remove.
    shares = shares[..., np.newaxis]
    parts = np.where(shares > 0, widen(partial_outputs), np.float32(0))
    out[:] = narrow((shares * parts).sum(axis=0, dtype=np.float32), out.dtype)
