"""A matrix product cut into items for threads, each a panel of outputs by a block of rows.

A panel is multiplied by all tiles of its block, one after another: its weights come from memory
once, and from the core's cache after that.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import types

from refengine.cpu.calls import call_address
from refengine.cpu.jit import compiled_address, inner
from refengine.cpu.tile_kernels import (
    PANEL,
    TILE_ROWS,
    multiply_tile,
    step_elements,
    step_words,
)

# Rows of an item at most.
BLOCK_ROWS = 64
# Steps that are taken at a time where there are several tiles: so much of a panel stays in a core's
# second-level cache from one tile to the next.
BLOCK_STEPS = 2048


@inner
def product_items(num_tokens: int, out_features: int) -> int:
    """How many items ``multiply_item`` cuts a product into, for threads to share."""
    return -(-out_features // PANEL) * _row_blocks(num_tokens)


@inner
def multiply_item(
    kernel: int, item: int, weights: Any, weights_at: int, steps: int,
    words: Any, words_stride: int, init: Any, init_at: int,
    out: Any, num_tokens: int, out_features: int,
) -> None:  # fmt: skip
    """One part of a product.

    Neighbouring items share a panel: its weights are in the cache when the next block comes.

    Args:
        kernel: from ``block_kernel``.
        item: 0 to ``product_items(...) - 1``.
        weights: flat packed matrix, or a stack.
        weights_at: where the matrix begins in it.
        steps: of a panel.
        words: flat words of x.
        words_stride: words from row to row.
        init: flat float32 bias, or zeros.
        init_at: where it begins.
        out: flat float32, ``[num_tokens, out_features]``.
        num_tokens: rows.
        out_features: columns.
    """
    blocks = _row_blocks(num_tokens)
    panel, block = item // blocks, item % blocks
    call_address(
        kernel, weights, weights_at, steps, words, words_stride, init, init_at, out, out_features,
        num_tokens * block // blocks, num_tokens * (block + 1) // blocks, panel,
    )  # fmt: skip


@inner
def _row_blocks(num_tokens: int) -> int:
    return max(1, (num_tokens + BLOCK_ROWS - 1) // BLOCK_ROWS)


@cache
def block_kernel(weights: np.dtype[Any], words: np.dtype[Any]) -> int:
    """The address of ``_multiply_block`` compiled for weights and words of these dtypes.

    Callers call it by address (calls.py): its tiles take a second to compile.
    """
    pointers = [types.CPointer(numba.from_dtype(np.dtype(d))) for d in (weights, words)]
    sums, size = types.CPointer(types.float32), types.intp
    signature = types.void(
        pointers[0], size, size, pointers[1], size, sums, size, sums, size, size, size, size
    )
    return compiled_address(_multiply_block, signature)


def _multiply_block(
    weights: Any, weights_at: int, steps: int, words: Any, words_stride: int,
    init: Any, init_at: int, out: Any, out_features: int, first_row: int, last_row: int, panel: int,
) -> None:  # fmt: skip
    """Rows ``first_row .. last_row - 1`` by one panel.

    Operands are pointers; the rest is as in ``multiply_item``.
    """
    panel_at = weights_at + panel * steps * step_elements(weights)
    column = panel * PANEL
    columns = min(out_features - column, PANEL)
    num_rows = last_row - first_row
    num_tiles = (num_rows + TILE_ROWS - 1) // TILE_ROWS
    block_steps = BLOCK_STEPS if num_tiles > 1 else steps
    for step in range(0, steps, block_steps):
        for tile in range(num_tiles):
            row = first_row + num_rows * tile // num_tiles
            rows = first_row + num_rows * (tile + 1) // num_tiles - row
            out_at = row * out_features + column
            # Sums begin with the bias, later blocks of steps with what the earlier ones left.
            source, source_at, source_stride = init, init_at + column, 0
            if step > 0:
                source, source_at, source_stride = out, out_at, out_features
            multiply_tile(
                weights, panel_at + step * step_elements(weights),
                words, row * words_stride + step * step_words(weights, words), words_stride,
                source, source_at, source_stride,
                out, out_at, out_features,
                min(block_steps, steps - step), rows, columns,
            )  # fmt: skip
