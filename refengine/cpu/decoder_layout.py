"""Where a decoder step finds everything: one record of addresses, offsets and sizes.

A compiled function of a hundred arguments is slow to compile and to call, so the step's come as one
record, as a GPU kernel's do. Arrays that are allocated together are named by element offsets into
one of two arenas (float32, and words of rows), others by their address.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype, types
from numba.np.arrayobj import populate_array

from refengine.cpu.simd import intrinsic

# Parts of a step that worker 0 keeps the time of, waiting for the others included.
PARTS = ("embed", "qkv", "rotate", "attention", "output", "norm", "gate_up", "activation", "down")

_INTEGERS = (
    # sizes: those of ModelConfig, and of the batch
    "num_layers",
    "hidden",
    "width",  # intermediate_size
    "q_heads",
    "kv_heads",
    "head_dim",
    "rotary_dim",
    "gelu",  # 0: silu
    "num_tokens",
    "item_tokens",  # tokens that a thread takes at a time
    "max_blocks",
    "num_blocks",
    "block_size",
    # compiled functions
    "block_kernel",
    "attend",
    # addresses of stacked weights, uint16 (bfloat16) or float32
    "qkv",
    "o",
    "gate_up",
    "down",
    # addresses of int64 and int32 arrays: of the batch, then of this module's own making
    "token_ids",  # [T] int64
    "positions",  # [T] int64
    "slot_mapping",  # [T] int64
    "block_tables",  # [S, max_blocks] int32
    "items",  # [num_items, 6] int64: what attention has to do, attention_plan.py
    "num_items",
    "windows",  # [num_layers] int64
    "rotary",  # [num_layers] int64: the address of each layer's table [positions, rotary_dim]
    "stages",  # [num_stages * SPACING] int64, team.py
    "offsets",  # [workers, 3 * TILE_KEYS] int64, for attention
    "ticks",  # [len(PARTS)] int64: how long each part took
    # addresses of the caches, uint16 or float32
    "key_caches",
    "value_caches",
    # offsets in ``vectors``, the float32 arena that a model keeps; -1 where it has none
    "vectors",
    "input_norm_at",  # [num_layers + 1, hidden]: after the last layer's comes the final norm
    "post_attention_norm_at",  # [num_layers, hidden]
    "pre_mlp_norm_at",  # [num_layers, hidden]
    "post_mlp_norm_at",  # [num_layers, hidden]
    "q_norm_at",  # [num_layers, head_dim]
    "k_norm_at",  # [num_layers, head_dim]
    "qkv_bias_at",  # [num_layers, (Q + 2 K) D]
    "qkv_bias_stride",  # 0 where all layers share zeros
    "o_bias_at",  # [num_layers, hidden]
    "o_bias_stride",
    "zeros_at",  # as long as the longest product's result
    # offsets in ``floats``, the float32 arena of a batch
    "floats",
    "residual_at",  # [T, hidden]
    "result_at",  # [T, hidden]: of attention, then of the MLP
    "qkv_at",  # [T, (Q + 2 K) D]
    "attention_at",  # [T, Q D]
    "gate_up_at",  # [T, 2 * width]
    "rows_at",  # [workers, row_stride]: a row for each worker's own use
    "row_stride",
    "scratch_at",  # [workers, scratch_stride]: attention_tile.py
    "scratch_stride",
    "normalised",  # the address of the result, [T, hidden] after the final norm
    # offsets in the arena of words, and words a row
    "words",
    "x_words_at",
    "x_words",
    "attention_words_at",
    "attention_words",
    "gated_words_at",
    "gated_words",
)
_FLOATS = ("scale", "soft_cap", "eps", "embedding_multiplier")

STEP = np.dtype([(n, np.int64) for n in _INTEGERS] + [(n, np.float32) for n in _FLOATS])
_STEP_ARRAY = types.Array(from_dtype(STEP), 1, "C")
_NO_BOUND = 2**40


def _array(context: Any, builder: Any, kind: Any, address: Any, bytes_each: int) -> Any:
    view = context.make_array(kind)(context, builder)
    width = context.get_constant(types.intp, bytes_each)
    element = context.get_data_type(kind.dtype)
    populate_array(
        view,
        data=builder.inttoptr(address, element.as_pointer()),
        shape=[context.get_constant(types.intp, _NO_BOUND)],
        strides=[width],
        itemsize=width,
        meminfo=None,
    )
    return view._getvalue()


@intrinsic
def array_at(typing_context: Any, address: Any, like: Any) -> Any:
    """The memory at an address as a flat array without a bound.

    ``like`` is a dtype, or a flat array of the wanted one.
    """
    kind = types.Array(like.dtype, 1, "C")

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _array(context, builder, kind, args[0], kind.dtype.bitwidth // 8)

    return kind(types.int64, like), code


@intrinsic
def step_at(typing_context: Any, address: Any) -> Any:
    """The record at an address, as an array of one."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _array(context, builder, _STEP_ARRAY, args[0], STEP.itemsize)

    return _STEP_ARRAY(types.int64), code


@intrinsic
def address_of(typing_context: Any, array: Any) -> Any:
    """The address of an array's first element; valid while the array is."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, ir.IntType(64))

    return types.int64(array), code
