"""The innermost part of a matrix product: one tile of outputs, held in registers, over all inputs.

A tile is up to ``TILE_ROWS`` rows of x by up to ``TILE_PANELS`` panels of 16 outputs. Each step
loads one 64-byte line of every panel and one word of every row, and multiplies each with each; the
sums stay in registers until the last step. The loop is written in LLVM's language, since a
compiler would not keep a tile of a Python loop in registers.

A word is what one step takes from a row of x, and a line what it takes from a panel:

==============  =================================  ============================================
kind            word of x                          line of a panel
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
TILE_ROWS, TILE_PANELS = (8, 3) if "avx512f" in _FEATURES else (4, 1)


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


def _tile_function(module: Any, kind: Any, rows: int, panels: int) -> Any:
    """The function of one tile shape, made on first use in a module.

    Its arguments: weights, bytes from panel to panel; x, bytes from row to row; initial sums, bytes
    from row to row; out, bytes from row to row; steps; columns. The last panel has ``columns``
    outputs; only tiles of one panel look at it.
    """
    name = f"refengine_tile_{kind.name}_{rows}x{panels}"
    if name in module.globals:
        return module.globals[name]
    arguments = [_BYTES, _I64] * 4 + [_I64, _I64]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    weights, panel_bytes, x, x_bytes, init, init_bytes, out, out_bytes = function.args[:8]
    steps, columns = function.args[8:]
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    panel_at = [_at(builder, weights, builder.mul(panel_bytes, _I64(p))) for p in range(panels)]
    row_at = [_at(builder, x, builder.mul(x_bytes, _I64(r))) for r in range(rows)]
    limit = emit_splat(builder, builder.trunc(columns, I32), VEC_I32)
    mask = builder.icmp_signed("<", emit_lane_indices(), limit) if panels == 1 else None

    def place(base: Any, row_bytes: Any, row: int, panel: int) -> Any:
        address = _at(builder, base, builder.mul(row_bytes, _I64(row)))
        address = _at(builder, address, _I64(panel * LINE_BYTES))
        return builder.bitcast(address, VEC.as_pointer())

    # 1 Sums begin with the bias, or with what earlier steps left.
    sums = []
    for row in range(rows):
        for panel in range(panels):
            address = place(init, init_bytes, row, panel)
            if mask is None:
                sums.append(builder.load(address, align=4, typ=VEC))
            else:
                args = [address, I32(4), mask, ir.Constant(VEC, None)]
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
        line_offset = builder.mul(counter, _I64(LINE_BYTES))
        word_offset = builder.mul(counter, _I64(kind.word_bytes))
        for turn in range(unroll):
            lines = []
            for address in panel_at:
                offset = builder.add(line_offset, _I64(turn * LINE_BYTES))
                pointer = builder.bitcast(_at(builder, address, offset), VEC_I32.as_pointer())
                line = builder.load(pointer, align=LINE_BYTES, typ=VEC_I32)
                lines.append(kind.line(builder, line))
            for row, address in enumerate(row_at):
                offset = builder.add(word_offset, _I64(turn * kind.word_bytes))
                word = kind.word(builder, _at(builder, address, offset))
                for panel, line in enumerate(lines):
                    index = row * panels + panel
                    sums[index] = kind.add(builder, sums[index], line, word)
        for phi, value in zip(carried, sums, strict=True):
            phi.add_incoming(value, builder.block)
        counter.add_incoming(following, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        step, sums = counter, carried
    # 3 Out.
    for row in range(rows):
        for panel in range(panels):
            address = place(out, out_bytes, row, panel)
            value = sums[row * panels + panel]
            if mask is None:
                builder.store(value, address, align=4)
            else:
                args = [value, address, I32(4), mask]
                emit_call(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), args)
    builder.ret_void()
    return function


@intrinsic
def multiply_tile(
    typing_context: Any,
    weights: Any,
    weights_at: Any,
    panel_stride: Any,
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
    panels: Any,
    columns: Any,
) -> Any:
    """``out[r, o] = init[r, o] + sum_i x[r, i] * weights[o, i]`` for one tile.

    ``weights`` (packed panels on 64-byte boundaries), ``words`` (of x), ``init`` (float32: what
    sums begin with) and ``out`` (float32, may be ``init``) are pointers. An ``_at`` says where from
    there the tile begins, a ``_stride`` how far it is to the next panel or row, both in elements; a
    stride of 0 gives every row the same. A tile takes ``steps`` lines of each of ``panels`` panels
    (``TILE_PANELS`` or 1) and ``rows`` rows (1 to ``TILE_ROWS``). ``columns`` says how many outputs
    the last panel has; fewer than 16 only where ``panels`` is 1.
    """
    kind = _kind(weights, words)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        operands = []
        for operand in (0, 3, 6, 9):
            width = signature.args[operand].dtype.bitwidth // 8
            pointer = builder.gep(args[operand], [args[operand + 1]])
            operands += [
                builder.bitcast(pointer, _BYTES),
                builder.mul(args[operand + 2], _I64(width)),
            ]
        steps, rows, panels, columns = args[12:]
        operands += [steps, columns]
        # One call among those of all shapes.
        shape = builder.add(builder.mul(rows, _I64(TILE_PANELS + 1)), panels)
        done = builder.append_basic_block("tile.done")
        switch = builder.switch(shape, done)
        for tile_rows in range(1, TILE_ROWS + 1):
            for tile_panels in sorted({1, TILE_PANELS}):
                function = _tile_function(builder.module, kind, tile_rows, tile_panels)
                block = builder.append_basic_block("tile")
                switch.add_case(_I64(tile_rows * (TILE_PANELS + 1) + tile_panels), block)
                builder.position_at_end(block)
                builder.call(function, operands)
                builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    size = types.intp
    strided = [size, size]
    return types.void(
        weights, *strided, words, *strided, init, *strided, out, *strided, *[size] * 4
    ), code


@intrinsic
def line_elements(typing_context: Any, weights: Any) -> Any:
    """Elements of a line of ``weights``."""
    count = LINE_BYTES * 8 // weights.dtype.bitwidth

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.intp, count)

    return types.intp(weights), code


@intrinsic
def words_a_step(typing_context: Any, weights: Any, words: Any) -> Any:
    """Elements of ``words`` that one line of ``weights`` is multiplied with."""
    count = _kind(weights, words).word_bytes // 4

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.intp, count)

    return types.intp(weights, words), code
