"""The innermost part of a matrix product: one tile of outputs, held in registers, over all inputs.

A tile is up to ``TILE_ROWS`` rows of x by a panel of ``PANEL`` outputs. Each step loads the panel's
next 64-byte lines and one word of every row, and multiplies each with each; the sums stay in
registers until the last step. The loop is written in LLVM's language, since a compiler would not
keep a tile of a Python loop in registers.

A word is what one step takes from a row of x, a line what it takes for 16 outputs:

==============  =================================  ============================================
kind            word of x                          line of weights
==============  =================================  ============================================
``float32``     one float32                        16 outputs, one input
``bfloat16``    two bfloat16, as one uint32        16 outputs, two inputs: ``vdpbf16ps`` (Intel
                                                   AVX512-BF16) multiplies and adds both pairs
``widened``     two float32 (rounded to bfloat16)  the same lines, widened by shifts, where a
                                                   machine lacks that instruction
==============  =================================  ============================================

Every output is one chain of additions in the order of the inputs, whatever the tile's shape. So a
row's result does not depend on which rows it is computed with, nor on the number of threads.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target

from refengine.cpu.simd import (
    F32,
    I32,
    LANES,
    VEC,
    VEC_I32,
    emit_call,
    emit_integers,
    emit_lane_indices,
    emit_splat,
    intrinsic,
)

_I8, _I64 = ir.IntType(8), ir.IntType(64)
_BYTES = _I8.as_pointer()
LINE_BYTES = 64


def _target_features() -> frozenset[str]:
    """What the processor that Numba compiles for can do, in LLVM's words."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return frozenset(f[1:] for f in features.split(",") if f.startswith("+"))


_FEATURES = _target_features()
# LLVM 17 gave the instruction's function the argument types used below.
HAS_BFLOAT16_DOT = "avx512bf16" in _FEATURES and llvm.llvm_version_info[0] >= 17
# Tiles fill the register file: 32 registers of 16 lanes hold 8 x 3 sums, 3 lines and words; 16 of 8
# lanes (AVX2), or 32 of 4 (NEON), hold 4 x 1.
TILE_ROWS, TILE_VECTORS = (8, 3) if "avx512f" in _FEATURES else (4, 1)
PANEL = TILE_VECTORS * LANES  # outputs a panel


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)


class _Float32Kind:
    name, word_bytes, unroll = "float32", 4, 4

    @staticmethod
    def line(builder: Any, line: Any) -> list[Any]:
        return [builder.bitcast(line, VEC)]

    @staticmethod
    def word(builder: Any, address: Any) -> list[Any]:
        return [_broadcast(builder, address, F32, VEC, 0)]

    @staticmethod
    def add(builder: Any, total: Any, line: list[Any], word: list[Any]) -> Any:
        return emit_call(builder, "llvm.fmuladd.v16f32", VEC, [line[0], word[0], total])


class _BFloat16Kind:
    name, word_bytes, unroll = "bfloat16", 4, 2

    @staticmethod
    def line(builder: Any, line: Any) -> list[Any]:
        return [builder.bitcast(line, _PAIRS)]

    @staticmethod
    def word(builder: Any, address: Any) -> list[Any]:
        return [builder.bitcast(_broadcast(builder, address, I32, VEC_I32, 0), _PAIRS)]

    @staticmethod
    def add(builder: Any, total: Any, line: list[Any], word: list[Any]) -> Any:
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        return emit_call(builder, name, VEC, [total, line[0], word[0]])


class _WidenedKind:
    name, word_bytes, unroll = "widened", 8, 2

    @staticmethod
    def line(builder: Any, line: Any) -> list[Any]:
        first = builder.shl(line, emit_integers(16))
        second = builder.and_(line, emit_integers(-65536))
        return [builder.bitcast(first, VEC), builder.bitcast(second, VEC)]

    @staticmethod
    def word(builder: Any, address: Any) -> list[Any]:
        return [_broadcast(builder, address, F32, VEC, offset) for offset in (0, 4)]

    @staticmethod
    def add(builder: Any, total: Any, line: list[Any], word: list[Any]) -> Any:
        for part in range(2):
            args = [line[part], word[part], total]
            total = emit_call(builder, "llvm.fmuladd.v16f32", VEC, args)
        return total


_KINDS = {
    (types.float32, types.float32): _Float32Kind,
    (types.uint16, types.uint32): _BFloat16Kind,
    (types.uint16, types.float32): _WidenedKind,
}


def _kind(weights: Any, words: Any) -> Any:
    """Which kind the types of the two operands' elements ask for."""
    return _KINDS[weights.dtype, words.dtype]


def _broadcast(builder: Any, address: Any, scalar: Any, vector: Any, offset: int) -> Any:
    """A scalar in memory, in every lane."""
    pointer = builder.gep(address, [_I64(offset)], source_etype=_I8)
    value = builder.load(builder.bitcast(pointer, scalar.as_pointer()), align=4, typ=scalar)
    return emit_splat(builder, value, vector)


def _at(builder: Any, address: Any, offset: Any) -> Any:
    """``address + offset`` bytes."""
    return builder.gep(address, [offset], source_etype=_I8)


def _tile_function(module: Any, kind: Any, rows: int) -> Any:
    """The function of one number of rows, made on first use in a module.

    Its arguments: the panel's weights; x, bytes from row to row; initial sums, bytes from row to
    row; out, bytes from row to row; steps; and the panel's outputs, ``PANEL`` or fewer.
    """
    name = f"refengine_tile_{kind.name}_{rows}"
    if name in module.globals:
        return module.globals[name]
    arguments = [_BYTES, *[_BYTES, _I64] * 3, _I64, _I64]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    weights, x, x_bytes, init, init_bytes, out, out_bytes, steps, columns = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    row_at = [_at(builder, x, builder.mul(x_bytes, _I64(r))) for r in range(rows)]
    limit = emit_splat(builder, builder.trunc(columns, I32), VEC_I32)
    masks = []
    for vector in range(TILE_VECTORS):
        lanes = builder.add(emit_lane_indices(), emit_integers(vector * LANES))
        masks.append(builder.icmp_signed("<", lanes, limit))

    def place(base: Any, row_bytes: Any, row: int, vector: int) -> Any:
        address = _at(builder, base, builder.mul(row_bytes, _I64(row)))
        address = _at(builder, address, _I64(vector * LINE_BYTES))
        return builder.bitcast(address, VEC.as_pointer())

    # 1 Sums begin with the bias, or with what earlier steps left.
    sums = []
    for row in range(rows):
        for vector, mask in enumerate(masks):
            args = [place(init, init_bytes, row, vector), I32(4), mask, ir.Constant(VEC, None)]
            sums.append(emit_call(builder, "llvm.masked.load.v16f32.p0", VEC, args))
    # 2 All steps: several a turn, then what is left, one by one.
    step = _I64(0)
    for unroll in (kind.unroll, 1):
        before = builder.block
        head = function.append_basic_block("head")
        body = function.append_basic_block("body")
        after = function.append_basic_block("after")
        builder.branch(head)
        builder.position_at_end(head)
        counter = builder.phi(_I64)
        counter.add_incoming(step, before)
        carried = []
        for value in sums:
            carried.append(builder.phi(VEC))
            carried[-1].add_incoming(value, before)
        following = builder.add(counter, _I64(unroll))
        builder.cbranch(builder.icmp_signed("<=", following, steps), body, after)
        builder.position_at_end(body)
        sums = list(carried)
        line_at = _at(builder, weights, builder.mul(counter, _I64(TILE_VECTORS * LINE_BYTES)))
        word_offset = builder.mul(counter, _I64(kind.word_bytes))
        for turn in range(unroll):
            lines = []
            for vector in range(TILE_VECTORS):
                offset = _I64((turn * TILE_VECTORS + vector) * LINE_BYTES)
                pointer = builder.bitcast(_at(builder, line_at, offset), VEC_I32.as_pointer())
                line = builder.load(pointer, align=LINE_BYTES, typ=VEC_I32)
                lines.append(kind.line(builder, line))
            for row, address in enumerate(row_at):
                offset = builder.add(word_offset, _I64(turn * kind.word_bytes))
                word = kind.word(builder, _at(builder, address, offset))
                for vector, line in enumerate(lines):
                    index = row * TILE_VECTORS + vector
                    sums[index] = kind.add(builder, sums[index], line, word)
        for phi, value in zip(carried, sums, strict=True):
            phi.add_incoming(value, builder.block)
        counter.add_incoming(following, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        step, sums = counter, carried
    # 3 Out.
    for row in range(rows):
        for vector, mask in enumerate(masks):
            value = sums[row * TILE_VECTORS + vector]
            args = [value, place(out, out_bytes, row, vector), I32(4), mask]
            emit_call(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), args)
    builder.ret_void()
    return function


@intrinsic
def multiply_tile(
    typing_context: Any,
    weights: Any,
    weights_at: Any,
    words: Any,
    words_at: Any,
    words_stride: Any,
    init: Any,
    init_at: Any,
    init_stride: Any,
    out: Any,
    out_at: Any,
    out_stride: Any,
    steps: Any,
    rows: Any,
    columns: Any,
) -> Any:
    """``out[r, o] = init[r, o] + sum_i x[r, i] * weights[o, i]`` for one tile.

    ``weights`` (packed panels on 64-byte boundaries), ``words`` (of x), ``init`` (float32: what
    sums begin with) and ``out`` (float32, may be ``init``) are pointers. An ``_at`` says where from
    there the tile begins, a ``_stride`` how far it is to the next row, both in elements; a stride
    of 0 gives every row the same. A tile takes ``steps`` steps of a panel that has ``columns``
    outputs (at most ``PANEL``) and ``rows`` rows (1 to ``TILE_ROWS``).
    """
    kind = _kind(weights, words)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        operands = [builder.bitcast(builder.gep(args[0], [args[1]]), _BYTES)]
        for operand in (2, 5, 8):
            width = signature.args[operand].dtype.bitwidth // 8
            pointer = builder.gep(args[operand], [args[operand + 1]])
            operands += [
                builder.bitcast(pointer, _BYTES),
                builder.mul(args[operand + 2], _I64(width)),
            ]
        steps, rows, columns = args[11:]
        operands += [steps, columns]
        # One call among those of all numbers of rows.
        done = builder.append_basic_block("tile.done")
        switch = builder.switch(rows, done)
        for count in range(1, TILE_ROWS + 1):
            function = _tile_function(builder.module, kind, count)
            block = builder.append_basic_block("tile")
            switch.add_case(_I64(count), block)
            builder.position_at_end(block)
            builder.call(function, operands)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    size = types.intp
    strided = [size, size]
    return types.void(
        weights, size, words, *strided, init, *strided, out, *strided, size, size, size
    ), code


@intrinsic
def step_elements(typing_context: Any, weights: Any) -> Any:
    """Elements of ``weights`` that one step of a panel takes."""
    count = TILE_VECTORS * LINE_BYTES * 8 // weights.dtype.bitwidth

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.intp, count)

    return types.intp(weights), code


@intrinsic
def step_words(typing_context: Any, weights: Any, words: Any) -> Any:
    """Elements of ``words`` that one step takes from a row."""
    count = _kind(weights, words).word_bytes // 4

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.intp, count)

    return types.intp(weights, words), code
