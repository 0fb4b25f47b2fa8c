"""Putting together attention over parts of the keys; twin of the reference's module."""

from __future__ import annotations

import functools
from typing import Any

from numba import cuda

from . import checks, launch, ptx
from .attention_rows import NOTHING
from .attention_vectors import LOG2_E
from .elements import elements
from .launch import Kernel
from .ptx import F32, U32, U64

Array = Any
THREADS = 128


def merge_partial_attention(partial_outputs: Array, log_sum_exps: Array, out: Array) -> None:
    """Merge results over disjoint parts of the keys (Flash-Decoding, Dao et al., 2023).

    Args:
        partial_outputs: ``[num_parts, num_tokens, num_q_heads, head_dim]``. What an empty part
            holds does not matter.
        log_sum_exps: ``[num_parts, num_tokens, num_q_heads]`` float32, the logarithm of each part's
            sum of ``exp(score)``; -inf for a part without visible keys.
        out: ``[num_tokens, num_q_heads, head_dim]``, written; zeros where no part has keys.

    Raises:
        ValueError: on shapes, dtypes or layouts that do not fit.
    """
    checks.check_array("partial_outputs", partial_outputs, (None, None, None, None))
    num_parts, num_tokens, num_heads, head_dim = partial_outputs.shape
    shape = (num_parts, num_tokens, num_heads)
    checks.check_array("log_sum_exps", log_sum_exps, shape, ("float32",))
    checks.check_array("out", out, partial_outputs.shape[1:])
    dtype = checks.check_same_dtype(partial_outputs=partial_outputs, out=out)
    size = num_tokens * num_heads * head_dim
    if size == 0:
        return
    pointer = elements(dtype, wide=False).pointer
    _kernel(dtype)(
        (-(-size // THREADS), 1, 1),
        launch.address(partial_outputs, pointer),
        launch.address(log_sum_exps, ptx.POINTER_F32),
        launch.address(out, pointer),
        num_parts,
        num_tokens * num_heads,
        head_dim,
    )


@functools.cache
def _kernel(dtype: str) -> Kernel:
    """A thread merges one element of the output."""
    part = elements(dtype, wide=False)
    load, store = part.load, part.store

    def merge(
        parts: Any, log_sums: Any, out: Any, num_parts: Any, num_rows: Any, head_dim: Any
    ) -> None:
        ptx.wait_for_previous_kernel()
        ptx.let_next_kernel_start()
        e = U64(cuda.blockIdx.x) * U64(THREADS) + U64(cuda.threadIdx.x)
        one = cuda.local.array(1, F32)
        if e < U64(num_rows) * U64(head_dim):
            row = e // U64(head_dim)
            highest = F32(NOTHING)
            for i in range(U32(num_parts)):
                highest = ptx.fmax(highest, log_sums[U64(i) * U64(num_rows) + row])
            value, mass = F32(0.0), F32(0.0)
            for i in range(U32(num_parts)):
                at = U64(i) * U64(num_rows) + row
                share = ptx.exp2((log_sums[at] - highest) * F32(LOG2_E))
                if share > F32(0.0):  # an empty part may hold NaN
                    load(parts, at * U64(head_dim) + e % U64(head_dim), one, 0)
                    value += share * one[0]
                    mass += share
            one[0] = F32(0.0)
            if mass > F32(0.0):
                one[0] = value / mass
            store(out, e, one, 0)

    parameters = (part.pointer, ptx.POINTER_F32, part.pointer, ptx.U32, ptx.U32, ptx.U32)
    return Kernel(merge, parameters, threads=THREADS)
