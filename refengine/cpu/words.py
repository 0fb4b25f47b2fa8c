"""Rows of x as the matrix product reads them: *words*, one for each step.

With float32 weights a word is a float32. With bfloat16 weights it is a pair of inputs rounded to
bfloat16: two bfloat16 in a uint32 where the processor multiplies such pairs, else two float32.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types

from refengine.cpu.arrays import Array
from refengine.cpu.jit import inner
from refengine.cpu.simd import LANES, VEC, VEC_I32, emit_integers, intrinsic
from refengine.cpu.simd_memory import load_first
from refengine.cpu.tile_kernels import HAS_BFLOAT16_DOT


def word_dtype(weights: npt.DTypeLike) -> np.dtype[Any]:
    """What the words of x are stored as, for weights stored as uint16 (bfloat16) or float32.

    Pairs of bfloat16 where the processor multiplies them, else float32. The environment variable
    ``REFENGINE_CPU_ISA=generic`` asks for the second everywhere.
    """
    generic = os.environ.get("REFENGINE_CPU_ISA", "auto") == "generic"
    if np.dtype(weights) == np.uint16 and HAS_BFLOAT16_DOT and not generic:
        return np.dtype(np.uint32)
    return np.dtype(np.float32)


def allocate_words(num_tokens: int, in_features: int, weights: npt.DTypeLike) -> Array:
    """Room for the words of ``num_tokens`` rows, ``[num_tokens, stride]``."""
    inputs = -(-in_features // LANES) * LANES
    dtype = word_dtype(weights)
    return np.empty((num_tokens, inputs // 2 if dtype == np.uint32 else inputs), dtype)


@intrinsic
def _store_words(
    typing_context: Any, weights: Any, words: Any, words_at: Any, index: Any, value: Any
) -> Any:
    """Sixteen inputs, from number ``index`` of a row on, as words for these weights."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, words, words_at, index, value = args
        weights_type, words_type = signature.args[:2]
        data = context.make_array(words_type)(context, builder, words).data
        packed = words_type.dtype == types.uint32
        if weights_type.dtype == types.uint16:  # round to bfloat16
            bits = builder.bitcast(value, VEC_I32)
            odd = builder.and_(builder.lshr(bits, emit_integers(16)), emit_integers(1))
            rounded = builder.add(bits, builder.add(odd, emit_integers(0x7FFF)))
            quiet = builder.or_(bits, emit_integers(0x400000))
            is_nan = builder.fcmp_unordered("uno", value, value)
            bits = builder.select(is_nan, quiet, rounded)
            bits = builder.and_(bits, emit_integers(-65536))
            value = builder.bitcast(bits, VEC)
            if packed:
                halves = ir.VectorType(ir.IntType(16), LANES)
                value = builder.trunc(builder.lshr(bits, emit_integers(16)), halves)
                index = builder.sdiv(index, index.type(2))
        pointer = builder.gep(data, [builder.add(words_at, index)])
        builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(weights, words, types.intp, types.intp, value), code


@inner
def fill_words(
    x: Any, x_at: int, weights: Any, words: Any, words_at: int, first: int, count: int
) -> None:
    """Inputs ``first .. first + count - 1`` of one row of x as words for ``weights``.

    What follows them up to a multiple of 16 inputs becomes zero.

    Args:
        x: flat float32.
        x_at: where the row begins in it.
        weights: flat panels, for their type.
        words: flat, of ``word_dtype``.
        words_at: where the row's words begin.
        first: a multiple of 16.
        count: inputs.
    """
    for i in range(first, first + count, LANES):
        _store_words(weights, words, words_at, i, load_first(x, x_at + i, first + count - i))
