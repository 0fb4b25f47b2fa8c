"""``linear``: rows times a packed matrix; twin of reference/linear.py.

A product ``out[T, N] = x[T, K] @ weight[N, K].T`` has two steps: rows of x become words (words.py),
then threads share the tiles out (matrix_product.py, tile_kernels.py). A few rows cost what reading
the weights costs, many rows what the multiplications cost.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from refengine.cpu.arrays import SERIAL_ELEMENTS, Array
from refengine.cpu.jit import parallel
from refengine.cpu.matrix_product import block_kernel, multiply_item, product_items
from refengine.cpu.packing import (
    PackedWeight,
    allocate_weights,
    embedding,
    prepare_weight,
    store_vector,
    store_weight,
)
from refengine.cpu.simd_memory import fetch_add, flat
from refengine.cpu.words import allocate_words, fill_words
from refengine.reference.validation import check_linear

__all__ = [
    "allocate_weights",
    "embedding",
    "linear",
    "prepare_weight",
    "store_vector",
    "store_weight",
]


def linear(x: Array, weight: PackedWeight, bias: Array | None, out: Array) -> None:
    """``out[t, o] = bias[o] + sum_i x[t, i] * weight[o, i]``.

    With bfloat16 weights x is rounded to bfloat16 first; sums are float32, in the order of i.

    Args:
        x: ``[num_tokens, in_features]`` float32.
        weight: from ``prepare_weight``, or one of a stack.
        bias: ``[out_features]`` float32, or None.
        out: ``[num_tokens, out_features]`` float32, rows contiguous.

    Raises:
        ValueError: where shapes, dtypes or strides do not fit.
    """
    _check(x, weight, bias, out)
    words = allocate_words(x.shape[0], weight.in_features, weight.panels.dtype)
    init = weight.no_bias if bias is None else np.array(bias)
    x = np.ascontiguousarray(x)
    kernel = block_kernel(weight.panels.dtype, words.dtype)
    _linear(kernel, x, weight.panels, init, words, out, numba.get_num_threads())


def _check(x: Array, weight: Any, bias: Array | None, out: Array) -> None:
    check_linear(x, weight, bias, out)  # a packed weight has its matrix' shape
    for name, array in (("x", x), ("bias", bias), ("out", out)):
        if array is not None and array.dtype != np.float32:
            raise ValueError(f"{name} must be float32, got {array.dtype}")
    if not out.flags.c_contiguous:
        raise ValueError(
            f"out must be contiguous, got shape {list(out.shape)} "
            f"with strides {list(out.strides)} bytes"
        )


@parallel
def _linear(
    kernel: int, x: Any, panels: Any, init: Any, words: Any, out: Any, workers: int
) -> None:
    num_tokens, in_features = x.shape
    if num_tokens * in_features < SERIAL_ELEMENTS:
        for t in range(num_tokens):
            fill_words(
                flat(x), t * in_features, flat(panels), flat(words), t * words.shape[1], 0,
                in_features,
            )  # fmt: skip
    else:
        for t in numba.prange(num_tokens):
            fill_words(
                flat(x), t * in_features, flat(panels), flat(words), t * words.shape[1], 0,
                in_features,
            )  # fmt: skip
    items = product_items(out.shape[0], out.shape[1])
    queue = np.zeros(1, np.int64)
    for _ in numba.prange(workers):
        item = fetch_add(queue, 0, 1)
        while item < items:
            multiply_item(
                kernel, item, flat(panels), 0, panels.shape[1], flat(words),
                words.shape[1], flat(init), 0, flat(out), out.shape[0], out.shape[1],
            )  # fmt: skip
            item = fetch_add(queue, 0, 1)
