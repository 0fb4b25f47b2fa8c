"""A matrix product cut into items for threads: which tiles each multiplies, in which order.

The outputs are cut into groups of ``TILE_PANELS`` panels, the rows into tiles. A group is
multiplied by all tiles of a block of rows before the next group's turn: its weights come from
memory once, and from the core's cache after that.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numba import types

from refengine.cpu.calls import call_address
from refengine.cpu.jit import compiled_address, inner
from refengine.cpu.packing import PANEL
from refengine.cpu.tile_kernels import (
    TILE_PANELS,
    TILE_ROWS,
    line_elements,
    multiply_tile,
    words_a_step,
)

# Rows of an item at most.
BLOCK_ROWS = 64
# Lines of a panel that are used at a time where there are several tiles: three panels of them stay
# in a core's second-level cache from one tile to the next.
BLOCK_STEPS = 2048


@inner
def product_items(num_tokens: int, out_features: int, workers: int) -> int:
    """How many items ``multiply_item`` cuts a product into, for threads to share."""
    group, blocks = _cut(num_tokens, out_features, workers)
    num_panels = -(-out_features // PANEL)
    return -(-num_panels // group) * blocks


@inner
def multiply_item(
    kernel: int, item: int, workers: int, weights: Any, weights_at: int, steps: int,
    words: Any, words_stride: int, init: Any, init_at: int,
    out: Any, num_tokens: int, out_features: int,
) -> None:  # fmt: skip
    """One part of a product: a group of panels by a block of rows.

    Neighbouring items share a group: its weights are in the cache when the next block comes.

    Args:
        kernel: from ``block_kernel``.
        item: 0 to ``product_items(...) - 1``.
        workers: threads that share the product; results do not depend on it.
        weights: flat packed matrix, or a stack.
        weights_at: where the matrix begins in it.
        steps: lines a panel.
        words: flat words of x.
        words_stride: words from row to row.
        init: flat float32 bias, or zeros.
        init_at: where it begins.
        out: flat float32, ``[num_tokens, out_features]``.
        num_tokens: rows.
        out_features: columns.
    """
    group, blocks = _cut(num_tokens, out_features, workers)
    num_panels = -(-out_features // PANEL)
    panel, block = item // blocks * group, item % blocks
    call_address(
        kernel, weights, weights_at, steps, words, words_stride, init, init_at, out, out_features,
        num_tokens * block // blocks, num_tokens * (block + 1) // blocks,
        panel, min(panel + group, num_panels),
    )  # fmt: skip


@inner
def _cut(num_tokens: int, out_features: int, workers: int) -> tuple[int, int]:
    """Panels an item, and blocks of rows."""
    num_groups = -(-out_features // (PANEL * TILE_PANELS))
    blocks = max(1, -(-num_tokens // BLOCK_ROWS))
    # A few large items would leave threads without work at the end.
    group = TILE_PANELS if num_groups * blocks >= 4 * workers else 1
    return group, blocks


@lru_cache
def block_kernel(weights: np.dtype[Any], words: np.dtype[Any]) -> int:
    """The address of ``_multiply_block`` compiled for weights and words of these dtypes.

    Callers call it by address (calls.py): its tiles take a second to compile.
    """
    pointers = [types.CPointer(numba.from_dtype(np.dtype(d))) for d in (weights, words)]
    sums, size = types.CPointer(types.float32), types.intp
    signature = types.void(
        pointers[0], size, size, pointers[1], size, sums, size, sums, size, *[size] * 4
    )
    return compiled_address(_multiply_block, signature)


def _multiply_block(
    weights: Any,
    weights_at: Any,
    steps: Any,
    words: Any,
    words_stride: Any,
    init: Any,
    init_at: Any,
    out: Any,
    out_features: Any,
    first_row: Any,
    last_row: Any,
    first_panel: Any,
    last_panel: Any,
) -> None:
    """Rows ``first_row .. last_row - 1`` by panels ``first_panel .. last_panel - 1``.

    Operands are pointers; the rest is as in ``multiply_item``.
    """
    line = line_elements(weights)
    panel_stride = steps * line
    num_rows = last_row - first_row
    num_tiles = -(-num_rows // TILE_ROWS)
    block_steps = BLOCK_STEPS if num_tiles > 1 else steps
    panel = first_panel
    while panel < last_panel:
        group = TILE_PANELS if last_panel - panel >= TILE_PANELS else 1
        columns = min(out_features - (panel + group - 1) * PANEL, PANEL)
        if columns < PANEL:
            group, columns = 1, min(out_features - panel * PANEL, PANEL)
        group_at = weights_at + panel * panel_stride
        for first_step in range(0, steps, block_steps):
            num_steps = min(block_steps, steps - first_step)
            for tile in range(num_tiles):
                row = first_row + num_rows * tile // num_tiles
                rows = first_row + num_rows * (tile + 1) // num_tiles - row
                out_at = row * out_features + panel * PANEL
                # The sums begin with the bias, later blocks of steps with what the first ones left.
                source, source_at, source_stride = init, init_at + panel * PANEL, 0
                if first_step > 0:
                    source, source_at, source_stride = out, out_at, out_features
                multiply_tile(
                    weights,
                    group_at + first_step * line,
                    panel_stride,
                    words,
                    row * words_stride + first_step * words_a_step(weights, words),
                    words_stride,
                    source,
                    source_at,
                    source_stride,
                    out,
                    out_at,
                    out_features,
                    num_steps,
                    rows,
                    group,
                    columns,
                )
        panel += group
