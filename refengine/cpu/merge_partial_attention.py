"""Putting together attention over parts of the keys; twin of its namesake in reference/."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from refengine.cpu.arrays import Array
from refengine.cpu.jit import parallel
from refengine.cpu.rows import as_rows, row_start
from refengine.cpu.simd import LANES, first_lane, fma, splat
from refengine.cpu.simd_math import exp
from refengine.cpu.simd_memory import flat, load_first, store_first
from refengine.reference.validation import check_partial_attention

_NONE = np.float32(-np.inf)
_ZERO = np.float32(0.0)


def merge_partial_attention(partial_outputs: Array, log_sum_exps: Array, out: Array) -> None:
    """Merge results over disjoint parts of the keys into the result over all of them.

    Args:
        partial_outputs: ``[num_parts, num_tokens, num_q_heads, head_dim]`` float32.
        log_sum_exps: ``[num_parts, num_tokens, num_q_heads]`` float32; -inf for an empty part.
        out: ``[num_tokens, num_q_heads, head_dim]`` float32, contiguous along the last axis; zeros
            where no part has keys.

    Raises:
        ValueError: where shapes, dtypes or strides do not fit.
    """
    check_partial_attention(partial_outputs, log_sum_exps, out)
    _merge(
        np.ascontiguousarray(partial_outputs, np.float32),
        np.ascontiguousarray(log_sum_exps, np.float32),
        as_rows("out", out),
    )


@parallel
def _merge(partial_outputs: Any, log_sum_exps: Any, out: Any) -> None:
    num_parts, num_tokens, num_heads, head_dim = partial_outputs.shape
    for row in numba.prange(num_tokens * num_heads):
        token, head = row // num_heads, row % num_heads
        greatest = _NONE
        for part in range(num_parts):
            greatest = max(greatest, log_sum_exps[part, token, head])
        total = _ZERO
        for part in range(num_parts):
            if log_sum_exps[part, token, head] > _NONE:
                total += first_lane(exp(splat(log_sum_exps[part, token, head] - greatest)))
        for i in range(0, head_dim, LANES):
            rest = min(LANES, head_dim - i)
            merged = splat(_ZERO)
            for part in range(num_parts):
                if log_sum_exps[part, token, head] > _NONE:
                    share = exp(splat(log_sum_exps[part, token, head] - greatest))
                    at = (part * num_tokens * num_heads + row) * head_dim + i
                    merged = fma(share, load_first(flat(partial_outputs), at, rest), merged)
            if total > _ZERO:
                merged = merged / splat(total)
            store_first(flat(out), row_start(out, token, head) + i, merged, rest)
