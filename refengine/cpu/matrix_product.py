"""A worker's share of a matrix product: which tiles it multiplies, in which order.

The outputs are cut into groups of ``TILE_PANELS`` panels, the rows into tiles. A group is
multiplied by all tiles of a block of rows before the next group's turn: its weights come from
memory once, and from the core's cache after that.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types

from refengine.cpu.jit import compiled_address, inner
from refengine.cpu.packing import PANEL
from refengine.cpu.simd import intrinsic
from refengine.cpu.tile_kernels import (
    TILE_PANELS,
    TILE_ROWS,
    line_elements,
    multiply_tile,
    words_a_step,
)

# Rows that one thread multiplies with a group of panels before it turns to the next group.
BLOCK_ROWS = 64
# Lines of a panel that are used at a time where there are several tiles: three panels of them stay
# in a core's second-level cache from one tile to the next.
BLOCK_STEPS = 2048


@inner
def multiply_share(
    kernel: Any,
    worker: Any,
    workers: Any,
    weights: Any,
    weights_at: Any,
    steps: Any,
    words: Any,
    words_stride: Any,
    init: Any,
    init_at: Any,
    out: Any,
    num_tokens: Any,
    out_features: Any,
) -> None:
    """One worker's part of a product: some panels of all rows, or some of the blocks of rows.

    Args:
        kernel: from ``block_kernel``.
        worker: 0 to ``workers - 1``.
        workers: how many share the product.
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
    num_panels = -(-out_features // PANEL)
    if num_tokens <= BLOCK_ROWS:
        _call_block(
            kernel,
            weights,
            weights_at,
            steps,
            words,
            words_stride,
            init,
            init_at,
            out,
            out_features,
            0,
            num_tokens,
            num_panels * worker // workers,
            num_panels * (worker + 1) // workers,
        )
        return
    # Many rows: blocks of rows by groups of panels, groups outermost so that their weights stay.
    num_groups = -(-num_panels // TILE_PANELS)
    num_blocks = -(-num_tokens // BLOCK_ROWS)
    num_items = num_groups * num_blocks
    for item in range(num_items * worker // workers, num_items * (worker + 1) // workers):
        group, block = item // num_blocks, item % num_blocks
        _call_block(
            kernel,
            weights,
            weights_at,
            steps,
            words,
            words_stride,
            init,
            init_at,
            out,
            out_features,
            num_tokens * block // num_blocks,
            num_tokens * (block + 1) // num_blocks,
            group * TILE_PANELS,
            min((group + 1) * TILE_PANELS, num_panels),
        )


@lru_cache
def block_kernel(weights: np.dtype[Any], words: np.dtype[Any]) -> int:
    """The address of ``_multiply_block`` compiled for weights and words of these dtypes.

    Whoever multiplies calls it through its address. Linked in, its tiles would be optimised anew
    in every function on the way up to the caller, a second each time.
    """
    pointers = [types.CPointer(numba.from_dtype(np.dtype(d))) for d in (weights, words)]
    sums, size = types.CPointer(types.float32), types.intp
    signature = types.void(
        pointers[0], size, size, pointers[1], size, sums, size, sums, size, *[size] * 4
    )
    return compiled_address(_multiply_block, signature)


@intrinsic
def _call_block(
    typing_context: Any,
    kernel: Any,
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
) -> Any:
    """Call ``_multiply_block`` at the address ``kernel``, with flat arrays as operands."""
    size = types.intp
    signature = types.void(size, weights, size, size, words, size, init, size, out, *[size] * 5)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        operands = []
        for kind, value in zip(signature.args[1:], args[1:], strict=True):
            is_array = isinstance(kind, types.Array)
            operands.append(
                context.make_array(kind)(context, builder, value).data if is_array else value
            )
        function = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
        pointer = builder.inttoptr(args[0], function.as_pointer())
        builder.call(pointer, operands)
        return context.get_dummy_value()

    return signature, code


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

    Operands are pointers; the rest is as in ``multiply_share``.
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
