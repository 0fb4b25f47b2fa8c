"""A team of threads that goes through many short stages of work in one parallel region.

Numba forks and joins threads for every parallel loop. A decoder step would do that some 250 times,
a microsecond each; here all threads enter once and share each stage's items through counters in
memory:

    item = take(stages, s)
    while item < items:
        ...
        item = take(stages, s)
    finish(stages, s, items, how many this thread did)

A stage has ended when its *items* are done, not when all threads have come. So a thread that the
system has put aside holds up the others by no more than the item it is at; one that comes late, or
never, finds its work done by the others. There is nothing that threads could wait for in vain.
"""

from __future__ import annotations

import platform
import sys
from typing import Any

from llvmlite import ir
from numba import types

from refengine.cpu.jit import inner
from refengine.cpu.simd import emit_call, intrinsic
from refengine.cpu.simd_memory import fetch_add

# A stage's three counters have a cache line of their own, int64 ``stages[stage * SPACING + ...]``:
# the next item, how many are done, and how many threads sleep. All are zero when the team starts.
SPACING = 8
_DONE, _SLEEPERS = 1, 2
# Waiting begins with pauses, some 40 cycles each. After this many a thread sleeps: where something
# else runs on this machine, the thread it waits for may have lost its core, and gets this one.
_PAUSES = 1_000


@inner
def take(stages: Any, stage: int) -> int:
    """The next item of a stage that nobody has taken; may be past the last one."""
    return fetch_add(stages, stage * SPACING, 1)  # type: ignore[no-any-return]


@inner
def finish(stages: Any, stage: int, items: int, mine: int) -> None:
    """Report items as done and wait for the rest; what others wrote for theirs is visible then."""
    done, sleepers = stage * SPACING + _DONE, stage * SPACING + _SLEEPERS
    if mine > 0 and add_and_fetch(stages, done, mine) == items:
        # Whoever goes to sleep has either been counted by now, or sees that the count of items has
        # changed and does not sleep.
        if add_and_fetch(stages, sleepers, 0) > 0:
            wake_all(stages, done)
        return
    turns = 0
    while True:
        count = fetch(stages, done)
        if count >= items:
            return
        turns += 1
        if turns < _PAUSES:
            pause()
        else:
            add_and_fetch(stages, sleepers, 1)
            sleep_while_equal(stages, done, count)


# ---------------------------------------------------------------- in LLVM's language


def _element(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    return builder.gep(data, [args[1]])


@intrinsic
def add_and_fetch(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """Add to an int64 element as one indivisible step, in order with all other memory traffic."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _element(context, builder, signature, args)
        return builder.add(builder.atomic_rmw("add", pointer, args[2], "seq_cst"), args[2])

    return types.int64(array, types.intp, types.int64), code


@intrinsic
def fetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Read an int64 element that others change; what they wrote before that is visible after."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(
            _element(context, builder, signature, args), "acquire", 8, typ=ir.IntType(64)
        )

    return types.int64(array, types.intp), code


@intrinsic
def pause(typing_context: Any) -> Any:
    """Tell the core that it is waiting."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        triple = builder.module.triple
        if triple.startswith(("x86_64", "i686")):
            emit_call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        elif triple.startswith(("aarch64", "arm64")):
            emit_call(builder, "llvm.aarch64.hint", ir.VoidType(), [ir.IntType(32)(1)])
        return context.get_dummy_value()

    return types.void(), code


# Linux can let a thread sleep on a word of memory. libc has no name for it, so it goes by number.
_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine()) if sys.platform == "linux" else None
_FUTEX_WAIT_PRIVATE, _FUTEX_WAKE_PRIVATE = 128, 129
_EVERYONE = 2**31 - 1


@intrinsic
def sleep_while_equal(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """Sleep until woken, unless an int64 element's low half is another than that of ``value``.

    May return for no reason. Elsewhere than on Linux the thread offers its core to others instead.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _FUTEX is None:
            name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
            builder.call(_external(builder, name, ir.FunctionType(ir.IntType(32), [])), [])
        else:
            pointer = _element(context, builder, signature, args)
            _emit_futex(builder, pointer, _FUTEX_WAIT_PRIVATE, args[2])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), code


@intrinsic
def wake_all(typing_context: Any, array: Any, index: Any) -> Any:
    """Wake all threads that sleep on an element."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _FUTEX is not None:
            pointer = _element(context, builder, signature, args)
            _emit_futex(builder, pointer, _FUTEX_WAKE_PRIVATE, ir.IntType(64)(_EVERYONE))
        return context.get_dummy_value()

    return types.void(array, types.intp), code


def _emit_futex(builder: Any, pointer: Any, operation: int, value: Any) -> None:
    """``syscall(SYS_futex, pointer, operation, value, no timeout)``."""
    i64 = ir.IntType(64)
    low_half = builder.and_(value, i64(0xFFFFFFFF))
    arguments = [i64(_FUTEX), builder.ptrtoint(pointer, i64), i64(operation), low_half, i64(0)]
    function = _external(builder, "syscall", ir.FunctionType(i64, [i64], var_arg=True))
    builder.call(function, arguments)


def _external(builder: Any, name: str, kind: Any) -> Any:
    """A function of the system's library."""
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)


@intrinsic
def read_clock(typing_context: Any) -> Any:
    """A count that grows with time (cycles, as a rule); 0 where there is none."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_call(builder, "llvm.readcyclecounter", ir.IntType(64), [])

    return types.int64(), code
