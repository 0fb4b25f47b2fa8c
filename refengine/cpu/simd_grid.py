"""Small grids of sixteen-lane values (simd.py): the register tiles of products.

A grid is a tuple of ``len(a) * len(b)`` values, row by row. Its size is part of its type, so LLVM
keeps a whole grid in registers and unrolls what is done to it. Rows and columns in memory are given
by tuples of element offsets, ``starts``, whose lengths are the grid's size.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from refengine.cpu.simd import (
    F32,
    LANES,
    VEC,
    emit_call,
    emit_shuffle,
    emit_splat,
    float32x16,
    intrinsic,
)
from refengine.cpu.simd_memory import emit_load, emit_pointer

_FOUR = ir.VectorType(F32, 4)


def _tuple_type(count: int) -> Any:
    return types.UniTuple(float32x16, count)


def _pack(context: Any, builder: Any, values: list[Any]) -> Any:
    return context.make_tuple(builder, _tuple_type(len(values)), values)


def _items(builder: Any, tuple_type: Any, value: Any) -> list[Any]:
    return [builder.extract_value(value, i) for i in range(tuple_type.count)]


def _sums(builder: Any, starts: list[Any], columns: list[Any]) -> list[Any]:
    return [builder.add(start, column) for start in starts for column in columns]


@intrinsic
def load_each(typing_context: Any, array: Any, starts: Any, index: Any) -> Any:
    """Sixteen elements from each ``starts[j] + index``."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, starts, index = args
        starts = _items(builder, signature.args[1], starts)
        return _pack(
            context,
            builder,
            [
                emit_load(context, builder, signature.args[0], array, builder.add(start, index))
                for start in starts
            ],
        )

    return _tuple_type(starts.count)(array, starts, types.intp), code


@intrinsic
def splat_each(typing_context: Any, array: Any, starts: Any, index: Any) -> Any:
    """The float32 at each ``starts[j] + index``, in all lanes."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, starts, index = args
        values = []
        for start in _items(builder, signature.args[1], starts):
            at = builder.add(start, index)
            pointer = emit_pointer(context, builder, signature.args[0], array, at, F32)
            values.append(emit_splat(builder, builder.load(pointer)))
        return _pack(context, builder, values)

    return _tuple_type(starts.count)(array, starts, types.intp), code


@intrinsic
def zero_grid(typing_context: Any, rows: Any, columns: Any) -> Any:
    """A grid of zeros, as many rows and columns as the two tuples have elements."""
    count = rows.count * columns.count

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _pack(context, builder, [ir.Constant(VEC, None)] * count)

    return _tuple_type(count)(rows, columns), code


@intrinsic
def load_grid(typing_context: Any, array: Any, starts: Any, columns: Any) -> Any:
    """Sixteen elements from each ``starts[r] + columns[c]``."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, starts, columns = args
        starts = _items(builder, signature.args[1], starts)
        columns = _items(builder, signature.args[2], columns)
        values = [
            emit_load(context, builder, signature.args[0], array, at)
            for at in _sums(builder, starts, columns)
        ]
        return _pack(context, builder, values)

    return _tuple_type(starts.count * columns.count)(array, starts, columns), code


@intrinsic
def store_grid(typing_context: Any, array: Any, starts: Any, columns: Any, grid: Any) -> Any:
    """Write a grid where ``load_grid`` reads one (float32 arrays)."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, starts, columns, grid = args
        starts = _items(builder, signature.args[1], starts)
        columns = _items(builder, signature.args[2], columns)
        grid = _items(builder, signature.args[3], grid)
        for at, value in zip(_sums(builder, starts, columns), grid, strict=True):
            pointer = emit_pointer(context, builder, signature.args[0], array, at, VEC)
            builder.store(value, pointer).align = 4
        return context.get_dummy_value()

    return types.void(array, starts, columns, grid), code


@intrinsic
def outer_fma(typing_context: Any, grid: Any, rows: Any, columns: Any) -> Any:
    """``grid[r, c] + rows[r] * columns[c]``, lane by lane."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        grid, rows, columns = (
            _items(builder, kind, value) for kind, value in zip(signature.args, args, strict=True)
        )
        pairs = [(row, column) for row in rows for column in columns]
        values = [
            emit_call(builder, "llvm.fmuladd.v16f32", VEC, [row, column, total])
            for (row, column), total in zip(pairs, grid, strict=True)
        ]
        return _pack(context, builder, values)

    return grid(grid, rows, columns), code


@intrinsic
def multiply_rows(typing_context: Any, grid: Any, rows: Any) -> Any:
    """``grid[r, c] * rows[r]``, lane by lane."""
    columns = grid.count // rows.count

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        grid = _items(builder, signature.args[0], args[0])
        rows = _items(builder, signature.args[1], args[1])
        values = [builder.fmul(value, rows[i // columns]) for i, value in enumerate(grid)]
        return _pack(context, builder, values)

    return grid(grid, rows), code


@intrinsic
def store_row_sums(typing_context: Any, array: Any, starts: Any, index: Any, grid: Any) -> Any:
    """Write the lane sums of four columns to ``starts[r] + index .. + 3``.

    Each is summed in ``sum_lanes``' order; four at a time take a third of the instructions.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, starts, index, grid = args
        grid = _items(builder, signature.args[3], grid)
        for r, start in enumerate(_items(builder, signature.args[1], starts)):
            sums = _emit_four_sums(builder, grid[4 * r : 4 * r + 4])
            at = builder.add(start, index)
            pointer = emit_pointer(context, builder, signature.args[0], array, at, _FOUR)
            builder.store(sums, pointer).align = 4
        return context.get_dummy_value()

    return types.void(array, starts, types.intp, grid), code


def _emit_four_sums(builder: Any, values: list[Any]) -> Any:
    """Lane sums of four values, as a vector of four."""
    a, b, c, d = values

    def fold(first: Any, second: Any, low: list[int], high: list[int]) -> Any:
        left = emit_shuffle(builder, first, second, low)
        right = emit_shuffle(builder, first, second, high)
        return builder.fadd(left, right)

    quarter = LANES // 4
    lanes = [list(range(i * quarter, (i + 1) * quarter)) for i in range(8)]  # 4 .. 7: second
    # 1 Lane i meets i + 8: a's sums in the lower half, b's in the upper; likewise c and d.
    halves = (lanes[0] + lanes[1] + lanes[4] + lanes[5], lanes[2] + lanes[3] + lanes[6] + lanes[7])
    ab, cd = fold(a, b, *halves), fold(c, d, *halves)
    # 2 i meets i + 4: a quarter each for a, b, c, d.
    quarters = (
        lanes[0] + lanes[2] + lanes[4] + lanes[6],
        lanes[1] + lanes[3] + lanes[5] + lanes[7],
    )
    abcd = fold(ab, cd, *quarters)
    # 3 i meets i + 2, then i + 1, inside each quarter.
    for distance in (2, 1):
        swapped = emit_shuffle(builder, abcd, abcd, [i ^ distance for i in range(LANES)])
        abcd = builder.fadd(abcd, swapped)
    return emit_shuffle(builder, abcd, abcd, [0, 4, 8, 12])
