"""Reading and writing sixteen lanes (simd.py) at a time.

Arrays are addressed by an element index that counts from the array's first element, whatever its
shape. A uint16 array holds bfloat16: widened on load, rounded to nearest even on store. Nothing
is checked here: callers know their bounds.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.np.arrayobj import populate_array

from refengine.cpu.simd import (
    I32,
    LANES,
    VEC,
    VEC_I32,
    emit_call,
    emit_integers,
    emit_lane_indices,
    emit_splat,
    float32x16,
    intrinsic,
)

_I8 = ir.IntType(8)
_VEC_I16 = ir.VectorType(ir.IntType(16), LANES)


def emit_pointer(
    context: Any, builder: Any, array_type: Any, array: Any, index: Any, to: Any
) -> Any:
    """The address of element ``index``, as a pointer to ``to``."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), to.as_pointer())


def _storage(array_type: Any) -> tuple[Any, str, int]:
    """How sixteen elements lie in memory: LLVM type, its name, bytes an element."""
    if array_type.dtype == types.uint16:
        return _VEC_I16, "v16i16", 2
    if array_type.dtype == types.float32:
        return VEC, "v16f32", 4
    raise TypeError(f"lanes are loaded from float32 or uint16 arrays, not {array_type}")


def _widen(builder: Any, stored: Any) -> Any:
    """To float32: a bfloat16 is the upper half of one."""
    if stored.type == VEC:
        return stored
    wide = builder.shl(builder.zext(stored, VEC_I32), emit_integers(16))
    return builder.bitcast(wide, VEC)


def _narrow(builder: Any, value: Any, storage: Any) -> Any:
    """To what is stored: round by adding half of the last place kept, less one if it is even."""
    if storage == VEC:
        return value
    bits = builder.bitcast(value, VEC_I32)
    upper = builder.lshr(bits, emit_integers(16))
    half = builder.add(emit_integers(0x7FFF), builder.and_(upper, emit_integers(1)))
    rounded = builder.lshr(builder.add(bits, half), emit_integers(16))
    # A NaN's payload could carry into the exponent: keep its sign, make it the quiet one.
    sign = builder.and_(upper, emit_integers(0x8000))
    quiet = builder.or_(sign, emit_integers(0x7FC0))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, quiet, rounded), _VEC_I16)


def _first_lanes(builder: Any, count: Any) -> Any:
    """True in the first ``count`` lanes."""
    limit = emit_splat(builder, builder.trunc(count, I32), VEC_I32)
    return builder.icmp_signed("<", emit_lane_indices(), limit)


def emit_load(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Sixteen elements, widened."""
    kind, _, width = _storage(array_type)
    stored = builder.load(emit_pointer(context, builder, array_type, array, index, kind))
    stored.align = width
    return _widen(builder, stored)


@intrinsic
def load(typing_context: Any, array: Any, index: Any) -> Any:
    """Elements ``index .. index + 15``."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_load(context, builder, signature.args[0], *args)

    return float32x16(array, types.intp), code


@intrinsic
def load_first(typing_context: Any, array: Any, index: Any, count: Any) -> Any:
    """Elements ``index .. index + count - 1`` and zeros after them; reads no other element."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, index, count = args
        kind, name, width = _storage(signature.args[0])
        pointer = emit_pointer(context, builder, signature.args[0], array, index, kind)
        mask, zeros = _first_lanes(builder, count), ir.Constant(kind, None)
        masked_load = f"llvm.masked.load.{name}.p0"
        return _widen(
            builder, emit_call(builder, masked_load, kind, [pointer, I32(width), mask, zeros])
        )

    return float32x16(array, types.intp, types.intp), code


@intrinsic
def store(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """Write all lanes to elements ``index .. index + 15``."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, index, value = args
        kind, _, width = _storage(signature.args[0])
        pointer = emit_pointer(context, builder, signature.args[0], array, index, kind)
        builder.store(_narrow(builder, value, kind), pointer).align = width
        return context.get_dummy_value()

    return types.void(array, types.intp, value), code


@intrinsic
def store_first(typing_context: Any, array: Any, index: Any, value: Any, count: Any) -> Any:
    """Write the first ``count`` lanes; touches no other element."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, index, value, count = args
        kind, name, width = _storage(signature.args[0])
        pointer = emit_pointer(context, builder, signature.args[0], array, index, kind)
        stored, mask = _narrow(builder, value, kind), _first_lanes(builder, count)
        masked_store = f"llvm.masked.store.{name}.p0"
        emit_call(builder, masked_store, ir.VoidType(), [stored, pointer, I32(width), mask])
        return context.get_dummy_value()

    return types.void(array, types.intp, value, types.intp), code


@intrinsic
def flat(typing_context: Any, array: Any) -> Any:
    """An array's memory from its first element on, as a borrowed 1-D array without a bound.

    Inner functions take such flat arrays with element offsets, so that one compiled version serves
    every caller, whatever the layout of its arrays. Valid while the array itself is.
    """
    result = types.Array(array.dtype, 1, "C", readonly=not array.mutable)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source = context.make_array(signature.args[0])(context, builder, args[0])
        view = context.make_array(result)(context, builder)
        width = context.get_constant(types.intp, array.dtype.bitwidth // 8)
        populate_array(
            view,
            data=source.data,
            shape=[context.get_constant(types.intp, 2**40)],
            strides=[width],
            itemsize=width,
            meminfo=None,
        )
        return view._getvalue()

    return result(array), code


@intrinsic
def fetch_ahead(typing_context: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of element ``index``, to the second level of cache."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, index = args
        pointer = emit_pointer(context, builder, signature.args[0], array, index, _I8)
        emit_call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, I32(0), I32(2), I32(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), code


@intrinsic
def fetch_add(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """Add to an int64 element as one indivisible step and return what it was before."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, index, value = args
        data = context.make_array(signature.args[0])(context, builder, array).data
        return builder.atomic_rmw("add", builder.gep(data, [index]), value, "monotonic")

    return types.int64(array, types.intp, types.int64), code
