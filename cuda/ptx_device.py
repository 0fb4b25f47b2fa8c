"""The instructions of ``ptx`` as Numba-CUDA intrinsics (sm_80 and up; wgmma: sm_90a).

Source of the forms and fragment layouts: NVIDIA, "Parallel Thread Execution ISA", sections
"Warp-level matrix instructions" and "Asynchronous warpgroup-level matrix instructions".

Instructions that only compute are declared free of side effects, so that the compiler may move
them; those that touch memory, or that need all lanes together, keep their place.
"""

# mypy: ignore-errors
from __future__ import annotations

import inspect

import numpy as np

# numba-cuda 0.30 looks these up on import; NumPy 2.5 took them away.
for _old, _new in (("row_stack", "vstack"), ("in1d", "isin"), ("trapz", "trapezoid")):
    if not hasattr(np, _old):
        setattr(np, _old, getattr(np, _new))

from llvmlite import ir  # noqa: E402
from numba import cuda  # noqa: E402
from numba.cuda import types  # noqa: E402
from numba.cuda.extending import intrinsic  # noqa: E402

U16, U32, U64 = types.uint16, types.uint32, types.uint64
I32, I64, F32 = types.int32, types.int64, types.float32
VOID = types.void
POINTER_U16 = types.CPointer(types.uint16)
POINTER_U32 = types.CPointer(types.uint32)
POINTER_U64 = types.CPointer(types.uint64)
POINTER_I32 = types.CPointer(types.int32)
POINTER_I64 = types.CPointer(types.int64)
POINTER_F32 = types.CPointer(types.float32)

_LLVM = {
    types.uint16: ir.IntType(16),
    types.uint32: ir.IntType(32),
    types.int32: ir.IntType(32),
    types.uint64: ir.IntType(64),
    types.int64: ir.IntType(64),
    types.float32: ir.FloatType(),
    types.void: ir.VoidType(),
}
_WORD, _LONG, _REAL = ir.IntType(32), ir.IntType(64), ir.FloatType()


def device(function):
    """Compile ``function`` to be called from kernels, always inlined."""
    return cuda.jit(function, device=True, inline="always")


def _element(context, builder, pointer_type, pointer, index, index_type):
    """The address of ``pointer[index]``; ``pointer`` is a C pointer or an array."""
    if isinstance(pointer_type, types.CPointer):
        base = pointer
    else:
        base = context.make_array(pointer_type)(context, builder, value=pointer).data
    if index.type.width < 64:
        widen = builder.sext if index_type.signed else builder.zext
        index = widen(index, _LONG)
    return builder.gep(base, [index])


def _in_global_memory(builder, pointer, pointee):
    if pointer.type.addrspace == 0:
        pointer = builder.addrspacecast(pointer, ir.PointerType(pointer.type.pointee, 1))
    return builder.bitcast(pointer, ir.PointerType(pointee, 1))


def _intrinsic(num_arguments):
    """``numba``'s decorator for a function of ``*arguments``, whose number it wants to know."""

    def decorate(function):
        names = ["typing_context", *(f"argument{i}" for i in range(num_arguments))]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        function.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])
        return intrinsic(function)

    return decorate


def _asm(returns, arguments, text, constraints, side_effect=False):
    """An intrinsic that is one piece of inline assembly; ``returns`` may be a tuple type."""
    many = isinstance(returns, types.UniTuple)

    @_intrinsic(len(arguments))
    def instruction(typing_context, *_):
        def codegen(context, builder, signature, values):
            result = (
                ir.LiteralStructType([_LLVM[returns.dtype]] * len(returns))
                if many
                else _LLVM[returns]
            )
            asm = ir.InlineAsm(
                ir.FunctionType(result, [_LLVM[a] for a in arguments]),
                text,
                constraints,
                side_effect=side_effect,
            )
            value = builder.call(asm, values)
            if many:
                parts = [builder.extract_value(value, i) for i in range(len(returns))]
                return context.make_tuple(builder, signature.return_type, parts)
            return context.get_dummy_value() if returns is types.void else value

        return returns(*arguments), codegen

    return instruction


_MEMORY = "~{memory}"

# ---------------------------------------------------------------- bit casts and conversions


def _bits(returns, argument, code):
    @intrinsic
    def convert(typing_context, x):
        def codegen(context, builder, signature, values):
            return code(builder, values[0])

        return returns(argument), codegen

    return convert


uint_as_float = _bits(F32, U32, lambda b, x: b.bitcast(x, _REAL))
float_as_uint = _bits(U32, F32, lambda b, x: b.bitcast(x, _WORD))
# A bfloat16 is the upper half of a float32.
bf16_lo = _bits(F32, U32, lambda b, x: b.bitcast(b.shl(x, _WORD(16)), _REAL))
bf16_hi = _bits(F32, U32, lambda b, x: b.bitcast(b.and_(x, _WORD(0xFFFF0000)), _REAL))
f16_lo = _asm(F32, (U32,), "{.reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, l;}", "=f,r")
f16_hi = _asm(F32, (U32,), "{.reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, h;}", "=f,r")
pack_bf16 = _asm(U32, (F32, F32), "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f")
pack_f16 = _asm(U32, (F32, F32), "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f")
byte_permute = _asm(U32, (U32, U32, U32), "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r")

# ---------------------------------------------------------------- arithmetic

exp2 = _asm(F32, (F32,), "ex2.approx.ftz.f32 $0, $1;", "=f,f")
reciprocal = _asm(F32, (F32,), "rcp.rn.f32 $0, $1;", "=f,f")
sqrt = _asm(F32, (F32,), "sqrt.rn.f32 $0, $1;", "=f,f")
fmax = _asm(F32, (F32, F32), "max.f32 $0, $1, $2;", "=f,f,f")
# tanh(x) = 1 - 2 / (1 + exp(2 x)): tanh.approx errs by 5e-4, which a cap of 50 makes 0.025.
tanh = _asm(
    F32,
    (F32,),
    "{.reg .f32 t; mul.f32 t, $1, 0f4038AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000;"
    " rcp.approx.ftz.f32 t, t; fma.rn.f32 $0, t, 0fC0000000, 0f3F800000;}",
    "=f,f",
)
mul = _asm(F32, (F32, F32), "mul.rn.f32 $0, $1, $2;", "=f,f,f")
# Written out so that two kernels that must agree to the bit round in the same places.
fma = _asm(F32, (F32, F32, F32), "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f")

# ---------------------------------------------------------------- memory


@intrinsic
def load16(typing_context, pointer, index):
    """16 bytes at element ``index`` of memory that no thread writes: four uint32."""
    signature = types.UniTuple(U32, 4)(pointer, index)

    def codegen(context, builder, signature, values):
        address = _element(
            context, builder, signature.args[0], values[0], values[1], signature.args[1]
        )
        vector = ir.VectorType(_WORD, 4)
        loaded = builder.load(_in_global_memory(builder, address, vector), align=16)
        loaded.set_metadata("invariant.load", builder.module.add_metadata([]))
        parts = [builder.extract_element(loaded, _WORD(i)) for i in range(4)]
        return context.make_tuple(builder, signature.return_type, parts)

    return signature, codegen


@intrinsic
def store16(typing_context, pointer, index, x0, x1, x2, x3):
    """Store four uint32 as 16 bytes at element ``index`` of global memory."""
    signature = types.void(pointer, index, U32, U32, U32, U32)

    def codegen(context, builder, signature, values):
        address = _element(
            context, builder, signature.args[0], values[0], values[1], signature.args[1]
        )
        vector = ir.VectorType(_WORD, 4)
        packed = ir.Constant(vector, ir.Undefined)
        for i in range(4):
            packed = builder.insert_element(packed, values[2 + i], _WORD(i))
        builder.store(packed, _in_global_memory(builder, address, vector), align=16)
        return context.get_dummy_value()

    return signature, codegen


def _with_address(returns, arguments, text, constraints):
    """An intrinsic ``f(pointer, index, *arguments)`` whose first operand is that address."""
    many = isinstance(returns, types.UniTuple)

    @_intrinsic(2 + len(arguments))
    def instruction(typing_context, pointer, index, *_):
        def codegen(context, builder, signature, values):
            address = _element(
                context, builder, signature.args[0], values[0], values[1], signature.args[1]
            )
            result = (
                ir.LiteralStructType([_LLVM[returns.dtype]] * len(returns))
                if many
                else _LLVM[returns]
            )
            asm = ir.InlineAsm(
                ir.FunctionType(result, [_LONG] + [_LLVM[a] for a in arguments]),
                text,
                constraints,
                side_effect=True,
            )
            value = builder.call(asm, [builder.ptrtoint(address, _LONG), *values[2:]])
            if many:
                parts = [builder.extract_value(value, i) for i in range(len(returns))]
                return context.make_tuple(builder, signature.return_type, parts)
            return context.get_dummy_value() if returns is types.void else value

        return returns(pointer, index, *arguments), codegen

    return instruction


# Partial results that other blocks wrote come from L2, never from this SM's own cache.
load16_fresh = _with_address(
    types.UniTuple(F32, 4),
    (),
    "ld.global.cg.v4.f32 {$0, $1, $2, $3}, [$4];",
    f"=f,=f,=f,=f,l,{_MEMORY}",
)
load_fresh = _with_address(F32, (), "ld.global.cg.f32 $0, [$1];", f"=f,l,{_MEMORY}")
load4 = _with_address(U32, (), "ld.global.u32 $0, [$1];", f"=r,l,{_MEMORY}")
store4 = _with_address(types.void, (U32,), "st.global.u32 [$0], $1;", f"l,r,{_MEMORY}")
atomic_add = _with_address(
    U32, (U32,), "atom.global.acq_rel.gpu.add.u32 $0, [$1], $2;", f"=r,l,r,{_MEMORY}"
)

# ---------------------------------------------------------------- warps

_FULL = "0xffffffff"
shuffle_xor = _asm(
    F32,
    (F32, U32),
    f"{{.reg .b32 a, b; mov.b32 a, $1; shfl.sync.bfly.b32 b, a, $2, 0x1f, {_FULL};"
    " mov.b32 $0, b;}",
    "=f,f,r",
    side_effect=True,
)
shuffle = _asm(
    U32,
    (U32, U32),
    f"shfl.sync.idx.b32 $0, $1, $2, 0x1f, {_FULL};",
    "=r,r,r",
    side_effect=True,
)
sync_warp = _asm(types.void, (), f"bar.warp.sync {_FULL};", _MEMORY, side_effect=True)

# ---------------------------------------------------------------- programmatic launch

# A kernel launched with "programmatic stream serialization" may start while the one before it
# drains; it must wait here before it touches memory.
wait_for_previous_kernel = _asm(types.void, (), "griddepcontrol.wait;", _MEMORY, side_effect=True)
let_next_kernel_start = _asm(
    types.void, (), "griddepcontrol.launch_dependents;", _MEMORY, side_effect=True
)

# ---------------------------------------------------------------- tensor cores (mma.sync)


def _mma(kind):
    text = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )

    @intrinsic
    def mma(typing_context, accumulators, offset, a0, a1, a2, a3, b0, b1):
        """``accumulators[offset:offset + 4] += A (16x16) B (16x8)``, a warp's fragments."""
        signature = types.void(accumulators, offset, U32, U32, U32, U32, U32, U32)

        def codegen(context, builder, signature, values):
            first = _element(
                context, builder, signature.args[0], values[0], values[1], signature.args[1]
            )
            slots = [builder.gep(first, [_LONG(i)]) for i in range(4)]
            before = [builder.load(slot) for slot in slots]
            asm = ir.InlineAsm(
                ir.FunctionType(ir.LiteralStructType([_REAL] * 4), [_WORD] * 6 + [_REAL] * 4),
                text,
                "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
                side_effect=False,
            )
            after = builder.call(asm, [*values[2:], *before])
            for i, slot in enumerate(slots):
                builder.store(builder.extract_value(after, i), slot)
            return context.get_dummy_value()

        return signature, codegen

    return mma


mma_bf16 = _mma("bf16")
mma_f16 = _mma("f16")
transpose8x8 = _asm(
    U32, (U32,), "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", side_effect=True
)
load_matrix = _asm(
    types.UniTuple(U32, 4),
    (U32,),
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3}, [$4];",
    f"=r,=r,=r,=r,r,{_MEMORY}",
    side_effect=True,
)
load_matrix_transposed = _asm(
    types.UniTuple(U32, 4),
    (U32,),
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0,$1,$2,$3}, [$4];",
    f"=r,=r,=r,=r,r,{_MEMORY}",
    side_effect=True,
)

# ---------------------------------------------------------------- shared memory


@intrinsic
def shared_address(typing_context, array):
    """The 32-bit address of a shared array's first element."""

    def codegen(context, builder, signature, values):
        base = context.make_array(signature.args[0])(context, builder, value=values[0]).data
        if base.type.addrspace != 3:
            base = builder.addrspacecast(base, ir.PointerType(base.type.pointee, 3))
        return builder.ptrtoint(base, _WORD)

    return U32(array), codegen


_store16_shared = (
    "st.shared.v4.u32 [$0], {$1, $2, $3, $4};",
    f"r,r,r,r,r,{_MEMORY}",
)
store16_shared = _asm(types.void, (U32,) * 5, *_store16_shared, side_effect=True)


@intrinsic
def copy16_async(typing_context, destination, pointer, index, num_bytes):
    """Start copying ``num_bytes`` (16, or 0: then zeros) from global to shared memory."""

    def codegen(context, builder, signature, values):
        address = _element(
            context, builder, signature.args[1], values[1], values[2], signature.args[2]
        )
        asm = ir.InlineAsm(
            ir.FunctionType(ir.VoidType(), [_WORD, _LONG, _WORD]),
            "cp.async.cg.shared.global.L2::128B [$0], [$1], 16, $2;",
            f"r,l,r,{_MEMORY}",
            side_effect=True,
        )
        builder.call(asm, [values[0], builder.ptrtoint(address, _LONG), values[3]])
        return context.get_dummy_value()

    return types.void(U32, pointer, index, U32), codegen


copy_commit = _asm(types.void, (), "cp.async.commit_group;", _MEMORY, side_effect=True)
copy_wait_all = _asm(types.void, (), "cp.async.wait_group 0;", _MEMORY, side_effect=True)
copy_wait_all_but_one = _asm(types.void, (), "cp.async.wait_group 1;", _MEMORY, side_effect=True)
fence_async_shared = _asm(
    types.void, (), "fence.proxy.async.shared::cta;", _MEMORY, side_effect=True
)


# ---------------------------------------------------------------- bulk copies and their barriers

# An mbarrier counts arrivals and bytes of one phase; waiting names the phase by its parity.
barrier_init = _asm(
    types.void, (U32, U32), "mbarrier.init.shared.b64 [$0], $1;", f"r,r,{_MEMORY}", side_effect=True
)
barrier_arrive = _asm(
    types.void,
    (U32,),
    "{.reg .b64 t; mbarrier.arrive.shared.b64 t, [$0];}",
    f"r,{_MEMORY}",
    side_effect=True,
)
barrier_expect = _asm(
    types.void,
    (U32, U32),
    "{.reg .b64 t; mbarrier.arrive.expect_tx.shared.b64 t, [$0], $1;}",
    f"r,r,{_MEMORY}",
    side_effect=True,
)
barrier_wait = _asm(
    types.void,
    (U32, U32),
    "{\n.reg .pred done;\nAGAIN:\n"
    "mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1;\n"
    "@done bra DONE;\nbra AGAIN;\nDONE:\n}",
    f"r,r,{_MEMORY}",
    side_effect=True,
)
fence_barrier_init = _asm(
    types.void, (), "fence.mbarrier_init.release.cluster;", _MEMORY, side_effect=True
)
sync_named = _asm(types.void, (U32, U32), "bar.sync $0, $1;", f"r,r,{_MEMORY}", side_effect=True)
arrive_named = _asm(
    types.void, (U32, U32), "bar.arrive $0, $1;", f"r,r,{_MEMORY}", side_effect=True
)
POINTER_MAP = POINTER_U64


@intrinsic
def copy_box(typing_context, destination, tensor_map, column, head, slot, barrier):
    """Start copying a box of a cache (64 dims of one head of some slots) to shared memory.

    The copy engine follows the tensor map and swizzles: 16-byte piece ``p`` of row ``r`` lands at
    piece ``p ^ (r % 8)``. ``barrier`` counts the bytes as they land.
    """

    def codegen(context, builder, signature, values):
        asm = ir.InlineAsm(
            ir.FunctionType(ir.VoidType(), [_WORD, _LONG, _WORD, _WORD, _WORD, _WORD]),
            "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
            " [$0], [$1, {$2, $3, $4}], [$5];",
            f"r,l,r,r,r,r,{_MEMORY}",
            side_effect=True,
        )
        map_at = builder.ptrtoint(values[1], _LONG)
        builder.call(asm, [values[0], map_at, *values[2:]])
        return context.get_dummy_value()

    return types.void(U32, tensor_map, U32, U32, U32, U32), codegen


# ---------------------------------------------------------------- tensor cores (wgmma, sm_90a)


def _store_parts(builder, array, value, count):
    for i in range(count):
        builder.store(builder.extract_value(value, i), builder.gep(array, [_LONG(i)]))


def _data(context, builder, array_type, value):
    return context.make_array(array_type)(context, builder, value=value).data


def wgmma_shared(kind, columns, a_steps, b_steps):
    """``f(scores, a, b)``: start ``scores (64 x columns) = A B^T``, both in shared memory.

    One step of 16 dims for each entry of ``a_steps`` and ``b_steps``, which are what the step adds
    to the matrix descriptors ``a`` and ``b`` (in units of 16 bytes).
    """
    count = columns // 2
    registers = "{" + ",".join(f"${i}" for i in range(count)) + "}"
    lines = [
        "{\n.reg .pred first, later;\n.reg .b64 da, db;\nsetp.ne.b32 first, 0, 0;",
        "setp.eq.b32 later, 0, 0;\nwgmma.fence.sync.aligned;",
    ]
    for i, (a, b) in enumerate(zip(a_steps, b_steps, strict=True)):
        lines.append(f"add.s64 da, ${count}, {a};\nadd.s64 db, ${count + 1}, {b};")
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {registers}, da, db,"
            f" {'later' if i else 'first'}, 1, 1, 0, 0;"
        )
    lines.append("wgmma.commit_group.sync.aligned;\n}")
    text = "\n".join(lines)
    constraints = ",".join(["=f"] * count + ["l", "l", _MEMORY])

    @intrinsic
    def product(typing_context, scores, a, b):
        def codegen(context, builder, signature, values):
            array = _data(context, builder, signature.args[0], values[0])
            result = ir.LiteralStructType([_REAL] * count)
            kind_of = ir.FunctionType(result, [_LONG, _LONG])
            asm = ir.InlineAsm(kind_of, text, constraints, side_effect=True)
            _store_parts(builder, array, builder.call(asm, values[1:]), count)
            return context.get_dummy_value()

        return types.void(scores, U64, U64), codegen

    return product


def wgmma_registers(kind, columns, b_steps):
    """``f(sums, weights, b)``: start ``sums (64 x columns) += A B``, A in registers.

    ``weights`` holds four words of A for each step of 16; B is shared memory with its columns
    adjacent, ``b_steps`` as for ``wgmma_shared``.
    """
    count, steps = columns // 2, len(b_steps)
    registers = "{" + ",".join(f"${i}" for i in range(count)) + "}"
    lines = ["{\n.reg .pred yes;\n.reg .b64 db;\nsetp.eq.b32 yes, 0, 0;\nwgmma.fence.sync.aligned;"]
    for i, b in enumerate(b_steps):
        a = "{" + ",".join(f"${count + 4 * i + j}" for j in range(4)) + "}"
        lines.append(f"add.s64 db, ${count + 4 * steps}, {b};")
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {registers}, {a}, db,"
            " yes, 1, 1, 1;"
        )
    lines.append("wgmma.commit_group.sync.aligned;\n}")
    text = "\n".join(lines)
    tied = [str(i) for i in range(count)]
    constraints = ",".join(["=f"] * count + ["r"] * (4 * steps) + ["l", *tied, _MEMORY])

    @intrinsic
    def product(typing_context, sums, weights, b):
        def codegen(context, builder, signature, values):
            array = _data(context, builder, signature.args[0], values[0])
            source = _data(context, builder, signature.args[1], values[1])
            words = [builder.load(builder.gep(source, [_LONG(i)])) for i in range(4 * steps)]
            before = [builder.load(builder.gep(array, [_LONG(i)])) for i in range(count)]
            result = ir.LiteralStructType([_REAL] * count)
            kind_of = ir.FunctionType(result, [_WORD] * (4 * steps) + [_LONG] + [_REAL] * count)
            asm = ir.InlineAsm(kind_of, text, constraints, side_effect=True)
            after = builder.call(asm, [*words, values[2], *before])
            _store_parts(builder, array, after, count)
            return context.get_dummy_value()

        return types.void(sums, weights, U64), codegen

    return product


def wgmma_wait(count, pending):
    """``f(array)``: wait until at most ``pending`` products are under way.

    The ``count`` results pass through, so that nothing can read them before.
    """
    tied = [str(i) for i in range(count)]
    constraints = ",".join(["=f"] * count + [*tied, _MEMORY])
    text = f"wgmma.wait_group.sync.aligned {pending};"

    @intrinsic
    def wait(typing_context, array):
        def codegen(context, builder, signature, values):
            data = _data(context, builder, signature.args[0], values[0])
            before = [builder.load(builder.gep(data, [_LONG(i)])) for i in range(count)]
            result = ir.LiteralStructType([_REAL] * count)
            kind_of = ir.FunctionType(result, [_REAL] * count)
            asm = ir.InlineAsm(kind_of, text, constraints, side_effect=True)
            _store_parts(builder, data, builder.call(asm, before), count)
            return context.get_dummy_value()

        return types.void(array), codegen

    return wait


def set_registers(direction, count):
    """``f()``: this group of four warps holds ``count`` registers a thread from here on."""
    text = f"setmaxnreg.{direction}.sync.aligned.u32 {count};"
    return _asm(types.void, (), text, _MEMORY, side_effect=True)
