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

import sys
from typing import Any

from llvmlite import ir
from numba import types

from refengine.cpu.jit import inner
from refengine.cpu.simd import emit_call, intrinsic
from refengine.cpu.simd_memory import fetch_add

# A stage's two counters, the next item and how many are done, have a cache line of their own: int64
# ``stages[stage * SPACING]`` and the one after it. All are zero when the team starts.
SPACING = 8
# Waiting begins with pauses, some 40 cycles each. After this many, the thread offers its core to
# others at every turn: there may be fewer cores than threads.
_PAUSES = 1_000


@inner
def take(stages: Any, stage: int) -> int:
    """The next item of a stage that nobody has taken; may be past the last one."""
    return fetch_add(stages, stage * SPACING, 1)  # type: ignore[no-any-return]


@inner
def finish(stages: Any, stage: int, items: int, mine: int) -> None:
    """Report items as done and wait for the rest; what others wrote for theirs is visible then."""
    place = stage * SPACING + 1
    if mine > 0 and add_and_fetch(stages, place, mine) == items:
        return
    turns = 0
    while fetch(stages, place) < items:
        turns += 1
        if turns < _PAUSES:
            pause()
        else:
            offer_core()


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


@intrinsic
def offer_core(typing_context: Any) -> Any:
    """Ask the system to run another thread here, if one wants to."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
        function = builder.module.globals.get(name)
        if function is None:
            function = ir.Function(builder.module, ir.FunctionType(ir.IntType(32), []), name)
        builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def read_clock(typing_context: Any) -> Any:
    """A count that grows with time (cycles, as a rule); 0 where there is none."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_call(builder, "llvm.readcyclecounter", ir.IntType(64), [])

    return types.int64(), code
