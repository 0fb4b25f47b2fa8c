"""Sixteen float32 lanes as one value inside compiled functions: what sums are written with.

A compiler may vectorise a sum only if it may reorder it, and then the order is its own choice,
different from one call site to the next. Here the order is written down: sixteen partial sums,
folded as a fixed tree (``sum_lanes``). So a row gives the same bits alone and in any batch, and the
code is as wide as the machine: LLVM maps a 16-lane value to one AVX-512 register, two AVX2 or four
NEON ones.

Inside compiled functions ``a + b``, ``a - b``, ``a * b`` and ``a / b`` work lane by lane; scalars
enter through ``splat``. Memory is read and written by simd_memory.py.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic as numba_intrinsic
from numba.extending import models, overload, register_model

LANES = 16

F32 = ir.FloatType()
I32 = ir.IntType(32)
VEC = ir.VectorType(F32, LANES)
VEC_I32 = ir.VectorType(I32, LANES)


class _Float32x16(types.Type):  # type: ignore[misc]
    """Numba's name for the 16-lane value."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


float32x16 = _Float32x16()


@register_model(_Float32x16)
class _Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, VEC)


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Numba's ``intrinsic``, with a type for the checker."""
    return numba_intrinsic(function)  # type: ignore[no-any-return]


# ---------------------------------------------------------------- pieces of LLVM code


def emit_splat(builder: Any, scalar: Any, vector: Any = VEC) -> Any:
    """A vector with ``scalar`` in every lane."""
    undefined = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(undefined, scalar, I32(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(VEC_I32, [0] * LANES))


def emit_call(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    """A call of one of LLVM's own functions."""
    signature = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(builder.module.declare_intrinsic(name, (), signature), args)


def emit_integers(value: int) -> Any:
    """Sixteen equal 32-bit integers."""
    return ir.Constant(VEC_I32, [value] * LANES)


def emit_lane_indices() -> Any:
    """0, 1, ... 15."""
    return ir.Constant(VEC_I32, list(range(LANES)))


def emit_shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """Lanes of ``a`` (0 .. 15) and ``b`` (16 .. 31) in a new order."""
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), lanes)
    return builder.shuffle_vector(a, b, mask)


# ---------------------------------------------------------------- lane by lane


@intrinsic
def splat(typing_context: Any, scalar: Any) -> Any:
    """The same float32 in every lane."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_splat(builder, args[0])

    return float32x16(types.float32), code


@intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``, rounded once where the machine can."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_call(builder, "llvm.fmuladd.v16f32", VEC, list(args))

    return float32x16(a, b, c), code


def _binary(emit: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    @intrinsic
    def operation(typing_context: Any, a: Any, b: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, args[0], args[1])

        return float32x16(a, b), code

    return operation


def _emit_maximum(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


_add = _binary(lambda builder, a, b: builder.fadd(a, b))
_subtract = _binary(lambda builder, a, b: builder.fsub(a, b))
_multiply = _binary(lambda builder, a, b: builder.fmul(a, b))
_divide = _binary(lambda builder, a, b: builder.fdiv(a, b))
maximum = _binary(_emit_maximum)  # the second where the first is not greater, or NaN


def _overload(symbol: Callable[..., Any], operation: Callable[..., Any]) -> None:
    def implementation(a: Any, b: Any) -> Any:
        if a is float32x16 and b is float32x16:
            return lambda a, b: operation(a, b)  # noqa: PLW0108 - Numba wants a function's source
        return None

    overload(symbol, strict=False)(implementation)


for _symbol, _operation in (
    (operator.add, _add),
    (operator.sub, _subtract),
    (operator.mul, _multiply),
    (operator.truediv, _divide),
):
    _overload(_symbol, _operation)


@intrinsic
def round_even(typing_context: Any, a: Any) -> Any:
    """The nearest whole numbers, halves to even."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_call(builder, "llvm.rint.v16f32", VEC, list(args))

    return float32x16(a), code


@intrinsic
def power_of_two(typing_context: Any, n: Any) -> Any:
    """``2 ** n`` for whole numbers -126 to 127: the exponent's bits, written directly."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        exponent = builder.add(builder.fptosi(args[0], VEC_I32), emit_integers(127))
        return builder.bitcast(builder.shl(exponent, emit_integers(23)), VEC)

    return float32x16(n), code


@intrinsic
def keep_sign(typing_context: Any, signs: Any, sizes: Any) -> Any:
    """``sizes`` (positive) with the signs of ``signs``."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        signs, sizes = (builder.bitcast(arg, VEC_I32) for arg in args)
        sign = builder.and_(signs, emit_integers(0x80000000))
        return builder.bitcast(builder.or_(sign, sizes), VEC)

    return float32x16(signs, sizes), code


@intrinsic
def select_less(typing_context: Any, a: Any, b: Any, then: Any, otherwise: Any) -> Any:
    """``then`` in the lanes where ``a < b``, else ``otherwise`` (so too where one is NaN)."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, b, then, otherwise = args
        return builder.select(builder.fcmp_ordered("<", a, b), then, otherwise)

    return float32x16(a, b, then, otherwise), code


@intrinsic
def keep_lanes(typing_context: Any, a: Any, first: Any, stop: Any, otherwise: Any) -> Any:
    """``a`` in lanes ``first .. stop - 1`` (which may lie outside 0 .. 15), else ``otherwise``."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, first, stop, otherwise = args
        low = emit_splat(builder, builder.trunc(first, I32), VEC_I32)
        high = emit_splat(builder, builder.trunc(stop, I32), VEC_I32)
        above = builder.icmp_signed(">=", emit_lane_indices(), low)
        below = builder.icmp_signed("<", emit_lane_indices(), high)
        return builder.select(builder.and_(above, below), a, otherwise)

    return float32x16(a, types.intp, types.intp, otherwise), code


# ---------------------------------------------------------------- across lanes


def _emit_fold(builder: Any, a: Any, combine: Callable[[Any, Any, Any], Any]) -> Any:
    """Halve until one lane is left: lane i meets i + 8, then i + 4, i + 2, i + 1."""
    width = LANES
    while width > 1:
        width //= 2
        low = emit_shuffle(builder, a, a, list(range(width)))
        high = emit_shuffle(builder, a, a, list(range(width, 2 * width)))
        a = combine(builder, low, high)
    return builder.extract_element(a, I32(0))


@intrinsic
def sum_lanes(typing_context: Any, a: Any) -> Any:
    """The sum of all lanes, always in the same order."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _emit_fold(builder, args[0], lambda b, x, y: b.fadd(x, y))

    return types.float32(a), code


@intrinsic
def max_lanes(typing_context: Any, a: Any) -> Any:
    """The largest lane."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _emit_fold(builder, args[0], _emit_maximum)

    return types.float32(a), code


@intrinsic
def first_lane(typing_context: Any, a: Any) -> Any:
    """Lane 0."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.extract_element(args[0], I32(0))

    return types.float32(a), code
