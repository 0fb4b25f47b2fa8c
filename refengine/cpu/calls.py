"""Calling large compiled functions by their address.

What is called by name is linked in and optimised anew in every caller, on every level; a function
of thousands of instructions then costs each of them seconds of compiling. Called by address
(``jit.compiled_address``) it is compiled once.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from refengine.cpu.simd import intrinsic


@intrinsic
def call_address(typing_context: Any, address: Any, *arguments: Any) -> Any:
    """Call the C function at ``address``, which returns nothing.

    Arrays arrive there as pointers to their first element; integers and float32 as they are.
    """
    kinds = [types.unliteral(kind) for kind in arguments]

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        operands = []
        for index, kind in enumerate(kinds):
            operand = builder.extract_value(args[1], index)
            if isinstance(kind, types.Array):
                operand = context.make_array(kind)(context, builder, operand).data
            operands.append(operand)
        function = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
        builder.call(builder.inttoptr(args[0], function.as_pointer()), operands)
        return context.get_dummy_value()

    return types.void(types.intp, types.StarArgTuple.from_types(kinds)), code
